// Package cli drives OCI runtimes through the command line that runc has given
// them all: runc, crun, youki, runsc and their like.
//
// The processes that a command makes outlive it; the kernel makes them
// children of the nearest subreaper above the caller.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/console"
	"sampan.dev/sampan/internal/ociruntime/lifecycle"
)

// Config is what New needs.
type Config struct {
	// Path of the runtime's program.
	Path string

	Logger *slog.Logger
}

// New returns the runtime.
func New(c Config) ociruntime.Runtime {
	return lifecycle.New(&driver{path: c.Path}, c.Logger)
}

type driver struct {
	path string
}

// rootName is the directory in a container's StateDir that the runtime is given
// for its own state.
const rootName = "root"

// Create runs the create command. If this process dies while it does, the
// command dies with it, and the container's first process, which waits for the
// command, dies then too.
func (d *driver) Create(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	for _, m := range spec.Mounts {
		// crun would make a source that is not there.
		if _, err := os.Stat(m.Source); lifecycle.IsBind(m) && err != nil {
			return ociruntime.Started{}, fmt.Errorf("%w: mount on %s: %w", errdefs.ErrInvalidArgument, m.Destination, err)
		}
	}
	return d.launch(ctx, c, spec.Process, invocation{verb: "create", args: []string{"--bundle", bundle}, stdio: stdio})
}

// Exec runs the exec command.
func (d *driver) Exec(ctx context.Context, c ociruntime.Container, _ host.Process, p *specs.Process, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	path, err := writeTemporary(c, "process-*.json", p)
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer os.Remove(path)
	return d.launch(ctx, c, p, invocation{verb: "exec", args: []string{"--detach", "--process", path}, stdio: stdio})
}

// launch runs a command that leaves a process behind.
func (d *driver) launch(ctx context.Context, c ociruntime.Container, p *specs.Process, inv invocation) (ociruntime.Started, error) {
	dir, err := os.MkdirTemp(c.StateDir, inv.verb+"-")
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer os.RemoveAll(dir)
	pidFile := filepath.Join(dir, "pid")
	inv.args = append(inv.args, "--pid-file", pidFile)
	var terminal *console.Listener
	if p.Terminal {
		if terminal, err = console.Listen(dir, "console"); err != nil {
			return ociruntime.Started{}, err
		}
		defer terminal.Close()
		inv.args = append(inv.args, "--console-socket", terminal.Path())
		inv.stdio = ociruntime.Stdio{}
	}
	inv.keepsStdio = true
	if err := d.run(ctx, c, inv); err != nil {
		return ociruntime.Started{}, err
	}
	pid, err := readPid(pidFile)
	if err != nil {
		return ociruntime.Started{}, err
	}
	started := ociruntime.Started{Pid: pid}
	if terminal != nil {
		if started.Console, err = terminal.Receive(); err != nil {
			return ociruntime.Started{}, errors.Join(err, lifecycle.Discard(started))
		}
	}
	return started, nil
}

func readPid(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("the runtime's pid file: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("the runtime's pid file says %q", data)
	}
	return pid, nil
}

// writeTemporary writes v as JSON into a new file in the StateDir, for the
// caller to remove.
func writeTemporary(c ociruntime.Container, pattern string, v any) (string, error) {
	f, err := os.CreateTemp(c.StateDir, pattern)
	if err != nil {
		return "", err
	}
	if err := errors.Join(json.NewEncoder(f).Encode(v), f.Close()); err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// Start runs the start command.
func (d *driver) Start(ctx context.Context, c ociruntime.Container, _ host.Process) error {
	return d.run(ctx, c, invocation{verb: "start"})
}

// Started asks the runtime.
func (d *driver) Started(ctx context.Context, c ociruntime.Container, _ host.Process) (bool, error) {
	var out strings.Builder
	if err := d.run(ctx, c, invocation{verb: "state", out: &out}); err != nil {
		return false, err
	}
	var s specs.State
	if err := json.Unmarshal([]byte(out.String()), &s); err != nil {
		return false, fmt.Errorf("state, as the runtime says it: %w", err)
	}
	return s.Status != specs.StateCreating && s.Status != specs.StateCreated, nil
}

// Update runs the update command. What a limit left out means is up to the
// runtime; runc and crun leave it as it is.
func (d *driver) Update(ctx context.Context, c ociruntime.Container, r *specs.LinuxResources) error {
	path, err := writeTemporary(c, "resources-*.json", r)
	if err != nil {
		return err
	}
	defer os.Remove(path)
	return d.run(ctx, c, invocation{verb: "update", args: []string{"--resources", path}})
}

// Destroy runs the delete command, if the runtime was ever asked to create.
func (d *driver) Destroy(ctx context.Context, c ociruntime.Container) error {
	if _, err := os.Stat(filepath.Join(c.StateDir, rootName, c.ID)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := d.run(ctx, c, invocation{verb: "delete", args: []string{"--force"}})
	if errdefs.IsUnavailable(err) {
		return nil // a runtime that was uninstalled leaves nothing that needs it
	}
	return err
}
