package builtin

import (
	"context"
	"slices"
	"sync"
	"time"
)

// caretaker is the network's background work. It sees to it that the links of
// leaving pods go, with the pods' namespaces or else by its own hand, and gives
// their addresses back afterwards. And it looks now and then whether what all
// pods share is still there.
type caretaker struct {
	n      *Network
	cancel context.CancelFunc
	done   chan struct{}
	wake   chan struct{} // holds one token: there are newcomers

	mu        sync.Mutex
	newcomers []*record
}

const (
	firstLook = 20 * time.Millisecond // after a leaving pod; a namespace takes about so long to go
	lastLook  = 2 * time.Second       // the longest pause between looks at leaving pods
	patience  = 1 * time.Second       // before a link is deleted although its namespace lives
	rounds    = 5 * time.Second       // between looks at what pods share
)

func startCaretaker(n *Network, leaving []*record) *caretaker {
	ctx, cancel := context.WithCancel(context.Background())
	c := &caretaker{n: n, cancel: cancel, done: make(chan struct{}), wake: make(chan struct{}, 1)}
	for _, r := range leaving {
		c.add(r)
	}
	go c.run(ctx)
	return c
}

// stop waits until nothing runs any more. Pods that are still leaving go on
// leaving in the next process.
func (c *caretaker) stop() {
	c.cancel()
	<-c.done
}

// add takes charge of a leaving pod. It does not wait.
func (c *caretaker) add(r *record) {
	c.mu.Lock()
	c.newcomers = append(c.newcomers, r)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// leaver is a leaving pod and when it came.
type leaver struct {
	*record
	since time.Time
}

func (c *caretaker) run(ctx context.Context) {
	defer close(c.done)
	var waiting []leaver
	pause := firstLook
	look := time.NewTimer(rounds)
	defer look.Stop()
	round := time.NewTicker(rounds)
	defer round.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-round.C:
			c.restore()
		case <-c.wake:
			waiting = append(waiting, c.welcome()...)
			pause = firstLook
			look.Reset(pause)
		case <-look.C:
			waiting = slices.DeleteFunc(waiting, func(l leaver) bool { return ctx.Err() == nil && c.gone(l) })
			if len(waiting) > 0 {
				pause = min(2*pause, lastLook)
				look.Reset(pause)
			}
		}
	}
}

func (c *caretaker) welcome() []leaver {
	c.mu.Lock()
	defer c.mu.Unlock()
	var leavers []leaver
	for _, r := range c.newcomers {
		leavers = append(leavers, leaver{r, time.Now()})
	}
	c.newcomers = nil
	return leavers
}

// gone reports whether nothing of the pod is left and it is forgotten.
func (c *caretaker) gone(l leaver) bool {
	gone, err := c.n.host.unplugged(l.record)
	if err == nil && !gone && time.Since(l.since) < patience {
		return false
	}
	if err == nil {
		err = c.n.remove(l.record)
	}
	if err != nil {
		c.n.log.Warn("pod cannot leave the network yet", "pod", l.Pod, "err", err)
	}
	return err == nil
}

// restore repairs the shared set-up, if there is one, or tries again what
// failed.
func (c *caretaker) restore() {
	c.n.mu.Lock()
	wanted, before := c.n.setUp != nil || c.n.trouble != nil, c.n.trouble
	c.n.mu.Unlock()
	if !wanted {
		return
	}
	if _, err := c.n.prepare(); err != nil && before == nil {
		c.n.log.Warn("network set-up is incomplete", "err", err)
	}
}
