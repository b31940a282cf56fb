package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"google.golang.org/grpc/codes"

	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

// AttachRequest asks to see what a container writes from now on, and to write to
// its stdin.
type AttachRequest struct {
	ID string // of the container

	// Stdin, if not nil, is read to its end and passed on, or thrown away if the
	// container's stdin is not open. The end of it closes the container's stdin
	// if that was created with StdinOnce and is no terminal. A Read under way
	// when the attach ends is not waited for.
	Stdin io.Reader

	// Where the output goes; nil if it is not wanted. A terminal's is all Stdout.
	// Of output that they do not take, some MiB are kept; then the container
	// waits for seconds, and at last the attach ends with ErrResourceExhausted.
	// See package backlog.
	Stdout, Stderr io.Writer
}

// Attach connects to a container's first process until the container has exited
// and all its output was passed on, which is no error, or ctx ends. Without
// outputs it ends with Stdin.
//
// If the keeper's worker dies, the error is ErrUnavailable: the container goes on
// and its output is in the log. Attach again.
func (c *Client) Attach(ctx context.Context, r AttachRequest) error {
	return inWords("attach to container "+r.ID, c.attach(ctx, r))
}

func (c *Client) attach(ctx context.Context, r AttachRequest) error {
	conn, err := c.dial(ctx, link.ExecSocketName)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err = converseAttached(conn, r); err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

func converseAttached(conn *net.UnixConn, r AttachRequest) error {
	req := &api.ExecRequest{Id: r.ID, Attach: &api.AttachRequest{Stdin: r.Stdin != nil, Stdout: r.Stdout != nil, Stderr: r.Stderr != nil}}
	if err := api.SendFrame(conn, req); err != nil {
		return errors.Join(err, errLost)
	}
	var first api.AttachReply
	files, err := api.RecvFrame(conn, &first)
	if err != nil {
		return errors.Join(err, errLost)
	}
	if first.Code != uint32(codes.OK) {
		return api.Remote(codes.Code(first.Code), first.Message)
	}
	if r.Stdin != nil {
		var stdin *os.File
		if len(files) > 0 {
			stdin = files[0]
			defer stdin.Close()
		}
		go feed(conn, stdin, r.Stdin)
	}
	for {
		var m api.AttachReply
		if _, err := api.RecvFrame(conn, &m); err != nil {
			return errors.Join(err, errLost)
		}
		switch {
		case m.Code != uint32(codes.OK):
			return api.Remote(codes.Code(m.Code), m.Message)
		case m.Ended:
			return nil
		}
		if err := errors.Join(pass(r.Stdout, m.Stdout), pass(r.Stderr, m.Stderr)); err != nil {
			return fmt.Errorf("pass on output: %w", err)
		}
	}
}

func pass(w io.Writer, output []byte) error {
	if w == nil || len(output) == 0 {
		return nil
	}
	_, err := w.Write(output)
	return err
}

// feed passes input on to stdin, which may be nil, and tells the keeper when that
// is done.
func feed(conn *net.UnixConn, stdin *os.File, input io.Reader) {
	if stdin != nil {
		io.Copy(stdin, input)
		stdin.Close()
	}
	io.Copy(io.Discard, input) // of what the container does not take
	// An error means that the attach has ended.
	api.SendFrame(conn, &api.AttachInput{EndOfStdin: true})
}

// Resize tells a container's terminal how large its window is. The error is
// ErrFailedPrecondition if it has no terminal.
func (c *Client) Resize(ctx context.Context, id string, width, height uint16) error {
	return c.call(ctx, "resize container "+id, func(ctx context.Context, k api.KeeperClient) error {
		_, err := k.Resize(ctx, &api.ResizeRequest{Id: id, Width: uint32(width), Height: uint32(height)})
		return err
	})
}
