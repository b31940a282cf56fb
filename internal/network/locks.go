package network

import (
	"context"
	"sync"
)

// Locks is a set of locks named by pod IDs. The zero value is ready to use.
type Locks struct {
	mu    sync.Mutex
	locks map[string]*podLock
}

type podLock struct {
	held    chan struct{} // full while somebody holds the lock
	holders int           // who holds it or waits for it
}

// Lock waits for the pod's lock and returns the function that releases it, or
// the context's error.
func (l *Locks) Lock(ctx context.Context, podID string) (unlock func(), err error) {
	l.mu.Lock()
	lock := l.locks[podID]
	if lock == nil {
		if l.locks == nil {
			l.locks = make(map[string]*podLock)
		}
		lock = &podLock{held: make(chan struct{}, 1)}
		l.locks[podID] = lock
	}
	lock.holders++
	l.mu.Unlock()

	select {
	case lock.held <- struct{}{}:
		return func() { <-lock.held; l.drop(podID, lock) }, nil
	case <-ctx.Done():
		l.drop(podID, lock)
		return nil, ctx.Err()
	}
}

func (l *Locks) drop(podID string, lock *podLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lock.holders--; lock.holders == 0 {
		delete(l.locks, podID)
	}
}
