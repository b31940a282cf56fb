package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/keeper/link"
)

// startTimeout bounds how long a keeper may take until it answers.
const startTimeout = 10 * time.Second

// maxLog bounds the keeper's log that is carried into a new keeper, in bytes.
const maxLog = 1 << 20

// start runs a keeper in cfg.Dir and returns when it answers. If somebody else
// started one at the same time, that one is as good. What is held goes to it.
func (c *Client) start(ctx context.Context) error {
	cfg := c.cfg
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return err
	}
	log, err := openLog(filepath.Join(cfg.Dir, link.LogName))
	if err != nil {
		return err
	}
	defer log.Close()
	fault.Point("keeper.log-opened")
	ready, readyw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer readyw.Close()
	begin, beginw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer begin.Close()
	defer beginw.Close()

	cmd := exec.Command(cfg.Binary, link.SupervisorArgs(cfg.Dir, cfg.Cgroup)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = begin, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.withHeld(func(held []link.HeldFD, files []*os.File) error {
		list, err := link.SaveHeld(held)
		if err != nil {
			return err
		}
		defer list.Close()
		cmd.ExtraFiles = append([]*os.File{readyw, list}, files...)
		return cmd.Start()
	}); err != nil {
		return err
	}
	fault.Point("keeper.launched")
	go cmd.Wait() // it outlives this process; should it not, it leaves no zombie
	readyw.Close()
	if cfg.Place != nil {
		if err := cfg.Place(ctx, cmd.Process.Pid); err != nil {
			return err // without the word it ends
		}
	}
	_, _ = beginw.WriteString(link.BeginWord) // to one that has exited; it gives no answer then

	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := io.ReadAll(io.LimitReader(ready, 16))
	if err != nil {
		// It may answer later, and be found then.
		return fmt.Errorf("no answer: %w: %w", errors.Join(err, context.Cause(ctx)), errdefs.ErrUnavailable)
	}
	if string(answer) != link.ReadyAnswer {
		return fmt.Errorf("%w; the last line of %s: %s", errDied, log.Name(), lastLine(log.Name()))
	}
	return nil
}

// errDied says that a keeper ended before it answered.
var errDied = errors.New("it exited")

// lastLine returns the last line of a keeper's log, for an error.
func lastLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return lines[len(lines)-1]
}

func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Truncate(path, 0); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}
