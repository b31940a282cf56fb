package worker

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/keeper/logs"
	"sampan.dev/sampan/internal/ociruntime"
)

// The names of the files that a container and its keepers share: FIFOs in the
// container's directory, and the master of its pty. The supervisor holds the
// keeper's ends of them, and, as processName, the handle of the first process.
const (
	stdinName   = "stdin"
	stdoutName  = link.StdoutName
	stderrName  = link.StderrName
	consoleName = "console"
)

// stdio is the container's ends.
type stdio struct{ in, out, err *os.File }

func (s stdio) close() {
	for _, f := range []*os.File{s.in, s.out, s.err} {
		if f != nil {
			f.Close()
		}
	}
}

func (s stdio) forProcess(terminal bool) ociruntime.Stdio {
	if terminal {
		return ociruntime.Stdio{}
	}
	return ociruntime.Stdio{Stdin: s.in, Stdout: s.out, Stderr: s.err}
}

// openStdio makes the FIFOs, opens the keeper's ends, has the supervisor hold
// them, and returns the container's ends. Those of its outputs are open for
// reading too, so that a write neither fails nor raises SIGPIPE while no keeper is
// there. With a terminal, stdout is the FIFO that the pty's output goes through.
func (c *container) openStdio() (s stdio, err error) {
	if s.out, err = c.openOutput(stdoutName); err != nil {
		return s, err
	}
	if c.req.Terminal {
		return s, nil
	}
	if s.err, err = c.openOutput(stderrName); err != nil {
		return s, err
	}
	if c.req.Stdin {
		s.in, err = c.openInput()
	}
	return s, err
}

func (c *container) openOutput(name string) (*os.File, error) {
	if err := mkfifo(c.path(name)); err != nil {
		return nil, err
	}
	reader, err := logs.OpenFIFO(c.path(name))
	if err != nil {
		return nil, err
	}
	if err := c.hold(name, reader); err != nil {
		return nil, err
	}
	return openBlocking(c.path(name), unix.O_RDWR)
}

func (c *container) openInput() (*os.File, error) {
	if err := mkfifo(c.path(stdinName)); err != nil {
		return nil, err
	}
	// Open for reading too, which no FIFO makes wait.
	fd, err := unix.Open(c.path(stdinName), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: c.path(stdinName), Err: err}
	}
	both := os.NewFile(uintptr(fd), stdinName)
	defer both.Close()
	if fd, err = unix.Open(c.path(stdinName), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return nil, &os.PathError{Op: "open", Path: c.path(stdinName), Err: err}
	}
	if err := c.hold(stdinName, os.NewFile(uintptr(fd), stdinName)); err != nil {
		return nil, err
	}
	return openBlocking(c.path(stdinName), unix.O_RDONLY)
}

func mkfifo(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return nil
}

// openBlocking opens a FIFO whose other end is open.
func openBlocking(path string, mode int) (*os.File, error) {
	fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// reopenStdio opens the keeper's ends that no supervisor held.
func (c *container) reopenStdio() error {
	for _, name := range []string{stdoutName, stderrName} {
		if c.files[name] != nil {
			continue
		}
		f, err := logs.OpenFIFO(c.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := c.hold(name, f); err != nil {
			return err
		}
	}
	return nil
}

// hold keeps f, and has the supervisor do the same.
func (c *container) hold(name string, f *os.File) error {
	c.mu.Lock()
	c.files[name] = f
	c.mu.Unlock()
	return c.w.tell(link.Message{Op: link.Hold, ID: c.id, Name: name}, f)
}

// letGo closes the container's files, here and at the supervisor.
func (c *container) letGo() {
	c.w.tell(link.Message{Op: link.Release, ID: c.id}, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, f := range c.files {
		f.Close()
		delete(c.files, name)
	}
}

// closeStdin closes the keeper's end of stdin for good: the supervisor's first,
// so that no later worker has it again.
func (c *container) closeStdin() {
	c.mu.Lock()
	f := c.files[stdinName]
	delete(c.files, stdinName)
	c.mu.Unlock()
	if f != nil {
		c.w.tell(link.Message{Op: link.Release, ID: c.id, Name: stdinName}, nil)
		f.Close()
	}
}

// startRelay begins to move what the terminal shows into the stdout FIFO. When it
// returns the FIFO has a writer, and the log's pump does not take it for closed.
func (c *container) startRelay() error {
	out, err := openBlocking(c.path(stdoutName), unix.O_WRONLY)
	if err != nil {
		return err
	}
	console, err := c.files[consoleName].SyscallConn()
	if err != nil {
		out.Close()
		return err
	}
	c.relayed = make(chan struct{})
	go func() {
		defer close(c.relayed)
		defer out.Close()
		c.relay(console, out)
	}()
	return nil
}

// relay moves output within the kernel: when this process is killed, it is in
// the terminal or in the FIFO.
func (c *container) relay(console syscall.RawConn, out *os.File) {
	for pause := relayPauseMin; ; {
		ended := c.pidfd == nil || c.pidfd.Exited()
		n := spliceConsole(console, out)
		switch {
		case n > 0:
			pause = relayPauseMin
		case ended:
			return
		default:
			// Nobody has the terminal open, but somebody may open it again: the
			// container's own setup does just that.
			time.Sleep(pause)
			pause = min(2*pause, relayPauseMax)
		}
	}
}

const (
	relayPauseMin = time.Millisecond
	relayPauseMax = 100 * time.Millisecond
	relayMost     = 64 << 10 // bytes moved at once
)

// spliceConsole waits for what the terminal shows next and moves it. It returns
// 0 when nobody has the terminal open.
func spliceConsole(console syscall.RawConn, out *os.File) (n int64) {
	var err error
	rerr := console.Read(func(fd uintptr) bool {
		// Waits only for room in the FIFO: the terminal does not block.
		n, err = unix.Splice(int(fd), nil, int(out.Fd()), nil, relayMost, 0)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
	if rerr != nil || err != nil {
		return 0
	}
	return n
}
