package worker

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
)

// hold gives the caller what this keeper holds of a container. Where stdin ends
// with its first client, nobody else may keep it open.
func (x *execution) hold() error {
	ctx, cancel := context.WithTimeout(context.Background(), execRequestTimeout)
	defer cancel()
	c, err := x.w.container(ctx, x.req.Id)
	if err != nil {
		return fmt.Errorf("hold %w", err)
	}
	if c.state() == keeper.Exited {
		return fmt.Errorf("hold container %s: it has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	x.conn.SetWriteDeadline(time.Now().Add(execRequestTimeout))
	var reply api.HoldReply
	var files []*os.File
	c.mu.Lock()
	defer c.mu.Unlock() // until they are sent: they may be closed at any time
	for name, f := range c.files {
		if name != stdinName || !c.req.StdinOnce {
			reply.Names, files = append(reply.Names, name), append(files, f)
		}
	}
	return api.SendFrame(x.conn, &reply, files...)
}
