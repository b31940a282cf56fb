// Package crash kills Sampan's processes, at every fault point and at random, and
// looks whether anything is lost, doubled or left behind. It needs a build with
// fault points: `make crash`, and a short form within `make test`.
package crash

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) {
	flag.Parse()
	lab.Main(m, buildPrevious)
}

var (
	seed = flag.Uint64("crash.seed", 0, "of what is random; 0 takes one from the clock")
	long = flag.Bool("crash.long", false, "all that `make crash` does, not only the short form")
	only = flag.String("crash.only", "", "the kills to make, as a failure names them: SCENARIO:POINT:N:self|all, with commas between")
)

// dice are those of a test, and print how to throw them again.
func dice(t *testing.T) *rand.Rand {
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("again: go test ./test/crash -run '^%s$' -v -args -crash.seed=%d -crash.long=%t", t.Name(), s, *long)
	return rand.New(rand.NewPCG(s, 0))
}

// figures is what a test counts.
type figures struct {
	kills, runs int
}

func (f figures) print(t *testing.T, k *kubelet) {
	verdict := "lost 0, leaked 0" // each run has looked
	if t.Failed() {
		verdict = "what was lost or leaked is said above"
	}
	t.Logf("%d kills in %d runs, %d calls answered, %d asked again, %d containers ended unseen in a blackout: %s",
		f.kills, f.runs, k.calls.Load(), k.retries.Load(), k.unseen.Load(), verdict)
}

// TestPoints kills at the fault points. Each scenario runs first without a kill,
// which tells what points it passes and how often; a point that none passes is an
// error. Then it runs again and again, with a few points armed.
func TestPoints(t *testing.T) {
	lab.Require(t)
	rng := dice(t)
	points, err := sourcePoints("../../internal")
	if err != nil {
		t.Fatal(err)
	}
	passed, ran := map[string]bool{}, 0
	for _, h := range houses(t) {
		t.Run(h.name, func(t *testing.T) {
			ran++
			r := newRange(t, h)
			defer func() { r.print(t, r.k) }()
			shots := r.survey(t, passed)
			if *only != "" {
				shots = r.named(t)
			} else if !*long {
				rng.Shuffle(len(shots), func(i, j int) { shots[i], shots[j] = shots[j], shots[i] })
				shots = shots[:min(len(shots), h.short)]
			}
			r.shoot(t, shots)
		})
	}
	if t.Failed() || *only != "" || ran < len(houses(t)) {
		return
	}
	for _, p := range points {
		// Checkpoints need CRIU; TestCheckpointKilled of internal/keeper kills in one.
		if !passed[p] && !strings.HasPrefix(p, "record.checkpoint.") {
			t.Errorf("fault point %s: no scenario passes it", p)
		}
	}
	t.Logf("%d fault points", len(points))
}

// shooting is a house in which kills happen.
type shooting struct {
	figures
	house
	l         *lab.Lab
	k         *kubelet
	residents []*resident
	quiet     lab.Mark       // what is there between runs
	open      map[string]int // descriptors of a process in a role, when nothing had been killed
}

func newRange(t *testing.T, h house) *shooting {
	t.Helper()
	if err := resetFaults(); err != nil {
		t.Fatal(err)
	}
	l := lab.New(t, h.options)
	r := &shooting{house: h, l: l, k: newKubelet(t, l)}
	for _, image := range []string{"docker.io/sampan/lines", "busybox"} {
		l.Pull(t, image)
	}
	r.residents = startResidents(t, r.k)
	if err := r.settled(); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.open, err = r.k.descriptors(); err != nil {
		t.Fatal(err)
	}
	stop := l.KeepRunning(t)
	t.Cleanup(func() {
		if err := disarm(); err != nil {
			t.Error(err)
		}
		stop()
		l.AwaitAnswer(t)
	})
	return r
}

// survey runs every scenario without a kill and returns the shots that their
// points deserve: the first and the last passage of each, for one process and for
// all. What another scenario has passed already is left to it.
func (r *shooting) survey(t *testing.T, passed map[string]bool) []shot {
	t.Helper()
	var shots []shot
	for _, s := range r.scenarios {
		if err := resetFaults(); err != nil {
			t.Fatal(err)
		}
		r.quiet = r.l.Mark(t)
		r.runOne(t, s, nil)
		counts, err := passages()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range slices.Sorted(keys(counts)) {
			if passed[p] {
				continue
			}
			passed[p] = true
			shots = append(shots, shot{s.name, p, 1, false}, shot{s.name, p, 1, true})
			if counts[p] > 1 {
				shots = append(shots, shot{s.name, p, counts[p], false}, shot{s.name, p, counts[p], true})
			}
		}
	}
	return shots
}

func keys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// named returns the shots that -crash.only asks for in this house.
func (r *shooting) named(t *testing.T) []shot {
	t.Helper()
	var shots []shot
	for text := range strings.SplitSeq(*only, ",") {
		s, err := parseShot(text)
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(r.scenarios, func(have scenario) bool { return have.name == s.scenario }) {
			shots = append(shots, s)
		}
	}
	return shots
}

