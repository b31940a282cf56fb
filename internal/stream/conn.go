package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"sampan.dev/sampan/internal/host"
)

const (
	// hurryTime is what a client has, once its session has ended, to take what
	// was sent last.
	hurryTime = 10 * time.Second
	// lingerTime is how long a connection stays half open for the client to close
	// it. What it still sends would else destroy what is on the way to it.
	lingerTime = time.Second
)

var errHangUp = errors.New("the client has hung up")

// listener's connections are conns.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{TCPConn: c.(*net.TCPConn), cancel: func(error) {}}, nil
}

// conn is a client's connection.
type conn struct {
	*net.TCPConn
	cancel context.CancelCauseFunc // of its requests
	hangup *host.Hangup
	once   sync.Once
}

// Close sends what was written, waits in the background for the client to close
// its side, and closes.
func (c *conn) Close() (err error) {
	c.once.Do(func() {
		c.cancel(net.ErrClosed)
		if c.hangup != nil {
			c.hangup.Close()
		}
		if err = c.TCPConn.CloseWrite(); err != nil {
			c.TCPConn.Close()
			return
		}
		go func() {
			defer c.TCPConn.Close()
			c.TCPConn.SetReadDeadline(time.Now().Add(lingerTime))
			io.Copy(io.Discard, c.TCPConn)
		}()
	})
	return err
}

type connKey struct{}

// watchClient gives a connection's requests a context that ends when the client
// hangs up.
func watchClient(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	own := c.(*conn)
	ctx, own.cancel = context.WithCancelCause(ctx)
	var err error
	if own.hangup, err = host.WatchHangup(own.TCPConn, func() { own.cancel(errHangUp); own.hurry() }); err != nil {
		own.cancel(err)
	}
	return context.WithValue(ctx, connKey{}, own)
}

// hurry bounds how long the client of a request may take for all that is written
// from now on and before.
func hurry(ctx context.Context) { ctx.Value(connKey{}).(*conn).hurry() }

func (c *conn) hurry() {
	c.SetWriteDeadline(time.Now().Add(hurryTime))
	time.AfterFunc(hurryTime, func() { c.Close() })
}
