package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/criu"
)

// invocation is one run of the runtime's program.
type invocation struct {
	verb string
	args []string

	// stdio becomes the command's, if keepsStdio is set, and so that of the
	// process it leaves behind. Otherwise the command's errors are collected
	// and its output goes to out.
	keepsStdio bool
	stdio      ociruntime.Stdio
	out        io.Writer

	// criu is the path of the program criu, for commands that need it.
	criu string
}

// maxErrors bounds what is read of a command's complaints.
const maxErrors = 16 << 10

// stdioDelay is how long a command's output is waited for after its end: a hook
// may have left a process that holds it.
const stdioDelay = time.Second

// run runs the program to its end. An error has the runtime's own words. When
// ctx ends or this process dies, the program is killed.
func (d *driver) run(ctx context.Context, c ociruntime.Container, inv invocation) error {
	log, err := os.CreateTemp(c.StateDir, "log-*")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()

	args := []string{"--root", filepath.Join(c.StateDir, rootName), "--log", log.Name(), "--log-format", "json"}
	args = append(append(append(args, inv.verb), inv.args...), c.ID)
	cmd := exec.CommandContext(ctx, d.path, args...)
	cmd.WaitDelay = stdioDelay
	var complaints limited
	if inv.keepsStdio {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = inv.stdio.Streams()
	} else {
		cmd.Stdout, cmd.Stderr = inv.out, &complaints
	}

	if inv.criu != "" {
		err = criu.Run(ctx, cmd, inv.criu)
	} else {
		err = runBound(cmd)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	said := logged(log)
	if said == "" {
		said = strings.TrimSpace(complaints.String())
	}
	return fmt.Errorf("%s %s: %s: %w", filepath.Base(d.path), inv.verb, said, err)
}

// runBound runs a command that dies with this process. The death signal is that of
// the thread that starts the command.
func runBound(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return cmd.Run()
}

// logged returns the errors in a runtime's log.
func logged(log io.Reader) string {
	var said []string
	entries := json.NewDecoder(io.LimitReader(log, maxErrors))
	for {
		var entry struct{ Level, Msg string }
		if err := entries.Decode(&entry); err != nil {
			return strings.Join(said, "; ")
		}
		if entry.Level == "error" || entry.Level == "fatal" {
			said = append(said, entry.Msg)
		}
	}
}

// limited is a buffer that forgets what exceeds maxErrors.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, maxErrors-l.Len()))])
	return len(p), nil
}
