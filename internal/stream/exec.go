package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"sampan.dev/sampan/internal/keeper"
)

// sizeTime is how long an exec waits for its client to say how large its window
// is, so that the process has the right size from the start.
const sizeTime = 10 * time.Millisecond

// terminalTail is how long the terminal of a process that has exited is read when
// others have it open.
const terminalTail = 200 * time.Millisecond

// execSession is one exec.
type execSession struct {
	session
	req *runtimeapi.ExecRequest
}

// ExecInContainer is called by cri-streaming with the session's streams.
func (e *execSession) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return e.run(ctx, streams{in, out, errs, resize})
}

// streams are a session's. Those that were not asked for may be nil or not.
type streams struct {
	in     io.Reader
	out    io.Writer
	err    io.Writer
	resize <-chan remotecommand.TerminalSize
}

// run runs the process. Its error is an exitError if the process ran and failed.
func (e *execSession) run(ctx context.Context, s streams) error {
	r := keeper.ExecRequest{ID: e.req.ContainerId, Args: e.req.Cmd}
	var res keeper.ExecResult
	if e.req.Tty {
		res, e.err = e.runInTerminal(ctx, s, r)
	} else {
		res, e.err = e.runWithPipes(ctx, s, r)
	}
	if e.err == nil && res.ExitCode != 0 {
		return exitError(res.ExitCode)
	}
	return e.err
}

func (e *execSession) runWithPipes(ctx context.Context, s streams, r keeper.ExecRequest) (keeper.ExecResult, error) {
	if e.req.Stdin {
		in, err := newPipe(0)
		if err != nil {
			return keeper.ExecResult{}, err
		}
		defer in.close()
		r.Stdin = in.theirs
		go func() { // until the process has ended or the stream
			io.Copy(in.ours, s.in)
			in.ours.Close()
		}()
	}
	var outlets []*outlet
	for _, o := range []struct {
		wanted bool
		to     io.Writer
		file   **os.File
	}{{e.req.Stdout, s.out, &r.Stdout}, {e.req.Stderr, s.err, &r.Stderr}} {
		if !o.wanted {
			continue
		}
		p, err := newPipe(1)
		if err != nil {
			return keeper.ExecResult{}, err
		}
		defer p.close()
		*o.file = p.theirs
		outlets = append(outlets, startOutlet(p.ours, o.to))
	}
	res, err := e.s.cfg.Pods.Exec(ctx, r)
	for _, o := range outlets {
		o.finish(0)
	}
	return res, err
}

func (e *execSession) runInTerminal(ctx context.Context, s streams, r keeper.ExecRequest) (keeper.ExecResult, error) {
	r.Terminal = true
	select {
	case size := <-s.resize:
		r.Width, r.Height = size.Width, size.Height
	case <-time.After(sizeTime):
	}
	ended := make(chan struct{})
	var terminal *os.File
	var out *outlet
	var resizes sync.WaitGroup
	r.OnConsole = func(master *os.File) {
		terminal = master
		if e.req.Stdout {
			out = startOutlet(master, s.out)
		} else {
			out = startOutlet(master, io.Discard)
		}
		if e.req.Stdin {
			go feedTerminal(master, s.in)
		}
		resizes.Go(func() { followSize(master, s.resize, ended) })
	}
	res, err := e.s.cfg.Pods.Exec(ctx, r)
	close(ended)
	resizes.Wait()
	if terminal != nil {
		out.finish(terminalTail)
		terminal.Close()
	}
	return res, err
}

// feedTerminal passes input on. Its end is what a user types to say so, if the
// terminal is in a mode in which that has a meaning.
func feedTerminal(master *os.File, in io.Reader) {
	if _, err := io.Copy(master, in); err != nil {
		return
	}
	conn, err := master.SyscallConn()
	if err != nil {
		return
	}
	var eof byte
	conn.Control(func(fd uintptr) {
		if t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS); err == nil && t.Lflag&unix.ICANON != 0 {
			eof = t.Cc[unix.VEOF]
		}
	})
	if eof != 0 {
		master.Write([]byte{eof})
	}
}

// followSize gives the terminal the sizes of the client's window.
func followSize(master *os.File, sizes <-chan remotecommand.TerminalSize, ended <-chan struct{}) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if conn, err := master.SyscallConn(); err == nil {
				conn.Control(func(fd uintptr) {
					unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: size.Width, Row: size.Height})
				})
			}
		case <-ended:
			return
		}
	}
}

// exitError is the exit code of a process, as cri-streaming knows it.
type exitError int32

func (e exitError) Error() string   { return fmt.Sprintf("exit status %d", int32(e)) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }

// pipe is a pipe between a process and us.
type pipe struct{ ours, theirs *os.File }

// newPipe makes a pipe whose end theirs is the process' standard file fd. Only
// our end does not block.
func newPipe(fd int) (pipe, error) {
	var fds [2]int // reading, writing
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return pipe{}, os.NewSyscallError("pipe", err)
	}
	ours, theirs := fds[1], fds[0]
	if fd > 0 {
		ours, theirs = theirs, ours
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		unix.Close(ours)
		unix.Close(theirs)
		return pipe{}, os.NewSyscallError("fcntl", err)
	}
	return pipe{os.NewFile(uintptr(ours), "pipe"), os.NewFile(uintptr(theirs), "pipe")}, nil
}

func (p pipe) close() {
	p.ours.Close()
	p.theirs.Close()
}

// outlet copies what a process writes to its client.
type outlet struct {
	from *os.File
	to   io.Writer
	done chan struct{} // closed when it has ended
}

func startOutlet(from *os.File, to io.Writer) *outlet {
	o := &outlet{from: from, to: to, done: make(chan struct{})}
	go o.run()
	return o
}

func (o *outlet) run() {
	defer close(o.done)
	buf := make([]byte, 32<<10)
	for {
		n, err := o.from.Read(buf)
		o.pass(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf)
		}
		if err != nil {
			return
		}
	}
}

// maxRest bounds, in bytes, what drain reads from a pipe that others go on
// filling.
const maxRest = 1 << 20

// drain passes on what is there, without waiting for more.
func (o *outlet) drain(buf []byte) {
	conn, err := o.from.SyscallConn()
	if err != nil {
		return
	}
	for rest := 0; rest < maxRest; {
		n := 0
		conn.Control(func(fd uintptr) {
			if n, err = unix.Read(int(fd), buf); errors.Is(err, unix.EINTR) {
				n, err = 0, nil
			}
		})
		if err != nil || n == 0 {
			return
		}
		rest += n
		o.pass(buf[:n])
	}
}

// pass writes to the client. When that fails the client is gone or has closed
// this stream, and the process goes on as if it had not.
func (o *outlet) pass(b []byte) {
	if len(b) > 0 {
		o.to.Write(b)
	}
}

// finish is called when the process has ended. It returns when everything the
// process wrote is passed on, and waits as long as tail for more from others.
func (o *outlet) finish(tail time.Duration) {
	select {
	case <-o.done:
	case <-time.After(tail):
		o.from.SetReadDeadline(time.Unix(1, 0))
		<-o.done
	}
}
