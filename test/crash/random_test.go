package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/test/lab"
)

const (
	clients = 4 // that work at the same time
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
	defer func() {
		r.print(t, r.k)
		now, err := r.k.descriptors()
		t.Logf("open descriptors: %v at first, %v now (%v)", r.open, now, err)
	}()
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
	lives := []func(*kubelet) error{life, sharedPID, otherLife, terminal}
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
		err = errors.Join(r.l.LeftSince(r.quiet), r.sameDescriptors())
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
	}
	if alone, err := r.k.allHeldBy(roles); err != nil {
		t.Error(err)
	} else if alone {
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

// allHeldBy tells whether what a container writes, or how it ends, is lost if all
// processes in these roles die now: nobody else has it open. Whoever was started a
// moment ago, after other kills, does not yet.
func (k *kubelet) allHeldBy(roles []string) (bool, error) {
	held, elsewhere := map[string]bool{}, map[string]bool{}
	for _, role := range []string{"daemon", "supervisor", "worker"} {
		pids, err := k.pids(role)
		if err != nil {
			return false, err
		}
		for _, pid := range pids {
			for _, output := range k.outputs(pid) {
				held[output] = true
				if !slices.Contains(roles, role) {
					elsewhere[output] = true
				}
			}
		}
	}
	return len(held) == 0 || len(elsewhere) < len(held), nil
}

// outputs are the FIFOs and terminals of containers that a process has open.
func (k *kubelet) outputs(pid int) []string {
	var open []string
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // none of one that is gone
	for _, link := range links {
		path, err := os.Readlink(link)
		if err != nil {
			continue
		}
		switch filepath.Base(path) {
		case "stdout":
			open = append(open, path)
		case "ptmx": // each container has a file system of its own for terminals
			var st unix.Stat_t
			if unix.Stat(link, &st) == nil {
				open = append(open, fmt.Sprint("terminal of ", st.Dev))
			}
		}
	}
	return open
}
