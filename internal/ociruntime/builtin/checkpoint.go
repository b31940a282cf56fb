package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/console"
	"sampan.dev/sampan/internal/ociruntime/criu"
	"sampan.dev/sampan/internal/ociruntime/lifecycle"
)

// libcontainer's use of CRIU is not for a process that lives on: it finds criu by
// PATH, keeps what it finds in variables of the package, cannot be told to stop,
// and leaves the process of a restore that fails as a zombie. So it is called in a
// process of its own, a copy of the calling program with the argument "criu",
// which ends when it is done. What has been restored falls to the subreaper.

const (
	criuArgument = "criu"
	criuEnv      = "_SAMPAN_CRIU"
)

// The descriptors of that process, behind stdio.
const (
	taskFD    = 3 // the task is read from here
	outcomeFD = 4 // the outcome is written to here
	consoleFD = 5 // the socket that gets the terminal's master
)

// task is what that process is told.
type task struct {
	Container  ociruntime.Container
	Checkpoint ociruntime.Checkpoint
	Restore    bool
	Bundle     string      // of a restore
	Spec       *specs.Spec // of a restore
}

// outcome is what it answers.
type outcome struct {
	Pid   int    `json:",omitempty"`
	Error string `json:",omitempty"`
}

// Checkpoint dumps the container's processes.
func (d *driver) Checkpoint(ctx context.Context, c ociruntime.Container, to ociruntime.Checkpoint) error {
	_, err := d.perform(ctx, task{Container: c, Checkpoint: to}, ociruntime.Stdio{}, nil)
	return err
}

// Restore makes a container of a checkpoint. CRIU is in the container's cgroup
// while it does, and is killed with it.
func (d *driver) Restore(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio, from ociruntime.Checkpoint) (ociruntime.Started, error) {
	t := task{Container: c, Checkpoint: from, Restore: true, Bundle: bundle, Spec: spec}
	if !spec.Process.Terminal {
		return d.perform(ctx, t, stdio, nil)
	}
	terminal, err := console.NewPair()
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer terminal.Close()
	started, err := d.perform(ctx, t, ociruntime.Stdio{}, terminal.Child)
	if err != nil {
		return ociruntime.Started{}, err
	}
	if started.Console, err = terminal.Receive(); err != nil {
		return ociruntime.Started{}, errors.Join(err, lifecycle.Discard(started))
	}
	return started, nil
}

// perform has a task done by a process of its own.
func (d *driver) perform(ctx context.Context, t task, stdio ociruntime.Stdio, console *os.File) (ociruntime.Started, error) {
	request, err := json.Marshal(t)
	if err != nil {
		return ociruntime.Started{}, err
	}
	in, err := requestFile(request)
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer in.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer read.Close()
	defer write.Close()

	cmd := exec.Command("/proc/self/exe", criuArgument)
	cmd.Env = append(os.Environ(), criuEnv+"=1")
	cmd.ExtraFiles = []*os.File{taskFD - 3: in, outcomeFD - 3: write}
	if console != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, console)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.Streams()
	runErr := criu.Run(ctx, cmd, t.Checkpoint.CRIU)
	write.Close()
	var o outcome
	if err := json.NewDecoder(read).Decode(&o); err != nil {
		return ociruntime.Started{}, errors.Join(runErr, fmt.Errorf("the process that runs CRIU does not answer: %w", err))
	}
	if o.Error != "" {
		return ociruntime.Started{}, errors.New(o.Error)
	}
	return ociruntime.Started{Pid: o.Pid}, nil
}

// requestFile returns an unnamed file with the request, which may be longer than a
// pipe is.
func requestFile(request []byte) (*os.File, error) {
	f, err := os.CreateTemp("", "criu-")
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name())
	if _, err := f.Write(request); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if _, err := f.Seek(0, 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// runTask is the process' main.
func runTask() int {
	var t task
	err := json.NewDecoder(os.NewFile(taskFD, "task")).Decode(&t)
	var o outcome
	if err == nil {
		forwardLog(slog.New(slog.DiscardHandler)) // CRIU has a log of its own
		o.Pid, err = t.do()
	}
	if err != nil {
		o.Error = err.Error()
	}
	if err := json.NewEncoder(os.NewFile(outcomeFD, "outcome")).Encode(o); err != nil {
		return 1
	}
	return 0
}

func (t task) do() (pid int, err error) {
	o := &libcontainer.CriuOpts{
		ImagesDirectory: filepath.Join(t.Checkpoint.Dir, criu.ImagesDir), WorkDirectory: t.Checkpoint.Dir, StatusFd: -1,
	}
	if t.Restore {
		return t.restore(o)
	}
	container, err := libcontainer.Load(t.Container.StateDir, t.Container.ID)
	if err != nil {
		return 0, err
	}
	o.LeaveRunning = true
	return 0, container.Checkpoint(o)
}

func (t task) restore(o *libcontainer.CriuOpts) (pid int, err error) {
	config, err := convert(t.Container.ID, t.Bundle, t.Spec)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	container, err := libcontainer.Create(t.Container.StateDir, t.Container.ID, config)
	if err != nil {
		return 0, err
	}
	// With cgroup v1, libcontainer shows the container the cgroup of its own process.
	m, err := manager.New(config.Cgroups)
	if err != nil {
		return 0, err
	}
	if err := m.Apply(os.Getpid()); err != nil {
		return 0, err
	}
	o.WorkDirectory = t.Container.StateDir
	switch p := t.Spec.Process; {
	case p.ApparmorProfile != "":
		o.LsmProfile = "apparmor:" + p.ApparmorProfile
	case p.SelinuxLabel != "":
		o.LsmProfile = "selinux:" + p.SelinuxLabel
	}
	process := &libcontainer.Process{Init: true, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if t.Spec.Process.Terminal {
		process.ConsoleSocket = os.NewFile(consoleFD, "console")
	}
	if err := container.Restore(process, o); err != nil {
		return 0, err
	}
	return process.Pid()
}
