package network

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestConflicts(t *testing.T) {
	tcp := func(ip string) PortMapping {
		m := PortMapping{Protocol: TCP, HostPort: 80, ContainerPort: 1}
		if ip != "" {
			m.HostIP = netip.MustParseAddr(ip)
		}
		return m
	}
	udp := tcp("")
	udp.Protocol = UDP
	other := tcp("")
	other.HostPort = 81
	for _, c := range []struct {
		a, b PortMapping
		want bool
	}{
		{tcp(""), tcp(""), true},
		{tcp(""), tcp("10.0.0.1"), true},
		{tcp(""), tcp("::"), true},
		{tcp("0.0.0.0"), tcp("10.0.0.1"), true},
		{tcp("0.0.0.0"), tcp("0.0.0.0"), true},
		{tcp("0.0.0.0"), tcp("::"), false},
		{tcp("0.0.0.0"), tcp("fd00::1"), false},
		{tcp("::"), tcp("fd00::1"), true},
		{tcp("10.0.0.1"), tcp("10.0.0.1"), true},
		{tcp("10.0.0.1"), tcp("10.0.0.2"), false},
		{tcp(""), udp, false},
		{tcp(""), other, false},
	} {
		if got := c.a.Conflicts(c.b); got != c.want {
			t.Errorf("%s and %s: got %v", c.a, c.b, got)
		}
		if got := c.b.Conflicts(c.a); got != c.want {
			t.Errorf("%s and %s: got %v", c.b, c.a, got)
		}
	}
}

func TestMapped(t *testing.T) {
	m := PortMapping{Protocol: TCP, HostPort: 80, ContainerPort: 1}
	in4, bare := m, m
	in4.HostIP = netip.MustParseAddr("::ffff:10.0.0.1")
	bare.HostPort = 0
	got := Pod{PortMappings: []PortMapping{m, m, bare, in4}}.Mapped()
	if len(got) != 2 || got[1].String() != "10.0.0.1:80/tcp" {
		t.Errorf("got %v", got)
	}
}

func TestBandwidth(t *testing.T) {
	for in, want := range map[string]uint64{
		"1k": 1000, "10M": 10_000_000, "1.5G": 1_500_000_000, "1Mi": 1 << 20, "2Gi": 2 << 30, "1000": 1000, "1e6": 1_000_000, "1P": 1e15,
		"": 0, "x": 0, "M": 0, "999": 0, "2P": 0, "-1M": 0, "0x10M": 0, "inf": 0, "nan": 0, "1m": 0, "1 M": 0,
	} {
		b, err := Pod{Annotations: map[string]string{ingressAnnotation: in}}.Bandwidth()
		if b.Ingress != want || (want == 0) != errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %d, %v; want %d", in, b.Ingress, err, want)
		}
	}
	if b, err := (Pod{}).Bandwidth(); b != (Bandwidth{}) || err != nil {
		t.Errorf("without annotations: %v, %v", b, err)
	}
}

func FuzzParseRate(f *testing.F) {
	f.Add("10M")
	f.Add("1e3")
	f.Fuzz(func(t *testing.T, s string) {
		if rate, err := parseRate(s); err == nil && (rate < 1e3 || rate > 1e15) {
			t.Errorf("%q: %d", s, rate)
		}
	})
}

func TestLocks(t *testing.T) {
	var (
		l    Locks
		busy [2]atomic.Bool
		wg   sync.WaitGroup
	)
	for i := range 40 {
		wg.Go(func() {
			pod := i % 2
			unlock, err := l.Lock(t.Context(), []string{"a", "b"}[pod])
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			if busy[pod].Swap(true) {
				t.Error("two at once")
			}
			time.Sleep(time.Millisecond)
			busy[pod].Store(false)
		})
	}
	wg.Wait()
	if len(l.locks) != 0 {
		t.Errorf("%d locks are left", len(l.locks))
	}
}

func TestLockGivesUp(t *testing.T) {
	var l Locks
	unlock, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	unlock()
	if len(l.locks) != 0 {
		t.Errorf("%d locks are left", len(l.locks))
	}
}

// note is a network that notes what it is asked.
type note struct {
	Network
	name string
	pods map[string]bool
	log  *[]string
}

func (n *note) Attach(_ context.Context, pod Pod) (Result, error) {
	*n.log = append(*n.log, n.name+" attach "+pod.ID)
	n.pods[pod.ID] = true
	return Result{}, nil
}

func (n *note) Detach(_ context.Context, id string) error {
	*n.log = append(*n.log, n.name+" detach "+id)
	delete(n.pods, id)
	return nil
}

func (n *note) Sweep(context.Context, func(string) bool) error {
	*n.log = append(*n.log, n.name+" sweep")
	return nil
}

func (n *note) Holds(id string) bool { return n.pods[id] }
func (n *note) Ready() error         { return errors.New(n.name) }
func (n *note) Close() error         { return nil }

func TestAuto(t *testing.T) {
	var log []string
	configured := false
	own := &note{name: "builtin", pods: make(map[string]bool), log: &log}
	cni := &note{name: "cni", pods: make(map[string]bool), log: &log}
	a := NewAuto(own, cni, func() bool { return configured })
	steps := []func() error{
		func() error { _, err := a.Attach(t.Context(), Pod{ID: "1"}); return err },
		func() error { configured = true; _, err := a.Attach(t.Context(), Pod{ID: "2"}); return err },
		func() error { _, err := a.Attach(t.Context(), Pod{ID: "1"}); return err }, // a retry
		func() error { configured = false; _, err := a.Attach(t.Context(), Pod{ID: "3"}); return err },
		func() error { return a.Detach(t.Context(), "1") },
		func() error { return a.Detach(t.Context(), "2") },
		func() error { return a.Sweep(t.Context(), nil) },
	}
	if a.Ready().Error() != "builtin" {
		t.Errorf("ready asks %s", a.Ready())
	}
	for i, step := range steps {
		if err := step(); err != nil {
			t.Errorf("step %d: %v", i, err)
		}
	}
	if a.Ready().Error() != "cni" {
		t.Errorf("ready asks %s", a.Ready())
	}
	got := strings.Join(log, "; ")
	const want = "builtin attach 1; cni attach 2; builtin attach 1; cni attach 3; builtin detach 1; cni detach 2; builtin sweep; cni sweep"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !a.Holds("3") || a.Holds("1") {
		t.Error("wrong about who holds what")
	}
}
