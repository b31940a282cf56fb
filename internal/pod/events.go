package pod

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// EventKind is what has happened to a pod or container. The kinds are in the
// order of a life.
type EventKind int

const (
	nothing      EventKind = iota // has happened yet
	EventCreated                  // it can be seen
	EventStarted                  // of a pod: it is ready, as soon as it can be seen
	EventStopped                  // it has exited; of a pod: it is not ready any more
	EventDeleted                  // it is gone
)

// Snapshot is a pod with all its containers.
type Snapshot struct {
	At         time.Time // all of it is at least so new
	Pod        Status
	Containers []ContainerStatus
}

// Event tells that something has happened to a pod or container, and how all of
// the pod was then. One that is deleted is not among the containers.
type Event struct {
	Kind EventKind
	ID   string // of the container; of the pod if it is the pod's own
	Snapshot
}

// maxQueued bounds the events that wait for one subscriber.
const maxQueued = 1024

// events is where transitions become known. Its lock is taken before all others,
// so nobody who holds one may announce anything. It is held for work in memory
// only: a subscriber who does not listen holds up nobody.
type events struct {
	mu          sync.Mutex
	subscribers map[*Subscription]struct{}
	ended       bool
}

// Subscription is one listener's queue of events, from the Subscribe on, after the
// exits that there have been: a listener that was away, as this process may have
// been, cannot know of them. Who lists after subscribing misses nothing.
//
// A listener who is too slow for the queue gets, instead of what did not fit,
// the deletions among it and then for each pod and container that there is the
// last event, so that it knows as much as if it had heard all.
type Subscription struct {
	pods  *Pods
	wake  chan struct{} // has room for one; guarded by events.mu are:
	queue []Event
	stale bool // events were left out
	lost  bool // deletions too
}

// Subscribe begins to collect events.
func (s *Pods) Subscribe() *Subscription {
	sub := &Subscription{pods: s, wake: make(chan struct{}, 1)}
	s.events.mu.Lock()
	defer s.events.mu.Unlock()
	if s.events.subscribers == nil {
		s.events.subscribers = make(map[*Subscription]struct{})
	}
	s.events.subscribers[sub] = struct{}{}
	for _, e := range s.lastEvents() {
		if e.Kind == EventStopped && e.ID != e.Pod.ID {
			sub.put(e)
		}
	}
	if s.events.ended {
		sub.wakeUp()
	}
	return sub
}

// EndEvents ends all subscriptions, also those to come, with ErrUnavailable.
func (s *Pods) EndEvents() {
	s.events.mu.Lock()
	defer s.events.mu.Unlock()
	s.events.ended = true
	for sub := range s.events.subscribers {
		sub.wakeUp()
	}
}

// Close ends the subscription.
func (sub *Subscription) Close() {
	sub.pods.events.mu.Lock()
	defer sub.pods.events.mu.Unlock()
	delete(sub.pods.events.subscribers, sub)
}

// Next waits for events and returns all there are, in their order. It fails with
// ErrAborted if the listener was so slow that not even the deletions fit, and
// has to subscribe and list anew.
func (sub *Subscription) Next(ctx context.Context) ([]Event, error) {
	select {
	case <-sub.wake:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	e := &sub.pods.events
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.ended:
		return nil, fmt.Errorf("events: the daemon stops: %w", errdefs.ErrUnavailable)
	case sub.lost:
		return nil, fmt.Errorf("events: more than %d deletions were not fetched; list, and ask for events again: %w", maxQueued, errdefs.ErrAborted)
	}
	queue := sub.queue
	if sub.stale {
		queue = append(queue, sub.pods.lastEvents()...)
	}
	sub.queue, sub.stale = nil, false
	return queue, nil
}

func (sub *Subscription) wakeUp() {
	select {
	case sub.wake <- struct{}{}:
	default: // it is awake already
	}
}