// batch is how many points are armed in one run.
const batch = 3

func (r *shooting) shoot(t *testing.T, shots []shot) {
	for _, s := range r.scenarios {
		var mine []shot
		for _, shot := range shots {
			if shot.scenario == s.name {
				mine = append(mine, shot)
			}
		}
		for len(mine) > 0 && !t.Failed() {
			var now []shot
			now, mine = take(mine)
			r.runOne(t, s, now)
		}
	}
}

// take splits off a few shots at different points.
func take(shots []shot) (now, rest []shot) {
	for _, s := range shots {
		if len(now) < batch && !slices.ContainsFunc(now, func(n shot) bool { return n.point == s.point }) {
			now = append(now, s)
		} else {
			rest = append(rest, s)
		}
	}
	return now, rest
}

// runOne runs a scenario with some points armed and looks at what has become of
// everything.
func (r *shooting) runOne(t *testing.T, s scenario, shots []shot) {
	t.Helper()
	r.runs++
	var names []string
	for _, shot := range shots {
		names = append(names, shot.String())
		if shot.all {
			r.k.armed.Add(1)
		}
		if err := errors.Join(shot.arm(), ignoreAbsent(os.Remove(filepath.Join(faultDir, "fired", shot.point)))); err != nil {
			t.Fatal(err)
		}
	}
	err := s.run(r.k)
	if err == nil {
		err = r.settled()
	}
	r.k.armed.Store(0)
	fired := slices.DeleteFunc(slices.Clone(shots), func(s shot) bool { return !s.fired() })
	r.kills += len(fired)
	if derr := disarm(); derr != nil {
		t.Fatal(derr)
	}
	if err == nil {
		err = errors.Join(r.l.LeftSince(r.quiet), r.sameDescriptors())
	}
	if err != nil {
		t.Errorf("%s: %v\nfired: %v\nagain: go test ./test/crash -run '^TestPoints$/^%s$' -v -args -crash.only=%s", s.name, err, fired, r.name, strings.Join(names, ","))
	}
}

// settled checks what must be so whoever died: the residents go on and nobody else
// is there.
func (r *shooting) settled() error {
	for _, resident := range r.residents {
		if err := resident.check(r.k); err != nil {
			return err
		}
	}
	if err := r.k.onlyResidents(); err != nil {
		return err
	}
	if err := r.l.Races(); err != nil {
		return err
	}
	if out, code := fsck(r.l); code != 0 {
		return fmt.Errorf("sampan fsck: exit code %d:\n%s", code, out)
	}
	return nil
}

// fsck is `sampan fsck` as soon as it finds nothing, or at last. A kill may have come a
// moment ago, and what keepers leave that were killed on their way out goes soon.
func fsck(l *lab.Lab) (out string, code int) {
	out, code = l.Fsck()
	for end := time.Now().Add(lab.Wait); code != 0 && time.Now().Before(end); time.Sleep(time.Second) {
		out, code = l.Fsck()
	}
	return out, code
}

// someDescriptors is by how many the number of a process' descriptors may differ from
// run to run: connections come and go. What leaks one for each kill has more soon.
const someDescriptors = 12

// sameDescriptors fails if a process has more open than at first. Those of a keeper
// go from process to process, so that what leaks stays.
func (r *shooting) sameDescriptors() error {
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * pause) {
		now, lerr := r.k.descriptors()
		if err = lerr; err != nil {
			return err
		}
		for role, n := range now {
			if n > r.open[role]+someDescriptors {
				err = fmt.Errorf("a %s has %d open descriptors, at first it was %d", role, n, r.open[role])
			}
		}
		if err == nil {
			return nil
		}
	}
	return err
}

// descriptors counts those of the process in each role that has most.
func (k *kubelet) descriptors() (map[string]int, error) {
	most := map[string]int{}
	for _, role := range []string{"daemon", "supervisor", "worker"} {
		pids, err := k.pids(role)
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			most[role] = max(most[role], len(open))
		}
	}
	return most, nil
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// onlyResidents looks for pods and containers that should not be there, in the
// daemon's lists and in the keepers'.
func (k *kubelet) onlyResidents() error {
	left, err := filepath.Glob(filepath.Join(k.l.State, "keepers", "*", "containers", "*"))
	if err == nil && len(left) != residents {
		// The daemon may be sweeping still.
		for end := time.Now().Add(5 * time.Second); err == nil && len(left) != residents && time.Now().Before(end); time.Sleep(pause) {
			left, err = filepath.Glob(filepath.Join(k.l.State, "keepers", "*", "containers", "*"))
		}
	}
	if err != nil {
		return err
	}
	if len(left) != residents {
		return fmt.Errorf("the keepers have %d containers, want those of %d residents: %s", len(left), residents, strings.Join(left, ", "))
	}
	return nil
}
