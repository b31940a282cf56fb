package pod

import (
	"context"
	"fmt"
	"sync"

	"sampan.dev/sampan/internal/keeper"
)

// keepers holds a connection to every keeper that has a pod, and one goroutine
// each that follows what happens to its containers.
type keepers struct {
	dial   func(ctx context.Context, name string) (Keeper, error)
	follow func(ctx context.Context, name string, k Keeper)

	mu   sync.Mutex
	all  map[string]*keeperConn
	work sync.WaitGroup
}

type keeperConn struct {
	dialed chan struct{} // closed when keeper and err are set
	keeper Keeper
	err    error
	cancel context.CancelFunc // ends the follower
	pods   map[string]bool    // who needs it; see leave
}

// get returns the keeper called name for the pod, connecting if need be.
func (k *keepers) get(ctx context.Context, name, podID string) (Keeper, error) {
	k.mu.Lock()
	conn, ok := k.all[name]
	if !ok {
		conn = &keeperConn{dialed: make(chan struct{}), pods: make(map[string]bool)}
		k.all[name] = conn
		k.work.Go(func() { k.connect(context.WithoutCancel(ctx), name, conn) })
	}
	conn.pods[podID] = true
	k.mu.Unlock()
	select {
	case <-conn.dialed:
		return conn.keeper, conn.err
	case <-ctx.Done():
		return nil, fmt.Errorf("connect to keeper %s: %w", name, context.Cause(ctx))
	}
}

func (k *keepers) connect(ctx context.Context, name string, conn *keeperConn) {
	dialCtx, cancelDial := context.WithTimeout(ctx, maxUndo)
	defer cancelDial()
	conn.keeper, conn.err = k.dial(dialCtx, name)
	followCtx, cancel := context.WithCancel(ctx)
	conn.cancel = cancel
	k.mu.Lock()
	if conn.err != nil {
		delete(k.all, name) // the next get tries again
		cancel()
	}
	k.mu.Unlock()
	close(conn.dialed)
	if conn.err == nil {
		k.follow(followCtx, name, conn.keeper)
	}
}

// leave says that a pod is gone. A keeper of one pod, or of an earlier version,
// is let go with its last pod; it ends by itself then.
func (k *keepers) leave(name, podID string) {
	k.mu.Lock()
	conn := k.all[name]
	if conn != nil {
		delete(conn.pods, podID)
		if len(conn.pods) > 0 {
			conn = nil
		} else {
			delete(k.all, name)
		}
	}
	k.mu.Unlock()
	if conn != nil {
		<-conn.dialed
		conn.close()
	}
}

// close lets go of all keepers and waits for the followers. Containers go on.
func (k *keepers) close() {
	k.mu.Lock()
	all := k.all
	k.all = make(map[string]*keeperConn)
	k.mu.Unlock()
	for _, conn := range all {
		<-conn.dialed
		conn.close()
	}
	k.work.Wait()
}

func (c *keeperConn) close() {
	if c.err == nil {
		c.cancel()
		c.keeper.Close()
	}
}

// keeper returns the keeper that has the pod's containers.
func (s *Pods) keeper(ctx context.Context, p *Pod) (Keeper, error) {
	return s.keepers.get(ctx, p.Keeper, p.ID)
}

// follow keeps the containers of one keeper up to date until ctx ends.
func (s *Pods) follow(ctx context.Context, name string, k Keeper) {
	err := k.Watch(ctx,
		func(all []keeper.ContainerState) { s.reconcile(ctx, name, k, all) },
		func(e keeper.Event) { s.onExit(e.ID, e.Exit) })
	if ctx.Err() == nil {
		s.log.Error("keeper is no longer followed", "keeper", name, "err", err)
	}
}
