package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/ociruntime"
)

const (
	// execRequestTimeout bounds how long a new connection may take to say what
	// it wants.
	execRequestTimeout = 10 * time.Second
	// execKillTimeout bounds how long a killed process may take to end.
	execKillTimeout = 10 * time.Second
)

// execTemplate is what config.json says of the container's first process, which
// further processes inherit.
type execTemplate struct {
	Process *specs.Process `json:"process"`
}

func (w *worker) serveExecs(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer conn.Close()
			x := &execution{w: w, conn: conn.(*countedConn).UnixConn}
			if err := x.run(); err != nil {
				// The caller may be gone, and then nobody needs to know.
				api.SendFrame(x.conn, &api.ExecReply{Code: uint32(api.Code(err)), Message: err.Error()})
			}
		}()
	}
}

// execution is one exec, attach or checkpoint, which lives no longer than its connection.
type execution struct {
	w    *worker
	conn *net.UnixConn
	req  api.ExecRequest
	c    *container
}

func (x *execution) run() error {
	x.conn.SetReadDeadline(time.Now().Add(execRequestTimeout))
	files, err := api.RecvFrame(x.conn, &x.req)
	if err != nil {
		return fmt.Errorf("exec: receive request: %w", err)
	}
	x.conn.SetReadDeadline(time.Time{})
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch {
	case x.req.Attach != nil:
		return x.attach()
	case x.req.Hold:
		return x.hold()
	case x.req.Checkpoint != nil:
		return x.checkpoint()
	}
	if len(x.req.Args) == 0 {
		return fmt.Errorf("exec in container %s: no command: %w", x.req.Id, errdefs.ErrInvalidArgument)
	}
	stdio, err := x.stdio(files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go x.watchCaller(cancel)

	if x.c, err = x.w.container(ctx, x.req.Id); err != nil {
		return fmt.Errorf("exec in %w", err)
	}
	if s := x.c.state(); s != keeper.Running {
		return fmt.Errorf("exec in container %s: it is %s: %w", x.c.id, s, errdefs.ErrFailedPrecondition)
	}
	if err := x.c.awaitResume(ctx); err != nil {
		return fmt.Errorf("exec in container %s: %w", x.c.id, err)
	}
	process, err := x.process()
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", x.c.id, err)
	}
	started, err := x.c.rt.Exec(ctx, x.c.name(), ociruntime.ExecRequest{Process: process, Stdio: stdio})
	if err != nil {
		return err
	}
	// The process has its own by now. Holding them here would keep readers waiting.
	for _, f := range files {
		f.Close()
	}
	files = nil
	return x.attend(ctx, started)
}

// watchCaller cancels the exec when the caller closes the connection.
func (x *execution) watchCaller(cancel context.CancelFunc) {
	defer cancel()
	io.Copy(io.Discard, x.conn)
}

// stdio puts the files that came into their places.
func (x *execution) stdio(files []*os.File) (ociruntime.Stdio, error) {
	var s ociruntime.Stdio
	want := 0
	for _, p := range []struct {
		given bool
		place **os.File
	}{{x.req.Stdin, &s.Stdin}, {x.req.Stdout, &s.Stdout}, {x.req.Stderr, &s.Stderr}} {
		if p.given {
			if want < len(files) {
				*p.place = files[want]
			}
			want++
		}
	}
	if want != len(files) {
		return s, fmt.Errorf("exec: %d files came, not %d: %w", len(files), want, errdefs.ErrInvalidArgument)
	}
	return s, nil
}

// process is the container's first process with other arguments.
func (x *execution) process() (*specs.Process, error) {
	t, err := x.c.execTemplate()
	if err != nil {
		return nil, err
	}
	p := *t.Process
	p.Args = x.req.Args
	p.Terminal = x.req.Terminal
	p.ConsoleSize = nil
	if p.Terminal && x.req.Width > 0 && x.req.Height > 0 {
		p.ConsoleSize = &specs.Box{Width: uint(x.req.Width), Height: uint(x.req.Height)}
	}
	return &p, nil
}

func (c *container) execTemplate() (*execTemplate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.template != nil {
		return c.template, nil
	}
	data, err := os.ReadFile(filepath.Join(c.req.Bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	var t execTemplate
	if err := json.Unmarshal(data, &t); err != nil {
		return nil, fmt.Errorf("read config.json of the bundle: %w", err)
	}
	if t.Process == nil {
		return nil, fmt.Errorf("config.json of the bundle has no process: %w", errdefs.ErrInvalidArgument)
	}
	c.template = &t
	return c.template, nil
}

// attend sees the process through its end.
func (x *execution) attend(ctx context.Context, started ociruntime.Started) error {
	if started.Console != nil {
		defer started.Console.Close()
	}
	fault.Point("worker.exec-started")
	e := execProcess{c: x.c, statusPath: x.c.path(fmt.Sprintf("exec-%d", started.Pid))}
	if err := e.identify(started); err != nil {
		return fmt.Errorf("exec in container %s: %w", x.c.id, err)
	}
	defer e.forget()
	fault.Point("worker.exec-watched")
	if started.Console != nil {
		// An error means that the caller is gone, which ends the wait below.
		api.SendFrame(x.conn, &api.ExecReply{Pid: int64(started.Pid)}, started.Console)
	}
	timedOut, err := e.wait(ctx, time.Duration(x.req.Timeout))
	if err != nil {
		return err
	}
	status, ok := exitStatus(e.process, e.pidfd, e.statusPath, statusTimeout)
	code := exitCode(status)
	if !ok {
		code = keeper.UnknownExitCode
	}
	fault.Point("worker.exec-ended")
	return api.SendFrame(x.conn, &api.ExecReply{Exited: true, ExitCode: code, TimedOut: timedOut})
}

// execProcess is the process of an exec.
type execProcess struct {
	c          *container
	process    host.Process
	pidfd      *host.Pidfd // nil if it was reaped before it could be looked at
	statusPath string
}

// identify takes hold of the process, and tells the supervisor that it is nothing
// without this worker.
func (e *execProcess) identify(started ociruntime.Started) (err error) {
	e.process, err = host.Identify(started.Pid)
	if errdefs.IsNotFound(err) && !started.Child {
		e.process = host.Process{Pid: started.Pid, Boot: host.BootID()}
	} else if err != nil {
		return err
	}
	if e.pidfd, err = e.process.Open(); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return e.c.w.tell(link.Message{Op: link.Watch, ID: e.c.id, Process: e.process, Path: e.statusPath, Kill: true}, nil)
}

// wait returns when the process has ended, by itself or killed because ctx ended
// or the timeout passed.
func (e *execProcess) wait(ctx context.Context, timeout time.Duration) (timedOut bool, err error) {
	if e.pidfd == nil {
		return false, nil
	}
	wait := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if err = e.pidfd.Wait(wait); err == nil {
		return false, nil
	}
	e.killTree()
	dead, cancel := context.WithTimeout(context.Background(), execKillTimeout)
	defer cancel()
	if kerr := e.pidfd.Wait(dead); kerr != nil {
		return true, fmt.Errorf("exec in container %s: process %d does not die: %w", e.c.id, e.process.Pid, errdefs.ErrUnavailable)
	}
	return ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded), nil
}

// forget lets go of the process.
func (e *execProcess) forget() {
	if e.pidfd != nil {
		host.Reap(e.pidfd.Child())
		e.pidfd.Close()
	}
	e.c.w.tell(link.Message{Op: link.Forget, Process: e.process}, nil)
	os.Remove(e.statusPath)
}
