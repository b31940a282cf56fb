package pod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
)

// collect returns n events, in words.
func collect(t *testing.T, sub *Subscription, names map[string]string, n int) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var all []string
	var last time.Time
	for len(all) < n {
		events, err := sub.Next(ctx)
		if err != nil {
			t.Fatalf("after %v: %v", all, err)
		}
		for _, e := range events {
			if e.At.Before(last) || e.Pod.ID == "" {
				t.Errorf("event %+v: at %v, after one at %v", e, e.At, last)
			}
			last = e.At
			word := fmt.Sprintf("%s %s", names[e.ID], [...]string{"nothing", "created", "started", "stopped", "deleted"}[e.Kind])
			for _, c := range e.Containers {
				word += fmt.Sprintf(", %s is %v", names[c.ID], c.State)
			}
			all = append(all, word)
		}
	}
	return all
}

func TestEventsOfALife(t *testing.T) {
	l := newLab(t)
	s := l.start()
	sub := s.Subscribe()
	defer sub.Close()
	id := must[string](t)
	p := id(s.Run(t.Context(), podNamed("a"), ""))
	c := id(s.CreateContainer(t.Context(), p, containerNamed("c")))
	names := map[string]string{p: "pod", c: "c"}
	check := func(want ...string) {
		t.Helper()
		if got := collect(t, sub, names, len(want)); !slices.Equal(got, want) {
			t.Fatalf("events\n%q, want\n%q", got, want)
		}
	}
	check("pod created", "pod started", "c created, c is created")
	if err := s.StartContainer(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	check("c started, c is running")
	l.keeper.exit(c, keeper.Exit{Code: 3, FinishedAt: time.Now()})
	check("c stopped, c is exited")
	for range 2 { // the second time nothing happens
		if err := errors.Join(s.RemoveContainer(t.Context(), c), s.Stop(t.Context(), p)); err != nil {
			t.Fatal(err)
		}
	}
	check("c deleted", "pod stopped")
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	check("pod deleted")
	s.EndEvents()
	if _, err := sub.Next(t.Context()); !errdefs.IsUnavailable(err) {
		t.Fatalf("after the end: %v", err)
	}
}

// TestExitsBeforeSubscribe: who listens from now on hears of the exits before,
// those that this process has not seen among them.
func TestExitsBeforeSubscribe(t *testing.T) {
	l := newLab(t)
	s := l.start()
	id := must[string](t)
	p := id(s.Run(t.Context(), podNamed("a"), ""))
	names := map[string]string{p: "pod"}
	for _, name := range []string{"before", "meanwhile", "running"} {
		c := id(s.CreateContainer(t.Context(), p, containerNamed(name)))
		names[c] = name
		if err := s.StartContainer(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	exit := func(name string) {
		for c, n := range names {
			if n == name {
				l.keeper.exit(c, keeper.Exit{Code: 3, FinishedAt: time.Now()})
			}
		}
	}
	exit("before")
	sub := s.Subscribe()
	for collect(t, sub, names, 1)[0][:len("before stopped")] != "before stopped" {
	}
	sub.Close()
	s.Close()
	exit("meanwhile")
	s = l.start()
	sub = s.Subscribe()
	defer sub.Close()
	got := collect(t, sub, names, 2)
	slices.Sort(got)
	for i, want := range []string{"before stopped", "meanwhile stopped"} {
		if got[i][:len(want)] != want {
			t.Errorf("event %d: %s, want %s", i, got[i], want)
		}
	}
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// A force removal tells the end before the deletion; what failed to be made is
// never heard of.
func TestEventsOfShortLives(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	c := must[string](t)(s.CreateContainer(t.Context(), p, containerNamed("c")))
	sub := s.Subscribe()
	defer sub.Close()
	l.layers.fail = errdefs.ErrResourceExhausted
	if _, err := s.CreateContainer(t.Context(), p, containerNamed("d")); err == nil {
		t.Fatal("no error")
	}
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	names := map[string]string{p: "pod", c: "c"}
	got := collect(t, sub, names, 4)
	slices.Sort(got)
	want := []string{"c deleted", "c stopped, c is exited", "pod deleted", "pod stopped, c is created"}
	if !slices.Equal(got, want) {
		t.Fatalf("events %q, want %q", got, want)
	}
}

// The exit may be known before the keeper has answered the start.
func TestExitBeforeStartIsAnswered(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	id := must[string](t)(s.CreateContainer(t.Context(), p, containerNamed("c")))
	sub := s.Subscribe()
	defer sub.Close()
	c, _ := s.container(id)
	_, err := c.start(func() (time.Time, error) {
		l.keeper.exit(id, keeper.Exit{FinishedAt: time.Now()})
		return time.Now(), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.announceContainer(c)
	got := collect(t, sub, map[string]string{id: "c"}, 2)
	if want := []string{"c started, c is exited", "c stopped, c is exited"}; !slices.Equal(got, want) {
		t.Fatalf("events %q, want %q", got, want)
	}
}

// Who does not listen holds up nobody, and knows everything once he listens again.
func TestSlowSubscriber(t *testing.T) {
	l := newLab(t)
	s := l.start()
	slow := s.Subscribe()
	defer slow.Close()
	kept := must[string](t)(s.Run(t.Context(), podNamed("kept"), ""))
	running := must[string](t)(s.CreateContainer(t.Context(), kept, containerNamed("running")))
	if err := s.StartContainer(t.Context(), running); err != nil {
		t.Fatal(err)
	}
	var gone []string
	for i := range maxQueued / 5 { // five events each
		c := must[string](t)(s.CreateContainer(t.Context(), kept, containerNamed(fmt.Sprint(i))))
		if err := errors.Join(s.StartContainer(t.Context(), c), s.RemoveContainer(t.Context(), c)); err != nil {
			t.Fatal(err)
		}
		gone = append(gone, c)
	}
	late := must[string](t)(s.CreateContainer(t.Context(), kept, containerNamed("late")))
	for i := range 60 {
		c := must[string](t)(s.CreateContainer(t.Context(), kept, containerNamed(fmt.Sprint("more", i))))
		if err := errors.Join(s.StartContainer(t.Context(), c), s.RemoveContainer(t.Context(), c)); err != nil {
			t.Fatal(err)
		}
		gone = append(gone, c)
	}
	events, err := slow.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	last := make(map[string]EventKind)
	for _, e := range events {
		if last[e.ID] == EventDeleted {
			t.Fatalf("%v after its deletion", e)
		}
		last[e.ID] = e.Kind
	}
	for _, c := range gone {
		if last[c] != EventDeleted {
			t.Fatalf("last event of a removed container: %v", last[c])
		}
	}
	if last[kept] != EventStarted || last[running] != EventStarted || last[late] != EventCreated || len(events) > 2*maxQueued {
		t.Fatalf("pod %v, running %v, late %v; %d events", last[kept], last[running], last[late], len(events))
	}
	if slow.stale || len(slow.queue) > 0 {
		t.Fatal("still behind")
	}
}

func TestSubscriberLosesDeletions(t *testing.T) {
	sub := &Subscription{pods: &Pods{}, wake: make(chan struct{}, 1)}
	for range maxQueued {
		sub.put(Event{Kind: EventDeleted})
		sub.put(Event{Kind: EventCreated})
	}
	if len(sub.queue) > maxQueued || sub.lost {
		t.Fatalf("%d in the queue, lost: %v", len(sub.queue), sub.lost)
	}
	sub.put(Event{Kind: EventDeleted})
	if _, err := sub.Next(t.Context()); !errdefs.IsAborted(err) {
		t.Fatalf("got %v", err)
	}
}

func TestNextEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := (&Pods{}).Subscribe().Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

// Many at once: every subscriber hears each event once, in the order of a life.
func TestEventsAtOnce(t *testing.T) {
	l := newLab(t)
	s := l.start()
	subs := []*Subscription{s.Subscribe(), s.Subscribe()}
	const pods = 40
	var wg sync.WaitGroup
	for i := range pods {
		wg.Go(func() {
			p, err := s.Run(t.Context(), podNamed(fmt.Sprint(i)), "")
			if err != nil {
				t.Error(err)
				return
			}
			c, err := s.CreateContainer(t.Context(), p, containerNamed("c"))
			if err == nil {
				err = s.StartContainer(t.Context(), c)
			}
			if err = errors.Join(err, s.Remove(t.Context(), p)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, sub := range subs {
		heard := make(map[string]EventKind)
		n := 0
		for n < pods*8 {
			events, err := sub.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				if e.Kind != heard[e.ID]+1 {
					t.Fatalf("event %d after %d", e.Kind, heard[e.ID])
				}
				heard[e.ID] = e.Kind
			}
			n += len(events)
		}
		if n != pods*8 {
			t.Fatalf("%d events, want %d", n, pods*8)
		}
		sub.Close()
	}
}
