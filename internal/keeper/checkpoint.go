package keeper

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/codes"

	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

// Checkpoint pauses running containers, all of them, and writes a checkpoint of
// each into its directory. It then calls meanwhile, while they are still paused,
// and returns when they go on. They do in any case: when ctx ends, when something
// fails, when this process dies, and when the keeper does. On error there may be
// half a checkpoint.
//
// When ctx ends it takes a moment until CRIU has let go of the processes. It is
// waited for, so that they do run when Checkpoint returns.
func (c *Client) Checkpoint(ctx context.Context, r CheckpointRequest, meanwhile func(context.Context) error) error {
	return inWords("checkpoint", c.checkpoint(ctx, r, meanwhile))
}

func (c *Client) checkpoint(ctx context.Context, r CheckpointRequest, meanwhile func(context.Context) error) error {
	if len(r.Targets) == 0 {
		return errInvalid
	}
	conn, err := c.dial(ctx, link.ExecSocketName)
	if err != nil {
		return err
	}
	defer conn.Close()
	req := &api.CheckpointRequest{Criu: r.CRIU}
	for _, t := range r.Targets {
		req.Targets = append(req.Targets, &api.CheckpointTarget{Id: t.ID, Dir: t.Dir})
	}
	if err := api.SendFrame(conn, &api.ExecRequest{Checkpoint: req}); err != nil {
		return errors.Join(err, errLost)
	}
	// Half the connection stays, to hear that the containers go on.
	stop := context.AfterFunc(ctx, func() { conn.CloseWrite() })
	defer stop()
	err = checkpointReply(conn)
	if err == nil {
		err = errors.Join(meanwhile(ctx), conn.CloseWrite(), checkpointReply(conn))
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func checkpointReply(conn *net.UnixConn) error {
	var m api.CheckpointReply
	if _, err := api.RecvFrame(conn, &m); err != nil {
		return errors.Join(err, errLost)
	}
	if m.Code != uint32(codes.OK) {
		return api.Remote(codes.Code(m.Code), m.Message)
	}
	return nil
}
