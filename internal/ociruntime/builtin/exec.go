package builtin

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/launch"
)

// exec starts a further process in a container that create has made. The error is
// errNoEntry if libcontainer has.
func (d *driver) exec(ctx context.Context, c ociruntime.Container, first host.Process, process *specs.Process, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	e, f, err := readEntry(c)
	if err != nil {
		return ociruntime.Started{}, err
	}
	handle, err := first.Open()
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer handle.Close()
	p := &launch.Plan{}
	p.Setns("namespaces of the container", handle.Fd(), e.Namespaces&^unix.CLONE_NEWPID)
	p.Keyring("_ses."+c.ID, 0)
	planTerminal(p, process, false)
	if process.ApparmorProfile != "" {
		p.Procfs()
	}
	if err := planUser(p, process, e.Umask, f); err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	p.Execute()
	options := launch.Options{Stdin: stdio.Stdin, Stdout: stdio.Stdout, Stderr: stdio.Stderr}
	if process.Terminal {
		options = launch.Options{}
	}
	if e.Namespaces&unix.CLONE_NEWPID != 0 {
		options.PIDs = handle.File()
	}
	started, err := d.join(p, options, e, first)
	if err != nil {
		return ociruntime.Started{}, classify(err)
	}
	return d.execute(ctx, started, e)
}

// join starts the process, in cgroup v2 right in the container's.
func (d *driver) join(p *launch.Plan, o launch.Options, e entry, first host.Process) (*launch.Process, error) {
	if !cgroups.IsCgroup2UnifiedMode() {
		return d.launcher.Start(p, o)
	}
	// What has moved itself into a cgroup of its own, or has made cgroups below
	// its own, cannot be joined where it began, but where it is.
	var failed error
	for _, find := range []func() (string, error){
		func() (string, error) { return e.Cgroup[""], nil },
		func() (string, error) { own, err := host.CgroupOf(first.Pid); return own[""], err },
	} {
		dir, err := find()
		if err != nil {
			return nil, errors.Join(failed, err)
		}
		process, err := d.startIn(dir, p, o)
		if err == nil {
			return process, nil
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

func (d *driver) startIn(dir string, p *launch.Plan, o launch.Options) (*launch.Process, error) {
	cgroup, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	o.Cgroup = cgroup
	return d.launcher.Start(p, o)
}

// execute sees a further process to the user's program.
func (d *driver) execute(ctx context.Context, process *launch.Process, e entry) (ociruntime.Started, error) {
	defer process.Close()
	stop := context.AfterFunc(ctx, process.Kill)
	defer stop()
	var ours tasks
	ours.add(func() error {
		if !cgroups.IsCgroup2UnifiedMode() {
			if err := joinCgroup(e.Cgroup, process.Pid); err != nil {
				return err
			}
		}
		if e.OOMScore != nil {
			if err := setOOMScore(process.Pid, *e.OOMScore); err != nil {
				return err
			}
		}
		resetAffinity(process.Pid)
		return nil
	})
	started, err := attend(process, ours.wait)
	if err == nil {
		return started, nil
	}
	err = classify(giveUp(process, started, err, &ours))
	switch {
	case errors.Is(err, errKilled) && ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, errKilled):
		err = fmt.Errorf("%w: the container is ending, or its memory is used up: %w", err, errdefs.ErrFailedPrecondition)
	}
	return ociruntime.Started{}, err
}
