package lifecycle

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/criu"
	"sampan.dev/sampan/internal/state"
)

func (r *runtime) Pause(ctx context.Context, c ociruntime.Container) error {
	if err := r.pause(ctx, c); err != nil {
		return fmt.Errorf("pause container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) pause(ctx context.Context, c ociruntime.Container) error {
	_, u, err := r.running(ctx, c)
	if err != nil {
		return err
	}
	return u.Cgroup.Freeze(ctx)
}

// running returns the first process of a container that runs, and what it is made
// of.
func (r *runtime) running(ctx context.Context, c ociruntime.Container) (host.Process, undo, error) {
	first, status, err := r.status(ctx, c)
	if err != nil {
		return host.Process{}, undo{}, err
	}
	if status != ociruntime.Running {
		return host.Process{}, undo{}, notIn(status)
	}
	u, err := r.readUndo(c)
	return first, u, err
}

func (r *runtime) Resume(_ context.Context, c ociruntime.Container) error {
	u, err := r.readUndo(c)
	if err == nil {
		err = u.Cgroup.Thaw()
	}
	if err != nil {
		return fmt.Errorf("resume container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) Checkpoint(ctx context.Context, c ociruntime.Container, bundle string, to ociruntime.Checkpoint) error {
	if err := r.checkpoint(ctx, c, bundle, to); err != nil {
		return fmt.Errorf("checkpoint container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) checkpoint(ctx context.Context, c ociruntime.Container, bundle string, to ociruntime.Checkpoint) error {
	r.dumping.Lock()
	defer r.dumping.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	first, u, err := r.running(ctx, c)
	if err != nil {
		return err
	}
	if err := oneTree(u.Cgroup, first.Pid); err != nil {
		return err
	}
	images := filepath.Join(to.Dir, criu.ImagesDir)
	if err := os.Mkdir(images, 0o700); err != nil {
		return err
	}
	stdio, err := criu.StdioOf(first.Pid)
	if err != nil {
		return err
	}
	spec, err := readSpec(bundle)
	if err != nil {
		return err
	}
	if err := writeOptions(spec, criu.DumpOptions(stdio)); err != nil {
		return err
	}
	err = r.driver.Checkpoint(ctx, c, to)
	switch {
	case err == nil:
		return criu.DetachStdio(images, stdio)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case !isAlive(c):
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	}
	return explained(err, filepath.Join(to.Dir, criu.DumpLog))
}

// explained adds to an error what CRIU has to say.
func explained(err error, log string) error {
	if reason := criu.Reason(log); reason != "" {
		return fmt.Errorf("%w (CRIU says: %s)", err, reason)
	}
	return err
}

// oneTree refuses a container with processes that CRIU would not find, because
// they came from outside.
func oneTree(cgroup host.Cgroup, first int) error {
	pids, err := cgroup.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		parent := pid
		for range len(pids) {
			if parent == first || parent <= 1 {
				break
			}
			if parent, err = host.Parent(parent); err != nil {
				break // it has ended
			}
		}
		if err == nil && parent != first {
			return fmt.Errorf("process %d is not a descendant of the container's first process, perhaps an exec that runs; try again when it has ended: %w", pid, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// writeOptions puts the options where the bundle says that CRIU will read them.
func writeOptions(spec *specs.Spec, o criu.Options) error {
	path := spec.Annotations[criu.ConfigAnnotation]
	if !filepath.IsAbs(path) {
		return fmt.Errorf("the container was created without the annotation %s: %w", criu.ConfigAnnotation, errdefs.ErrNotImplemented)
	}
	return o.Write(path)
}

// restore makes the processes of a checkpoint.
func (r *runtime) restore(ctx context.Context, c ociruntime.Container, req ociruntime.CreateRequest, spec *specs.Spec) (ociruntime.Started, error) {
	r.dumping.Lock()
	defer r.dumping.Unlock()
	if ctx.Err() != nil {
		return ociruntime.Started{}, context.Cause(ctx)
	}
	if err := writeOptions(spec, criu.RestoreOptions()); err != nil {
		return ociruntime.Started{}, err
	}
	if err := os.WriteFile(filepath.Join(c.StateDir, restoreName), nil, 0o600); err != nil {
		return ociruntime.Started{}, err
	}
	started, err := r.driver.Restore(ctx, c, req.Bundle, spec, req.Stdio, *req.Restore)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("restore: %w", explained(err, filepath.Join(c.StateDir, criu.RestoreLog)))
	}
	return started, nil
}

// isRestored reports whether the container's processes come from a checkpoint.
func isRestored(c ociruntime.Container) bool {
	return state.Exists(filepath.Join(c.StateDir, restoreName))
}

// letGo lets the processes of a created container run. Those that were restored
// are stopped, all of them.
func (r *runtime) letGo(ctx context.Context, c ociruntime.Container, first host.Process) error {
	if !isRestored(c) {
		return r.driver.Start(ctx, c, first)
	}
	u, err := r.readUndo(c)
	if err != nil {
		return err
	}
	_, err = u.Cgroup.Signal(unix.SIGCONT)
	return err
}

// wasLetGo reports whether letGo had its effect before it could be recorded.
func (r *runtime) wasLetGo(ctx context.Context, c ociruntime.Container, first host.Process) (bool, error) {
	if !isRestored(c) {
		return r.driver.Started(ctx, c, first)
	}
	state, err := host.ProcessState(first.Pid)
	return err == nil && state != 'T', nil
}
