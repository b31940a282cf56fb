package stream

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	ticketLife = time.Minute
	maxTickets = 1000 // issued and not used yet
)

// tickets are promises to serve a request, each once and not for long. Whoever
// has one needs no other credential, so they cannot be guessed.
type tickets struct {
	mu  sync.Mutex
	all map[string]ticket
}

type ticket struct {
	request any
	expires time.Time
}

func (t *tickets) issue(request any) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if len(t.all) >= maxTickets {
		for name, other := range t.all {
			if now.After(other.expires) {
				delete(t.all, name)
			}
		}
	}
	if len(t.all) >= maxTickets {
		return "", fmt.Errorf("%d sessions were asked for and not begun: %w", maxTickets, errdefs.ErrResourceExhausted)
	}
	if t.all == nil {
		t.all = make(map[string]ticket)
	}
	name := rand.Text()
	t.all[name] = ticket{request, now.Add(ticketLife)}
	return name, nil
}

// redeem returns the request, or nil if the ticket is not good.
func (t *tickets) redeem(name string) any {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := t.all[name]
	delete(t.all, name)
	if time.Now().After(found.expires) {
		return nil
	}
	return found.request
}