// put adds an event to the queue. Of a queue that is full only the deletions
// stay: all else can be told later by how things are then.
func (sub *Subscription) put(e Event) {
	defer sub.wakeUp()
	if len(sub.queue) >= maxQueued {
		sub.stale = true
		var deletions []Event
		for _, q := range sub.queue {
			if q.Kind == EventDeleted {
				deletions = append(deletions, q)
			}
		}
		sub.queue = deletions
	}
	switch {
	case sub.stale && e.Kind != EventDeleted:
	case len(sub.queue) >= maxQueued:
		sub.queue, sub.lost = nil, true
	default:
		sub.queue = append(sub.queue, e)
	}
}

// announceContainer tells the subscribers what has happened to a container since
// it was last announced. It is the one way for a container's events: called after
// each transition, it tells each event once and in order, whoever comes first.
func (s *Pods) announceContainer(c *Container) {
	s.events.mu.Lock()
	defer s.events.mu.Unlock()
	reached, started := s.containerReached(c)
	for kind := c.told + 1; kind <= reached; kind++ {
		if kind != EventStarted || started {
			s.publish(kind, c.ID, c.PodID, nil)
		}
	}
	c.told = max(c.told, reached)
}

// announcePod is announceContainer for pods.
func (s *Pods) announcePod(p *Pod) {
	s.events.mu.Lock()
	defer s.events.mu.Unlock()
	reached := s.podReached(p)
	for kind := p.told + 1; kind <= reached; kind++ {
		s.publish(kind, p.ID, p.ID, p)
	}
	p.told = max(p.told, reached)
}

// publish hands one event to all subscribers. The pod may be given if it is
// known; it may be gone.
func (s *Pods) publish(kind EventKind, id, podID string, p *Pod) {
	if len(s.events.subscribers) == 0 {
		return
	}
	if p == nil {
		s.mu.RLock()
		p = s.pods[podID]
		s.mu.RUnlock()
	}
	if p == nil {
		return // its deletion was the last event of all that was in it
	}
	e := Event{Kind: kind, ID: id, Snapshot: s.snapshot(p)}
	for sub := range s.events.subscribers {
		sub.put(e)
	}
}

// lastEvents returns the last event of each pod and container that there is.
func (s *Pods) lastEvents() []Event {
	var all []Event
	for _, p := range s.snapshotPods() {
		if p.told == nothing {
			continue
		}
		snapshot := s.snapshot(p)
		all = append(all, Event{p.told, p.ID, snapshot})
		for _, c := range s.containersOf(p.ID) {
			if c.told != nothing {
				all = append(all, Event{c.told, c.ID, snapshot})
			}
		}
	}
	return all
}

func (s *Pods) containerReached(c *Container) (kind EventKind, started bool) {
	s.mu.RLock()
	gone := s.containers[c.ID] != c
	s.mu.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	started = !c.startedAt.IsZero()
	switch {
	case c.state == Creating:
		return nothing, false
	case gone:
		return EventDeleted, started
	case c.exit != nil && !c.starting:
		return EventStopped, started
	case started:
		return EventStarted, true
	}
	return EventCreated, false
}

func (s *Pods) podReached(p *Pod) EventKind {
	s.mu.RLock()
	gone := s.pods[p.ID] != p
	s.mu.RUnlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.phase == making:
		return nothing
	case gone:
		return EventDeleted
	case p.phase == ready:
		return EventStarted
	}
	return EventStopped
}

// Snapshot returns the pod with this id, or whose id alone starts so, with its
// containers.
func (s *Pods) Snapshot(id string) (Snapshot, error) {
	p, err := s.pod(id)
	if err != nil {
		return Snapshot{}, err
	}
	return s.snapshot(p), nil
}

func (s *Pods) snapshot(p *Pod) Snapshot {
	snapshot := Snapshot{At: time.Now(), Pod: p.Status()}
	for _, c := range s.containersOf(p.ID) {
		if c.visible() {
			snapshot.Containers = append(snapshot.Containers, c.Status())
		}
	}
	return snapshot
}
