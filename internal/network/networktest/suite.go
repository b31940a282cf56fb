package networktest

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"sampan.dev/sampan/internal/network"
)

// Subject is an implementation under test.
type Subject struct {
	Lab *Lab
	// Open opens the network on the same directory each time, with room for at
	// least 20 pods. Opened again, it is as in a new process.
	Open func(t *testing.T) network.Network
}

// Suite tests what the contract of network.Network promises.
func Suite(t *testing.T, newSubject func(t *testing.T) Subject) {
	for name, test := range map[string]func(*testing.T, Subject){
		"Traffic":             testTraffic,
		"AttachIsIdempotent":  testAttachIsIdempotent,
		"AttachFailureUndone": testAttachFailureUndone,
		"AttachInvalid":       testAttachInvalid,
		"AttachConcurrently":  testAttachConcurrently,
		"DetachIsIdempotent":  testDetachIsIdempotent,
		"DetachWithoutNetNS":  testDetachWithoutNetNS,
		"HostPort":            testHostPort,
		"HostPortConflict":    testHostPortConflict,
		"Sweep":               testSweep,
	} {
		t.Run(name, func(t *testing.T) { test(t, newSubject(t)) })
	}
}

func open(t *testing.T, s Subject) network.Network {
	t.Helper()
	n := s.Open(t)
	t.Cleanup(func() { n.Close() })
	if err := n.Ready(); err != nil {
		t.Fatalf("ready: %v", err)
	}
	return n
}

// Attach attaches a pod and detaches it when the test ends.
func Attach(t testing.TB, n network.Network, pod network.Pod) network.Result {
	t.Helper()
	res, err := n.Attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Detach(context.Background(), pod.ID); err != nil {
			t.Error(err)
		}
	})
	return res
}

func hostPort(a netip.Addr, port string) string { return net.JoinHostPort(a.String(), port) }

func testTraffic(t *testing.T, s Subject) {
	n := open(t, s)
	a, b := s.Lab.NewPod(t), s.Lab.NewPod(t)
	atA, atB := Attach(t, n, a), Attach(t, n, b)
	if len(atA.IPs) == 0 || atA.Interface == "" {
		t.Fatalf("incomplete result %+v", atA)
	}
	s.Lab.Serve(t, b.NetNS, "tcp", ":80", "b")
	for i, ip := range atB.IPs {
		s.Lab.MustAsk(t, a.NetNS, "tcp", hostPort(ip, "80"), "b saw "+atA.IPs[i].String())
		if _, err := s.Lab.Ask(s.Lab.Host, "tcp", hostPort(ip, "80")); err != nil {
			t.Errorf("from the host to %s: %v", ip, err)
		}
	}
	s.Lab.MustAsk(t, b.NetNS, "tcp", "127.0.0.1:80", "b saw 127.0.0.1")
	s.Lab.Serve(t, s.Lab.Outside, "tcp4", ":80", "outside")
	s.Lab.MustAsk(t, a.NetNS, "tcp", hostPort(Outside4, "80"), "outside saw "+Host4.String())

	if err := n.Detach(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	s.Lab.MustNotAsk(t, a.NetNS, "tcp", hostPort(atB.IPs[0], "80"))
}

func testAttachIsIdempotent(t *testing.T, s Subject) {
	n := open(t, s)
	pod := s.Lab.NewPod(t)
	first := Attach(t, n, pod)
	again, err := n.Attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("a second attach gives something else: %s", diff)
	}
	next := open(t, s)
	if !next.Holds(pod.ID) {
		t.Error("the next process does not know the pod")
	}
	again, err = next.Attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("an attach in the next process gives something else: %s", diff)
	}
	s.Lab.Serve(t, pod.NetNS, "tcp", ":80", "pod")
	if _, err := s.Lab.Ask(s.Lab.Host, "tcp", hostPort(first.IPs[0], "80")); err != nil {
		t.Error(err)
	}
}

