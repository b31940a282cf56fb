package keeper

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

// holdTimeout bounds how long asking for a container's files may take.
const holdTimeout = 10 * time.Second

// hold gets duplicates of what the keeper holds of a container: its FIFOs, its
// terminal, the handle of its process. If both of the keeper's processes die, the
// container's last output and exit status are in them, and the next keeper gets
// them when it is started. Without them a container goes on all the same.
func (c *Client) hold(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), holdTimeout)
	defer cancel()
	if !c.beginHold(id) {
		return
	}
	files, err := c.fetchHeld(ctx, id)
	if err != nil {
		c.log.Debug("container is not held", "container", id, "err", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch _, wanted := c.held[id]; {
	case !wanted: // it has ended meanwhile
		closeHeld(files)
	case err != nil:
		delete(c.held, id)
	default:
		c.held[id] = files
	}
}

// beginHold makes a place for a container's files, unless there is one.
func (c *Client) beginHold(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.held[id]; ok || c.closed {
		return false
	}
	c.held[id] = nil
	return true
}

func (c *Client) fetchHeld(ctx context.Context, id string) (map[string]*os.File, error) {
	conn, err := dialUnix(ctx, c.cfg.Dir, link.ExecSocketName)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := api.SendFrame(conn, &api.ExecRequest{Id: id, Hold: true}); err != nil {
		return nil, err
	}
	var reply api.HoldReply
	received, err := api.RecvFrame(conn, &reply)
	if err != nil {
		return nil, err
	}
	files := make(map[string]*os.File, len(received))
	for i, f := range received {
		if i < len(reply.Names) {
			files[reply.Names[i]] = f
		} else {
			f.Close()
		}
	}
	if reply.Code != uint32(codes.OK) || len(files) < len(reply.Names) {
		closeHeld(files)
		return nil, fmt.Errorf("%d of %d files came: %w", len(files), len(reply.Names), api.Remote(codes.Code(reply.Code), reply.Message))
	}
	return files, nil
}

// letGo closes what is held of a container that has ended.
func (c *Client) letGo(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	closeHeld(c.held[id])
	delete(c.held, id)
}

// holdAll brings what is held up to date with the keeper's list.
func (c *Client) holdAll(ctx context.Context, all []ContainerState) {
	alive := make(map[string]bool, len(all))
	for _, s := range all {
		alive[s.ID] = s.State != Exited
	}
	c.mu.Lock()
	var missing []string
	for id := range alive {
		if _, ok := c.held[id]; !ok && alive[id] {
			missing = append(missing, id)
		}
	}
	for id, files := range c.held {
		if !alive[id] {
			closeHeld(files)
			delete(c.held, id)
		}
	}
	c.mu.Unlock()
	for _, id := range missing {
		c.hold(ctx, id)
	}
}

// withHeld calls fn with a list of what is held, as a new keeper will have it, and
// the files in this order. They stay the client's, and open while fn runs.
func (c *Client) withHeld(fn func(held []link.HeldFD, files []*os.File) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var held []link.HeldFD
	var files []*os.File
	for _, id := range slices.Sorted(maps.Keys(c.held)) {
		for name, f := range c.held[id] {
			held = append(held, link.HeldFD{ID: id, Name: name, FD: link.FirstHeldFD + len(files)})
			files = append(files, f)
		}
	}
	return fn(held, files)
}

func closeHeld(files map[string]*os.File) {
	for _, f := range files {
		f.Close()
	}
}
