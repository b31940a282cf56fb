package stream

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"sampan.dev/sampan/internal/backlog"
	"sampan.dev/sampan/internal/keeper"
)

const (
	// attachLimit bounds the output that waits for one client, in bytes.
	attachLimit = 4 << 20
	// attachPatience is how long a container waits for a client: a terminal for
	// one that takes nothing, others for one that takes too little.
	attachPatience = time.Second
)

// attachSession is one attach. Its request's Tty is the container's.
type attachSession struct {
	session
	req *runtimeapi.AttachRequest
}

// AttachContainer is called by cri-streaming with the session's streams.
func (a *attachSession) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	return a.run(ctx, streams{in, out, errs, resize})
}

// run connects the streams to the container. Between the keeper and a client that
// may stop reading stands a backlog of bounded size.
func (a *attachSession) run(ctx context.Context, s streams) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := keeper.AttachRequest{ID: a.req.ContainerId}
	if a.req.Stdin {
		r.Stdin = s.in
	}
	var copies sync.WaitGroup
	var backlogs []*backlog.Pipe
	outputTo := func(client io.Writer) io.Writer {
		p := backlog.New(attachLimit, backlog.Patience{Most: attachPatience, Paced: a.req.Tty})
		backlogs = append(backlogs, p)
		copies.Go(func() {
			_, err := io.Copy(client, p)
			p.Close(err)
		})
		return p
	}
	if a.req.Stdout {
		r.Stdout = outputTo(s.out)
	}
	if a.req.Stderr {
		r.Stderr = outputTo(s.err)
	}
	if a.req.Tty {
		copies.Go(func() { a.followSize(ctx, s.resize) })
	}
	a.err = a.s.cfg.Pods.Attach(ctx, r)
	if errdefs.IsResourceExhausted(a.err) {
		a.err = fmt.Errorf("the client reads too slowly, the container's log has what it has missed: %w", a.err)
		hurry(ctx)
	}
	cancel()
	for _, p := range backlogs {
		p.Close(nil)
	}
	copies.Wait()
	return a.err
}

// followSize gives the container's terminal the sizes of the client's window.
func (a *attachSession) followSize(ctx context.Context, sizes <-chan remotecommand.TerminalSize) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if err := a.s.cfg.Pods.ResizeTerminal(ctx, a.req.ContainerId, size.Width, size.Height); err != nil {
				a.log.Debug("resize", "err", err)
			}
		case <-ctx.Done():
			return
		}
	}
}
