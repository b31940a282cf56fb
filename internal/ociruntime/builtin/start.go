package builtin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
)

// A created container's first process opens a FIFO for writing, which the
// kernel lets it do when somebody opens the other end, writes one byte and
// executes the user's program. Whoever reads the byte removes the FIFO.
//
// libcontainer has a function that does this. It blocks in open, in a thread
// that stays forever if the process dies meanwhile; here nothing blocks.

// startTick is how often Start looks whether the process is still one that
// waits. It matters only after a Start that was cut off between reading the byte
// and removing the FIFO.
const startTick = 100 * time.Millisecond

func fifoPath(c ociruntime.Container) string {
	return filepath.Join(c.StateDir, c.ID, "exec.fifo")
}

// Start lets the first process go.
func (d *driver) Start(ctx context.Context, c ociruntime.Container, first host.Process) error {
	process, err := first.Open()
	if err != nil {
		return errExited
	}
	defer process.Close()
	path := fifoPath(c)
	fifo, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return errStarted
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fifo)
	fault.Point("runtime.fifo-open")
	for {
		switch released, err := awaitByte(fifo, process); {
		case released:
			return os.Remove(path)
		case err != nil:
			return fmt.Errorf("exec fifo: %w", err)
		case process.Exited():
			return errExited
		case !isWaiting(first):
			return errStarted
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

var (
	errExited  = fmt.Errorf("its process has exited: %w", errdefs.ErrFailedPrecondition)
	errStarted = fmt.Errorf("it was started before: %w", errdefs.ErrFailedPrecondition)
)

// awaitByte waits for the byte, the end of the process or the next tick, and
// reports whether it was the byte.
func awaitByte(fifo int, process *host.Pidfd) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fifo), Events: unix.POLLIN}, {Fd: int32(process.Fd()), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, int(startTick.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
		return false, err
	}
	n, err := unix.Read(fifo, make([]byte, 1))
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return false, nil
	}
	return n == 1, err
}

// Started reports whether the first process is the user's.
func (d *driver) Started(_ context.Context, c ociruntime.Container, first host.Process) (bool, error) {
	_, err := os.Lstat(fifoPath(c))
	return err != nil || !isWaiting(first), nil
}

// isWaiting reports whether the process still bears the name libcontainer gives
// it. A program that the user runs may take the same name, to the harm of nobody
// but itself.
func isWaiting(p host.Process) bool {
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(p.Pid) + "/comm")
	return err == nil && string(comm) == "runc:[2:INIT]\n"
}
