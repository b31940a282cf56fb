package pod

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
)

// keepers holds a connection to every keeper that has a pod, and one goroutine
// each that follows what happens to its containers.
type keepers struct {
	dial   func(ctx context.Context, name string) (Keeper, error)
	follow func(ctx context.Context, name string, k Keeper)
	needs  func(podID string) bool // whether there is such a pod still

	mu     sync.Mutex
	closed chan struct{} // closed by close, under mu
	all    map[string]*keeperConn
	work   sync.WaitGroup
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
	conn := k.enter(ctx, name, podID)
	select {
	case <-conn.dialed:
		return conn.keeper, conn.err
	case <-ctx.Done():
		return nil, fmt.Errorf("connect to keeper %s: %w", name, context.Cause(ctx))
	}
}

// enter notes that a pod needs a keeper, and begins to connect if need be.
func (k *keepers) enter(ctx context.Context, name, podID string) *keeperConn {
	k.mu.Lock()
	defer k.mu.Unlock()
	conn, ok := k.all[name]
	if !ok && k.isClosed() {
		conn = &keeperConn{dialed: make(chan struct{}), err: fmt.Errorf("keeper %s: the daemon stops: %w", name, errdefs.ErrUnavailable)}
		close(conn.dialed)
		return conn
	}
	if !ok {
		conn = &keeperConn{dialed: make(chan struct{}), pods: make(map[string]bool)}
		k.all[name] = conn
		k.work.Go(func() { k.connect(context.WithoutCancel(ctx), name, conn) })
	}
	conn.pods[podID] = true
	return conn
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
		return
	}
	select {
	case <-time.After(redialPause):
		k.redial(ctx, name, conn)
	case <-k.closed:
	}
}

// redialPause is how long a keeper that did not start is left alone.
const redialPause = time.Second

// redial connects anew for the pods that a failed connection was for: those that
// are still there have nobody else who would, and their containers nobody who
// reads their output.
func (k *keepers) redial(ctx context.Context, name string, failed *keeperConn) {
	k.mu.Lock()
	var waiting []string
	for podID := range failed.pods {
		if k.needs(podID) {
			waiting = append(waiting, podID)
		}
	}
	k.mu.Unlock()
	for _, podID := range waiting {
		k.enter(ctx, name, podID)
	}
}

func (k *keepers) isClosed() bool {
	select {
	case <-k.closed:
		return true
	default:
		return false
	}
}

// leave says that a pod is gone. A keeper of one pod, or of an earlier version,
// is let go with its last pod: it ends by itself then, and leave reports it.
func (k *keepers) leave(name, podID string) (last bool) {
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
	return conn != nil
}

// close lets go of all keepers and waits for the followers. Containers go on.
func (k *keepers) close() {
	k.mu.Lock()
	if !k.isClosed() {
		close(k.closed)
	}
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
	connected := 0
	err := k.Watch(ctx,
		func(all []keeper.ContainerState) {
			if connected++; connected > 1 {
				s.reconnects.Add(1)
			}
			s.reconcile(ctx, name, k, all)
		},
		func(e keeper.Event) { s.onExit(e.ID, e.Exit) })
	if ctx.Err() == nil {
		s.log.Error("keeper is no longer followed", "keeper", name, "err", err)
	}
}
