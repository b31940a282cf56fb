// Package flight joins callers who want the same work done at the same time:
// the first one starts it, the others wait for its result.
//
// The work belongs to nobody in particular. It does not end when the caller who
// started it goes away, but when the last one who waits for it does, or, with a
// Limit, not even then. The package knows nothing of what the work is.
package flight

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Group joins work by key. The zero Group is ready for use.
type Group[K comparable, V any] struct {
	// Limit, if positive, lets work go on when nobody waits for it any more, so
	// that a later caller finds it under way, and bounds how long it may take.
	Limit time.Duration

	// Linger makes the last caller who leaves wait until the work it abandons
	// has wound down, for work that must have left nothing behind by then.
	Linger bool

	mu    sync.Mutex
	calls map[K]*call[V]
}

type call[V any] struct {
	cancel  context.CancelFunc
	done    chan struct{} // closed when value and err are set
	waiters int           // guarded by Group.mu
	value   V
	err     error
}

// Do returns the result of work for key. If such work is under way the caller
// joins it and its own work function is not used. Work gets a context with the
// values of the starter's, without its deadline, which is cancelled when nobody
// waits any more. When ctx ends first, Do returns its cause at once.
//
// The next Do for a key whose work was abandoned starts afresh; abandoned work
// may still be winding down then. Unless Linger is set, nobody waits for that.
func (g *Group[K, V]) Do(ctx context.Context, key K, work func(context.Context) (V, error)) (V, error) {
	c := g.join(ctx, key, work)
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
		if abandoned := g.leave(key, c); abandoned && g.Linger {
			<-c.done
		}
		var none V
		return none, context.Cause(ctx)
	}
}

// Len is how much work is under way.
func (g *Group[K, V]) Len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.calls)
}

// join finds the call for key or starts it, and counts the caller in.
func (g *Group[K, V]) join(ctx context.Context, key K, work func(context.Context) (V, error)) *call[V] {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c, ok := g.calls[key]; ok {
		c.waiters++
		return c
	}
	workCtx, cancel := g.workContext(ctx)
	c := &call[V]{cancel: cancel, done: make(chan struct{}), waiters: 1}
	if g.calls == nil {
		g.calls = make(map[K]*call[V])
	}
	g.calls[key] = c
	go g.run(workCtx, key, c, work)
	return c
}

func (g *Group[K, V]) run(ctx context.Context, key K, c *call[V], work func(context.Context) (V, error)) {
	defer func() {
		if p := recover(); p != nil {
			c.err = fmt.Errorf("panic: %v", p)
		}
		g.mu.Lock()
		g.forget(key, c)
		g.mu.Unlock()
		c.cancel()
		close(c.done)
	}()
	c.value, c.err = work(ctx)
}

// leave counts a caller out. The last one to go abandons the work, unless it may
// go on: leave reports whether that is so.
func (g *Group[K, V]) leave(key K, c *call[V]) (abandoned bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.waiters--; c.waiters > 0 || g.Limit > 0 {
		return false
	}
	g.forget(key, c)
	c.cancel()
	return true
}

// forget drops c from the table unless a later call has taken its place. The
// caller holds g.mu.
func (g *Group[K, V]) forget(key K, c *call[V]) {
	if g.calls[key] == c {
		delete(g.calls, key)
	}
}

func (g *Group[K, V]) workContext(ctx context.Context) (context.Context, context.CancelFunc) {
	if g.Limit > 0 {
		return context.WithTimeout(context.WithoutCancel(ctx), g.Limit)
	}
	return context.WithCancel(context.WithoutCancel(ctx))
}
