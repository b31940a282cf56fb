package stream

import (
	"context"
	"fmt"
	"io"
	"time"
)

const (
	dialTime = 10 * time.Second // bounds connecting to a port of a pod
	// replyTime is how long a connection must last for cri-streaming to have
	// told the client that its streams are open. A reset before that is taken for
	// a broken session.
	replyTime = 50 * time.Millisecond
)

// forwardSession forwards any number of connections, one after the other and at
// once. What goes wrong with one is its own error.
type forwardSession struct {
	session
	ctx context.Context // ends when the client hangs up
}

// PortForward is called by cri-streaming for each of the session's connections.
func (f *forwardSession) PortForward(_ context.Context, podID, _ string, port int32, client io.ReadWriteCloser) error {
	if port < 1 || port > 1<<16-1 {
		return fmt.Errorf("port %d: it must be from 1 to 65535", port)
	}
	dial, cancel := context.WithTimeout(f.ctx, dialTime)
	defer cancel()
	server, err := f.s.cfg.Pods.Dial(dial, podID, uint16(port))
	if err != nil {
		f.log.Info("forward a connection", "port", port, "err", err)
		time.Sleep(replyTime)
		return err
	}
	defer server.Close()
	stop := context.AfterFunc(f.ctx, func() { server.Close() })
	defer stop()
	go func() {
		if _, err := io.Copy(server, client); err != nil {
			server.Close()
			return
		}
		// The client has said all, and may wait for an answer.
		if half, ok := server.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	}()
	if _, err := io.Copy(client, server); err != nil && f.ctx.Err() == nil && !isClosed(err) {
		return err
	}
	return nil
}

func isClosed(err error) bool { return ignoreClosed(err) == nil }
