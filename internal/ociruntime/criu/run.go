package criu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// patience is how long CRIU may go on that nobody wants any more. It is not
// killed at once, since it has code of its own running inside of the processes,
// and needs a moment to get out again.
const patience = 10 * time.Second

// tick is how often Run looks whether CRIU has ended.
const tick = 10 * time.Millisecond

// Run runs a command that runs CRIU, the program given, and returns when both have
// ended. When ctx ends, the command is killed, upon which CRIU gives up as soon as
// it notices; if it does not in some seconds, it is killed too. The command
// is killed if this process dies. It has a mount namespace of its own, with which
// go the mounts that runtimes make for a restore; what is mounted on the host shows in
// it, since restored mounts take part in that by way of it.
func Run(ctx context.Context, cmd *exec.Cmd, program string) error {
	env := cmd.Env
	if env == nil {
		env = os.Environ()
	}
	cmd.Env = append(env, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// The death signal is that of the thread that starts the command.
	return host.InOwnMounts(func() error { return run(ctx, cmd) })
}

func run(ctx context.Context, cmd *exec.Cmd) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if stop() && err == nil {
		return nil
	}
	return errors.Join(err, endGroup(cmd.Process.Pid))
}

// endGroup waits until the processes of a group have ended, and kills them if they
// take too long. Who reaps them is somebody else.
func endGroup(id int) error {
	for begin := time.Now(); alive(id); time.Sleep(tick) {
		switch {
		case time.Since(begin) > 2*patience:
			return errors.New("criu does not die")
		case time.Since(begin) > patience:
			unix.Kill(-id, unix.SIGKILL)
		}
	}
	return nil
}

// alive reports whether a process group has a process that is no zombie.
func alive(group int) bool {
	if errors.Is(unix.Kill(-group, 0), unix.ESRCH) {
		return false
	}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// Behind the name, which may hold anything: state, parent, group.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) > 2 && string(fields[0]) != "Z" && string(fields[2]) == strconv.Itoa(group) {
			return true
		}
	}
	return false
}