func testAttachFailureUndone(t *testing.T, s Subject) {
	n := open(t, s)
	pod := s.Lab.NewPod(t, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	netns := pod.NetNS
	pod.NetNS += "-absent"
	if _, err := n.Attach(t.Context(), pod); err == nil {
		t.Fatal("a pod without a namespace is attached")
	}
	if n.Holds(pod.ID) {
		t.Error("a failed attach left a record")
	}
	pod.NetNS = netns
	Attach(t, n, pod)
}

func testAttachInvalid(t *testing.T, s Subject) {
	n := open(t, s)
	for name, spoil := range map[string]func(*network.Pod){
		"id":    func(p *network.Pod) { p.ID = "../x" },
		"netns": func(p *network.Pod) { p.NetNS = "" },
		"protocol": func(p *network.Pod) {
			p.PortMappings = []network.PortMapping{{Protocol: "dccp", ContainerPort: 1, HostPort: 1}}
		},
		"port": func(p *network.Pod) { p.PortMappings = []network.PortMapping{{Protocol: network.TCP, HostPort: 1}} },
		"twice": func(p *network.Pod) {
			p.PortMappings = []network.PortMapping{
				{Protocol: network.TCP, ContainerPort: 1, HostPort: 1},
				{Protocol: network.TCP, ContainerPort: 2, HostPort: 1},
			}
		},
	} {
		pod := s.Lab.NewPod(t)
		spoil(&pod)
		if _, err := n.Attach(t.Context(), pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want an invalid argument", name, err)
		}
	}
}

func testAttachConcurrently(t *testing.T, s Subject) {
	n := open(t, s)
	var (
		mu   sync.Mutex
		seen = make(map[netip.Addr]bool)
		wg   sync.WaitGroup
	)
	for range 10 {
		pod := s.Lab.NewPod(t)
		wg.Go(func() {
			res, err := n.Attach(t.Context(), pod)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, ip := range res.IPs {
				if seen[ip] {
					t.Errorf("%s is given twice", ip)
				}
				seen[ip] = true
			}
		})
		t.Cleanup(func() { n.Detach(context.Background(), pod.ID) })
	}
	wg.Wait()
}

func testDetachIsIdempotent(t *testing.T, s Subject) {
	n := open(t, s)
	pod := s.Lab.NewPod(t)
	if err := n.Detach(t.Context(), pod.ID); err != nil {
		t.Errorf("detach an unknown pod: %v", err)
	}
	Attach(t, n, pod)
	for range 2 {
		if err := n.Detach(t.Context(), pod.ID); err != nil {
			t.Error(err)
		}
	}
	Eventually(t, "the pod is forgotten", func() bool { return !n.Holds(pod.ID) })
}

func testDetachWithoutNetNS(t *testing.T, s Subject) {
	n := open(t, s)
	pod := s.Lab.NewPod(t)
	Attach(t, n, pod)
	s.Lab.Drop(t, pod.NetNS)
	if err := n.Detach(t.Context(), pod.ID); err != nil {
		t.Error(err)
	}
	Eventually(t, "the pod is forgotten", func() bool { return !n.Holds(pod.ID) })
}

func testHostPort(t *testing.T, s Subject) {
	n := open(t, s)
	pod := s.Lab.NewPod(t, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	Attach(t, n, pod)
	s.Lab.Serve(t, pod.NetNS, "tcp4", ":80", "pod")
	s.Lab.MustAsk(t, s.Lab.Outside, "tcp", hostPort(Host4, "8080"), "pod saw "+Outside4.String())
	for _, addr := range []string{"127.0.0.1:8080", hostPort(Host4, "8080")} {
		if _, err := s.Lab.Ask(s.Lab.Host, "tcp", addr); err != nil {
			t.Errorf("from the host to %s: %v", addr, err)
		}
	}
	if err := n.Detach(t.Context(), pod.ID); err != nil {
		t.Fatal(err)
	}
	s.Lab.MustNotAsk(t, s.Lab.Outside, "tcp", hostPort(Host4, "8080"))
}

func testHostPortConflict(t *testing.T, s Subject) {
	n := open(t, s)
	first := s.Lab.NewPod(t, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	second := s.Lab.NewPod(t, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	Attach(t, n, first)
	_, err := n.Attach(t.Context(), second)
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), first.Name) || !strings.Contains(err.Error(), "8080/tcp") {
		t.Errorf("got %v, want already exists with the holder's name and the port", err)
	}
	if n.Holds(second.ID) {
		t.Error("the refused pod is recorded")
	}
	if err := n.Detach(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	Attach(t, n, second) // the port is free at once
}

func testSweep(t *testing.T, s Subject) {
	n := open(t, s)
	dead, live := s.Lab.NewPod(t), s.Lab.NewPod(t)
	if _, err := n.Attach(t.Context(), dead); err != nil {
		t.Fatal(err)
	}
	at, err := n.Attach(t.Context(), live)
	if err != nil {
		t.Fatal(err)
	}
	n.Close()

	next := open(t, s)
	if err := next.Sweep(t.Context(), func(id string) bool { return id == live.ID }); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "the dead pod is forgotten", func() bool { return !next.Holds(dead.ID) })
	if !next.Holds(live.ID) {
		t.Error("the live pod was swept")
	}
	s.Lab.Serve(t, live.NetNS, "tcp", ":80", "live")
	if _, err := s.Lab.Ask(s.Lab.Host, "tcp", hostPort(at.IPs[0], "80")); err != nil {
		t.Errorf("the live pod does not answer: %v", err)
	}
	if err := next.Detach(t.Context(), live.ID); err != nil {
		t.Error(err)
	}
}
