package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc/codes"

	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

// Exec runs a further process in a container and waits for its end, but not for
// that of its children, even if they hold its stdio. When ctx ends, or the
// caller dies, the process is killed with its descendants.
//
// An exec whose keeper dies under it ends with ErrUnavailable; it is not made
// again, since nobody knows what it did already.
func (c *Client) Exec(ctx context.Context, r ExecRequest) (ExecResult, error) {
	res, err := c.exec(ctx, r)
	return res, inWords("exec in container "+r.ID, err)
}

func (c *Client) exec(ctx context.Context, r ExecRequest) (ExecResult, error) {
	if len(r.Args) == 0 {
		return ExecResult{}, fmt.Errorf("no arguments: %w", errInvalid)
	}
	conn, err := c.dial(ctx, link.ExecSocketName)
	if err != nil {
		return ExecResult{}, err
	}
	defer conn.Close()
	// Closing the connection is how the keeper learns that nobody waits.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	res, err := converse(conn, r)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return res, err
}

func converse(conn *net.UnixConn, r ExecRequest) (ExecResult, error) {
	req := &api.ExecRequest{
		Id: r.ID, Args: r.Args, Timeout: int64(r.Timeout),
		Terminal: r.Terminal, Width: uint32(r.Width), Height: uint32(r.Height),
	}
	var files []*os.File
	if !r.Terminal {
		req.Stdin, req.Stdout, req.Stderr = r.Stdin != nil, r.Stdout != nil, r.Stderr != nil
		for _, f := range []*os.File{r.Stdin, r.Stdout, r.Stderr} {
			if f != nil {
				files = append(files, f)
			}
		}
	}
	if err := api.SendFrame(conn, req, files...); err != nil {
		return ExecResult{}, errors.Join(err, errLost)
	}
	for {
		var reply api.ExecReply
		received, err := api.RecvFrame(conn, &reply)
		if err != nil {
			return ExecResult{}, errors.Join(err, errLost)
		}
		if len(received) > 0 {
			if r.OnConsole != nil {
				r.OnConsole(received[0])
			} else {
				received[0].Close()
			}
		}
		switch {
		case reply.Code != uint32(codes.OK):
			return ExecResult{}, api.Remote(codes.Code(reply.Code), reply.Message)
		case reply.Exited:
			return ExecResult{ExitCode: reply.ExitCode, TimedOut: reply.TimedOut}, nil
		}
	}
}
