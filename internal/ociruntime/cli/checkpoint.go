package cli

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/criu"
)

// Checkpoint runs the checkpoint command, which some runtimes do not have.
func (d *driver) Checkpoint(ctx context.Context, c ociruntime.Container, to ociruntime.Checkpoint) error {
	if err := d.knows(ctx, "checkpoint"); err != nil {
		return err
	}
	return d.run(ctx, c, invocation{verb: "checkpoint", criu: to.CRIU, args: []string{
		"--leave-running", "--image-path", filepath.Join(to.Dir, criu.ImagesDir), "--work-path", to.Dir,
	}})
}

// Restore runs the restore command.
func (d *driver) Restore(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio, from ociruntime.Checkpoint) (ociruntime.Started, error) {
	if err := d.knows(ctx, "restore"); err != nil {
		return ociruntime.Started{}, err
	}
	return d.launch(ctx, c, spec.Process, invocation{verb: "restore", criu: from.CRIU, stdio: stdio, args: []string{
		"--detach", "--bundle", bundle, "--image-path", filepath.Join(from.Dir, criu.ImagesDir), "--work-path", c.StateDir,
	}})
}

// knows finds out whether the runtime has a command: crun, e.g., can be built with
// CRIU or without.
func (d *driver) knows(ctx context.Context, verb string) error {
	if err := exec.CommandContext(ctx, d.path, verb, "--help").Run(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("%s has no command %q: %w", d.path, verb, errdefs.ErrNotImplemented)
	}
	return context.Cause(ctx)
}
