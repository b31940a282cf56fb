package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
)

const (
	clients = 3 // that work at the same time
	// rest is how many kills there are between two looks at what is left.
	rest = 25
	// betweenKills bounds the pauses.
	betweenKills = 400 * time.Millisecond
)

// TestRandom kills at random moments, while several clients run pods through
// their lives.
func TestRandom(t *testing.T) {
	lab.Require(t)
	rng := dice(t)
	kills := 25
	if *long {
		kills = 550
	}
	r := newRange(t, houses(t)[0])
	r.quiet = r.l.Mark(t)
	defer func() { r.print(t, r.k) }()
	for r.kills < kills && !t.Failed() {
		r.storm(t, rng)
	}
}

// storm lets clients work and kills what serves them, then waits for the clients
// to finish what they are at, and looks.
func (r *shooting) storm(t *testing.T, rng *rand.Rand) {
	t.Helper()
	var enough atomic.Bool
	var work sync.WaitGroup
	errs := make([]error, clients)
	lives := []func(*kubelet) error{life, sharedPID, otherLife}
	var runs atomic.Int64
	for i := range clients {
		work.Go(func() {
			for !enough.Load() && errs[i] == nil {
				if errs[i] = lives[i](r.k); errs[i] != nil {
					enough.Store(true)
				}
				runs.Add(1)
			}
		})
	}
	var log []string
	start := time.Now()
	for n := 0; n < rest && !enough.Load(); n++ {
		time.Sleep(time.Duration(rng.Int64N(int64(betweenKills))))
		who := r.killSomebody(t, rng)
		log = append(log, fmt.Sprintf("%v %s", time.Since(start).Round(time.Millisecond), who))
	}
	enough.Store(true)
	work.Wait()
	r.runs += int(runs.Load())
	err := errors.Join(errs...)
	if err == nil {
		err = r.settled()
	}
	if err == nil {
		err = r.l.LeftSince(r.quiet)
	}
	if err != nil {
		t.Errorf("%v\nkilled: %v", err, log)
	}
}

// killSomebody kills one process or all at once.
func (r *shooting) killSomebody(t *testing.T, rng *rand.Rand) string {
	t.Helper()
	who := []string{"daemon", "worker", "supervisor", "keeper", "all"}[rng.IntN(5)]
	roles := []string{who}
	switch who {
	case "keeper":
		roles = []string{"supervisor", "worker"}
	case "all":
		roles = []string{"daemon", "supervisor", "worker"}
		r.k.blackouts.Add(1)
	}
	for _, role := range roles {
		if err := r.k.kill(role); err != nil {
			t.Error(err)
		}
	}
	r.kills++
	return who
}
