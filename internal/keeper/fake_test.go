package keeper_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/ociruntime"
)

// fakeInitArg makes the test's binary the first process of a fake container.
const fakeInitArg = "fake-init"

// fakeRuntime runs plain processes. What belongs to a container is what is in the
// sessions that it began. Its state directory has:
//
//	go        a FIFO, until the container was started
//	init      the first process
//	sessions  the sessions, one a line
type fakeRuntime struct{}

func newFakeRuntime(h keeper.Handler, _ *slog.Logger) (ociruntime.Runtime, error) {
	if h.Kind != keeper.Builtin {
		return nil, fmt.Errorf("handler %s: %w", h.Kind, errdefs.ErrInvalidArgument)
	}
	if h.Path == slowHandler {
		time.Sleep(slowStart)
		if err := exec.Command("true").Run(); err != nil { // as a runtime that is asked what it can do
			return nil, err
		}
	}
	return fakeRuntime{}, nil
}

// slowHandler is the path of a handler that takes slowStart until it can be used.
const (
	slowHandler = "slow"
	slowStart   = 400 * time.Millisecond
)

// fakeInit waits for Start and executes the process of config.json.
func fakeInit(stateDir, bundle string) error {
	f, err := os.OpenFile(filepath.Join(stateDir, "go"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	// Nobody would find this process if its create was cut off.
	for n := 0; ; time.Sleep(time.Millisecond) {
		init, err := os.ReadFile(filepath.Join(stateDir, "init"))
		if err == nil && string(init) == strconv.Itoa(os.Getpid()) {
			if n, _ = f.Read(make([]byte, 1)); n > 0 {
				break
			}
		} else if n++; n > 5000 || len(init) > 0 {
			return errors.New("the create was cut off")
		} else if _, err := os.Stat(stateDir); err != nil {
			return err
		}
	}
	f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	p, err := fakeProcess(bundle)
	if err != nil {
		return err
	}
	path, err := exec.LookPath(p.Args[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, p.Args, p.Env)
}

func fakeProcess(bundle string) (*specs.Process, error) {
	var spec specs.Spec
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(data, &spec)
	return spec.Process, err
}

func (fakeRuntime) Create(_ context.Context, c ociruntime.Container, r ociruntime.CreateRequest) (ociruntime.Started, error) {
	if err := os.Mkdir(c.StateDir, 0o700); err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	pid, err := func() (int, error) {
		if _, err := fakeProcess(r.Bundle); err != nil {
			return 0, err
		}
		if err := unix.Mkfifo(filepath.Join(c.StateDir, "go"), 0o600); err != nil {
			return 0, err
		}
		pid, err := fakeStart(r.Stdio, os.Args[0], fakeInitArg, c.StateDir, r.Bundle)
		if err != nil {
			return 0, err
		}
		if err := os.WriteFile(filepath.Join(c.StateDir, "init"), strconv.AppendInt(nil, int64(pid), 10), 0o600); err != nil {
			return 0, err
		}
		return pid, fakeSession(c, pid)
	}()
	if err != nil {
		os.RemoveAll(c.StateDir)
		return ociruntime.Started{}, err
	}
	return ociruntime.Started{Pid: pid, Child: true}, nil
}

func fakeStart(stdio ociruntime.Stdio, args ...string) (int, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if stdio.Stdin != nil {
		cmd.Stdin = stdio.Stdin
	}
	if stdio.Stdout != nil {
		cmd.Stdout = stdio.Stdout
	}
	if stdio.Stderr != nil {
		cmd.Stderr = stdio.Stderr
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	return pid, cmd.Process.Release()
}

func fakeSession(c ociruntime.Container, pid int) error {
	f, err := os.OpenFile(filepath.Join(c.StateDir, "sessions"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, pid)
	return err
}

func (r fakeRuntime) Start(ctx context.Context, c ociruntime.Container) error {
	path := filepath.Join(c.StateDir, "go")
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			defer f.Close()
			_, err = f.Write([]byte{0})
			return err
		}
		if !errors.Is(err, unix.ENXIO) || time.Now().After(deadline) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
}

func (fakeRuntime) Exec(_ context.Context, c ociruntime.Container, r ociruntime.ExecRequest) (ociruntime.Started, error) {
	pid, err := fakeStart(r.Stdio, r.Process.Args...)
	if err != nil {
		return ociruntime.Started{}, err
	}
	return ociruntime.Started{Pid: pid, Child: true}, fakeSession(c, pid)
}

func (r fakeRuntime) Signal(ctx context.Context, c ociruntime.Container, sig unix.Signal, all bool) error {
	pids := []int{fakePid(c)}
	if all {
		pids, _ = r.Pids(ctx, c)
	}
	for _, pid := range pids {
		unix.Kill(pid, sig)
	}
	return nil
}

func fakePid(c ociruntime.Container) int {
	data, _ := os.ReadFile(filepath.Join(c.StateDir, "init"))
	pid, _ := strconv.Atoi(string(data))
	return pid
}

func (fakeRuntime) Update(context.Context, ociruntime.Container, *specs.LinuxResources) error {
	return nil
}

func (fakeRuntime) Pids(_ context.Context, c ociruntime.Container) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(c.StateDir, "sessions"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	sessions := strings.Fields(string(data))
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var pids []int
	for _, path := range stats {
		stat, _ := os.ReadFile(path)
		_, rest, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(rest)
		if len(f) < 4 || f[0] == "Z" {
			continue
		}
		for _, s := range sessions {
			if f[3] == s {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

func (fakeRuntime) State(_ context.Context, c ociruntime.Container) (ociruntime.State, error) {
	pid := fakePid(c)
	if pid == 0 {
		return ociruntime.State{}, errdefs.ErrNotFound
	}
	if _, err := host.Identify(pid); err != nil {
		return ociruntime.State{Status: ociruntime.Stopped}, nil
	}
	if _, err := os.Stat(filepath.Join(c.StateDir, "go")); err == nil {
		return ociruntime.State{Status: ociruntime.Created, Pid: pid}, nil
	}
	return ociruntime.State{Status: ociruntime.Running, Pid: pid}, nil
}

// Pause asks again until all have stayed stopped for a while: the kernel forgets a
// SIGSTOP that comes while a process with several threads executes another program.
// One that waits for its stopped child to do that, as vfork has it, is stopped too.
func (r fakeRuntime) Pause(ctx context.Context, c ociruntime.Container) error {
	for still := 0; still < 5; time.Sleep(time.Millisecond) {
		if err := r.Signal(ctx, c, unix.SIGSTOP, true); err != nil {
			return err
		}
		pids, err := r.Pids(ctx, c)
		if err = cmp.Or(err, context.Cause(ctx)); err != nil {
			return err
		}
		still++
		for _, pid := range pids {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && !strings.Contains(string(stat), ") T ") && !strings.Contains(string(stat), ") D ") {
				still = 0
			}
		}
	}
	return nil
}

func (r fakeRuntime) Resume(ctx context.Context, c ociruntime.Container) error {
	return r.Signal(ctx, c, unix.SIGCONT, true)
}

// Checkpoint takes as long as it takes until there is a file "go" beside the
// directory, and fails if there is one called "fail".
func (fakeRuntime) Checkpoint(ctx context.Context, c ociruntime.Container, _ string, to ociruntime.Checkpoint) error {
	for ; ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(filepath.Dir(to.Dir), "fail")); err == nil {
			return errors.New("as it was told")
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(to.Dir), "go")); err == nil {
			return os.WriteFile(filepath.Join(to.Dir, "image"), []byte(c.ID), 0o600)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

func (fakeRuntime) OOMKills(ociruntime.Container) (uint64, error) {
	return 0, errdefs.ErrNotImplemented
}

func (r fakeRuntime) Delete(ctx context.Context, c ociruntime.Container) error {
	if pids, err := r.Pids(ctx, c); err == nil {
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	return os.RemoveAll(c.StateDir)
}
