package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/backlog"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/logs"
)

const (
	// attachLimit bounds the output that waits for one attached caller, in bytes.
	attachLimit = 4 << 20
	// attachPatience is how long output waits for a caller that does not take it.
	// It is longer than the caller's own, who knows better what to do then.
	attachPatience = 3 * time.Second
	// attachLinger bounds how long a caller may take for the last output.
	attachLinger = time.Minute
	// attachFrame is how much output goes into one message, in bytes.
	attachFrame = 64 << 10
)

// attachments are those who see a container's output as it comes.
type attachments struct {
	mu    sync.Mutex
	all   map[*attachment]struct{}
	ended bool // there is no more output
}

// attachment is one of them. What it does not want is nil.
type attachment struct {
	outputs [2]*backlog.Pipe // by logs.Stream
	conn    *net.UnixConn
	sending sync.Mutex    // held while a message is sent
	done    chan struct{} // closed when nothing comes any more
}

// add is false if there is no more output to see.
func (as *attachments) add(a *attachment) bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.ended {
		return false
	}
	if as.all == nil {
		as.all = map[*attachment]struct{}{}
	}
	as.all[a] = struct{}{}
	return true
}

// remove ends an attachment, if it has not ended.
func (as *attachments) remove(a *attachment) {
	as.mu.Lock()
	defer as.mu.Unlock()
	if _, ok := as.all[a]; ok {
		delete(as.all, a)
		a.close()
	}
}

// end ends all attachments once they have sent what they have.
func (as *attachments) end() {
	as.mu.Lock()
	defer as.mu.Unlock()
	as.ended = true
	for a := range as.all {
		delete(as.all, a)
		a.close()
	}
}

// show is a log's tap.
func (as *attachments) show(s logs.Stream, output []byte) {
	as.mu.Lock()
	wanted := make([]*backlog.Pipe, 0, len(as.all))
	for a := range as.all {
		if p := a.outputs[s]; p != nil {
			wanted = append(wanted, p)
		}
	}
	as.mu.Unlock()
	for _, p := range wanted {
		p.Write(output) // whoever falls behind learns it from the pipe
	}
}

func (a *attachment) close() {
	for _, p := range a.outputs {
		if p != nil {
			p.Close(nil)
		}
	}
	a.conn.SetWriteDeadline(time.Now().Add(attachLinger))
	close(a.done)
}

// attach shows the container's output to the caller until it ends or the caller
// leaves.
func (x *execution) attach() error {
	ctx, cancel := context.WithTimeout(context.Background(), execRequestTimeout)
	defer cancel()
	var err error
	if x.c, err = x.w.container(ctx, x.req.Id); err != nil {
		return fmt.Errorf("attach to %w", err)
	}
	a := &attachment{conn: x.conn, done: make(chan struct{})}
	want, patience := x.req.Attach, backlog.Patience{Most: attachPatience, Paced: x.c.req.Terminal}
	for s, wanted := range [2]bool{logs.Stdout: want.Stdout, logs.Stderr: want.Stderr} {
		if wanted {
			a.outputs[s] = backlog.New(attachLimit, patience)
		}
	}
	if x.c.state() == keeper.Exited || !x.c.attached.add(a) {
		return fmt.Errorf("attach to container %s: it has exited: %w", x.c.id, errdefs.ErrFailedPrecondition)
	}
	defer x.c.attached.remove(a)
	if err := a.send(&api.AttachReply{}, x.c.inputFor(want)...); err != nil {
		return err
	}
	go x.watchInput(a)
	if err := a.sendOutputs(); err != nil {
		return fmt.Errorf("attach to container %s: %w", x.c.id, err)
	}
	<-a.done
	return a.send(&api.AttachReply{Ended: true})
}

// inputFor returns the end of stdin that an attached caller writes to.
func (c *container) inputFor(want *api.AttachRequest) []*os.File {
	if !want.Stdin {
		return nil
	}
	name := stdinName
	if c.req.Terminal && c.req.Stdin {
		name = consoleName
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.files[name]; f != nil {
		return []*os.File{f}
	}
	return nil
}

// sendOutputs sends what comes out of the pipes until they end.
func (a *attachment) sendOutputs() error {
	var errs [len(a.outputs)]error
	var senders sync.WaitGroup
	for s, p := range a.outputs {
		if p != nil {
			senders.Go(func() { errs[s] = a.sendOutput(logs.Stream(s), p) })
		}
	}
	senders.Wait()
	return errors.Join(errs[:]...)
}

func (a *attachment) sendOutput(s logs.Stream, p *backlog.Pipe) error {
	buf := make([]byte, attachFrame)
	for {
		n, err := p.Read(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			a.conn.SetWriteDeadline(time.Now().Add(attachLinger))
			return err
		}
		m := &api.AttachReply{Stdout: buf[:n]}
		if s == logs.Stderr {
			m = &api.AttachReply{Stderr: buf[:n]}
		}
		if err := a.send(m); err != nil {
			p.Close(err)
			return err
		}
	}
}

func (a *attachment) send(m *api.AttachReply, files ...*os.File) error {
	a.sending.Lock()
	defer a.sending.Unlock()
	return api.SendFrame(a.conn, m, files...)
}

// watchInput waits for the end of what the caller has to say. Then, or when it
// leaves before, stdin has had its client.
func (x *execution) watchInput(a *attachment) {
	var in api.AttachInput
	_, err := api.RecvFrame(x.conn, &in)
	if x.req.Attach.Stdin && x.c.req.StdinOnce && !x.c.req.Terminal {
		x.c.closeStdin()
	}
	if err == nil && (x.req.Attach.Stdout || x.req.Attach.Stderr) {
		io.Copy(io.Discard, x.conn) // until it leaves
	}
	x.c.attached.remove(a)
}

// resize tells the container's terminal how large its window is.
func (c *container) resize(width, height uint32) error {
	c.mu.Lock()
	console := c.files[consoleName]
	c.mu.Unlock()
	if console == nil {
		return fmt.Errorf("resize container %s: it has no terminal, or has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	conn, err := console.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize container %s: %w", c.id, err)
	}
	size := &unix.Winsize{Col: uint16(min(width, 1<<16-1)), Row: uint16(min(height, 1<<16-1))}
	cerr := conn.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) })
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("resize container %s: %w", c.id, err)
	}
	return nil
}
