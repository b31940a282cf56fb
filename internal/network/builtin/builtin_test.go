package builtin

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
	"sampan.dev/sampan/internal/state"
)

var (
	subnet4 = netip.MustParsePrefix("10.88.0.0/16")
	subnet6 = netip.MustParsePrefix("fd00:88::/64")
)

// openIn opens a network in a lab until the test ends.
func openIn(t testing.TB, lab *networktest.Lab, dir string, subnets ...netip.Prefix) *Network {
	t.Helper()
	n, err := Open(Config{Dir: dir, State: filepath.Join(dir, "state"), Subnets: subnets, NetNS: lab.Host, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestSuite(t *testing.T) {
	networktest.Suite(t, func(t *testing.T) networktest.Subject {
		lab, dir := networktest.NewLab(t), t.TempDir()
		return networktest.Subject{Lab: lab, Open: func(t *testing.T) network.Network {
			return openIn(t, lab, dir, subnet4, subnet6)
		}}
	})
}

func refuse(t *testing.T, err error, is func(error) bool, words ...string) {
	t.Helper()
	if err == nil || !is(err) {
		t.Fatalf("got %v, want another kind of error", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

func TestSingleVersion(t *testing.T) {
	for name, subnet := range map[string]netip.Prefix{"IPv4": subnet4, "IPv6": subnet6} {
		t.Run(name, func(t *testing.T) {
			lab := networktest.NewLab(t)
			n := openIn(t, lab, t.TempDir(), subnet)
			pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
			at := networktest.Attach(t, n, pod)
			if len(at.IPs) != 1 || !subnet.Contains(at.IPs[0]) {
				t.Fatalf("got %v", at.IPs)
			}
			lab.Serve(t, pod.NetNS, "tcp", ":80", "pod")
			lab.Serve(t, lab.Outside, "tcp", ":80", "outside")
			host, outside := networktest.Host4, networktest.Outside4
			if subnet.Addr().Is6() {
				host, outside = networktest.Host6, networktest.Outside6
			}
			lab.MustAsk(t, lab.Outside, "tcp", netip.AddrPortFrom(host, 8080).String(), "pod saw "+outside.String())
			lab.MustAsk(t, pod.NetNS, "tcp", netip.AddrPortFrom(outside, 80).String(), "outside saw "+host.String())
		})
	}
}

// What a pod sends comes from its own address, and the host's loopback is out
// of its reach although host ports make the kernel route 127.0.0.0/8.
func TestGuard(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)
	pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
	networktest.Attach(t, n, pod)
	lab.Serve(t, lab.Host, "tcp4", "127.0.0.1:631", "host")
	lab.Serve(t, lab.Host, "tcp4", ":22", "host")
	lab.MustAsk(t, pod.NetNS, "tcp", "10.88.0.1:22", "host saw 10.88.0.2")

	t.Run("loopback", func(t *testing.T) {
		lab.IP(t, pod.NetNS, "addr del 127.0.0.1/8 dev lo")
		lab.IP(t, pod.NetNS, "route add 127.0.0.1 via 10.88.0.1 dev eth0 onlink src 10.88.0.2")
		lab.Run(t, pod.NetNS, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet")
		lab.MustNotAsk(t, pod.NetNS, "tcp", "127.0.0.1:631")
	})
	t.Run("source", func(t *testing.T) {
		lab.IP(t, pod.NetNS, "addr add 10.88.0.77/32 dev eth0")
		lab.IP(t, pod.NetNS, "route replace default via 10.88.0.1 dev eth0 onlink src 10.88.0.77")
		lab.IP(t, lab.Host, "route add 10.88.0.77 dev sampan0")
		lab.MustNotAsk(t, pod.NetNS, "tcp", "10.88.0.1:22")
	})
}

// Traffic for an address that no pod has does not leave the node, and fails at
// once instead of after minutes.
func TestUnknownAddressIsUnreachable(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4, subnet6)
	lab.IP(t, lab.Host, "route add default via 192.0.2.2")
	pod := lab.NewPod(t)
	networktest.Attach(t, n, pod)
	for _, from := range []struct{ ns, addr string }{
		{lab.Host, "10.88.99.99:80"},
		{lab.Host, "[fd00:88::9999]:80"},
		{pod.NetNS, "10.88.99.99:80"},
		// Not IPv6 from the pod: it is told so too, but newer kernels go on
		// trying to connect regardless.
	} {
		_, err := lab.Ask(from.ns, "tcp", from.addr)
		if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("%s: got %v, want unreachable", from.addr, err)
		}
	}
}

func TestExhaustion(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), netip.MustParsePrefix("10.88.0.0/29"))
	var pods []network.Pod
	for range 5 { // .2 to .6
		pod := lab.NewPod(t)
		networktest.Attach(t, n, pod)
		pods = append(pods, pod)
	}
	late := lab.NewPod(t)
	_, err := n.Attach(t.Context(), late)
	refuse(t, err, errdefs.IsResourceExhausted, "10.88.0.0/29")
	if n.Holds(late.ID) {
		t.Error("the refused pod is recorded")
	}

	// The address rests while the old pod's link is there.
	old := n.pods[pods[0].ID]
	if err := n.Detach(t.Context(), pods[0].ID); err != nil {
		t.Fatal(err)
	}
	_, err = n.Attach(t.Context(), late)
	refuse(t, err, errdefs.IsResourceExhausted)
	if gone, err := n.host.unplugged(old); gone || err != nil {
		t.Skipf("the link went too early to see the address rest: %v", err)
	}
	lab.Drop(t, pods[0].NetNS)
	networktest.Eventually(t, "the address is free", func() bool { return !n.Holds(pods[0].ID) })
	if at := networktest.Attach(t, n, late); at.IPs[0] != old.IPs[0].Addr {
		t.Errorf("got %s, want the only free address %s", at.IPs[0], old.IPs[0].Addr)
	}
}

// A process that dies in the middle of Attach leaves the record and a part of
// the effects. Whoever comes next finishes, undoes or sweeps them.
func TestCrashInAttach(t *testing.T) {
	steps := []string{"recorded", "link made", "pod's side set up", "host's side set up"}
	crash := func(t *testing.T, lab *networktest.Lab, dir string, pod network.Pod, reached int) *record {
		n := openIn(t, lab, dir, subnet4, subnet6)
		defer n.Close()
		ready, err := n.prepare()
		if err != nil {
			t.Fatal(err)
		}
		r, err := n.claim(pod)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.shelf.store(r); err != nil {
			t.Fatal(err)
		}
		if reached == 0 {
			return r
		}
		ns, err := os.Open(pod.NetNS)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		ends, err := n.host.connect(r, int(ns.Fd()), pod.NetNS, ready.mtu)
		if err == nil && reached >= 2 {
			err = host.InNetNS(pod.NetNS, func() error { return setUpPodSide(r, int32(ends.peer)) })
		}
		if err == nil && reached >= 3 {
			err = n.host.setUpHostSide(r, ends.index)
		}
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for reached, step := range steps {
		t.Run(step+", retried", func(t *testing.T) {
			lab, dir := networktest.NewLab(t), t.TempDir()
			pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
			r := crash(t, lab, dir, pod, reached)
			n := openIn(t, lab, dir, subnet4, subnet6)
			at := networktest.Attach(t, n, pod)
			if at.IPs[0] != r.IPs[0].Addr {
				t.Errorf("got %s, recorded was %s", at.IPs[0], r.IPs[0].Addr)
			}
			lab.Serve(t, pod.NetNS, "tcp", ":80", "pod")
			lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.1:8080", "pod saw 192.0.2.2")
		})
		t.Run(step+", swept", func(t *testing.T) {
			lab, dir := networktest.NewLab(t), t.TempDir()
			pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
			r := crash(t, lab, dir, pod, reached)
			n := openIn(t, lab, dir, subnet4, subnet6)
			if err := n.Sweep(t.Context(), func(string) bool { return false }); err != nil {
				t.Fatal(err)
			}
			lab.Drop(t, pod.NetNS)
			networktest.Eventually(t, "the pod is forgotten", func() bool { return !n.Holds(pod.ID) })
			assertClean(t, lab, n)
			if state.Exists(n.shelf.path(pod.ID)) {
				t.Error("the record is still there")
			}
			if gone, err := n.host.unplugged(r); !gone {
				t.Errorf("the link is still there: %v", err)
			}
		})
	}
}

// assertClean checks that the host has nothing of any pod.
func assertClean(t *testing.T, lab *networktest.Lab, n *Network) {
	t.Helper()
	if links, err := n.host.podLinks(); len(links) > 0 || err != nil {
		t.Errorf("links stay: %v, %v", links, err)
	}
	for _, v := range versions {
		for _, s := range []*nftables.Set{n.host.firewall.ports(v), n.host.firewall.bound(v), n.host.firewall.hairpin(v)} {
			if elements, err := n.host.firewall.conn.GetSetElements(s); len(elements) > 0 || err != nil {
				t.Errorf("elements stay in %s: %v, %v", s.Name, elements, err)
			}
		}
	}
	for _, fam := range []string{"-4", "-6"} {
		for line := range strings.Lines(lab.IP(t, lab.Host, fam+" route show proto 83")) {
			if !strings.HasPrefix(line, "unreachable") {
				t.Errorf("a route stays: %s", line)
			}
		}
	}
}

// A pod that was leaving when the process died goes on leaving in the next, and
// its address is not given away before.
func TestCrashInDetach(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	n := openIn(t, lab, dir, subnet4)
	pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
	if _, err := n.Attach(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	n.caretaker.stop() // nobody looks after the pod from here on
	if err := n.Detach(t.Context(), pod.ID); err != nil {
		t.Fatal(err)
	}

	next := openIn(t, lab, dir, subnet4)
	if !next.Holds(pod.ID) {
		t.Fatal("the leaving pod is forgotten too early")
	}
	other := lab.NewPod(t, mapping(network.TCP, 8080, 80))
	if at := networktest.Attach(t, next, other); at.IPs[0].String() == "10.88.0.2" {
		t.Error("the leaving pod's address is given away")
	}
	_, err := next.Attach(t.Context(), pod)
	refuse(t, err, errdefs.IsFailedPrecondition, "leaving")
	networktest.Eventually(t, "the pod is forgotten", func() bool { return !next.Holds(pod.ID) })
}

// A pod that is made again under its old ID has another namespace.
func TestAttachFollowsTheNamespace(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4, subnet6)
	pod := lab.NewPod(t)
	first := networktest.Attach(t, n, pod)
	pod.NetNS = lab.NetNS(t)
	again, err := n.Attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	if again.IPs[0] != first.IPs[0] {
		t.Errorf("the address changed from %s to %s", first.IPs[0], again.IPs[0])
	}
	lab.Serve(t, pod.NetNS, "tcp", ":80", "pod")
	lab.MustAsk(t, lab.Host, "tcp", "10.88.0.2:80", "pod saw 10.88.0.1")
}

func TestForeignInterfaceInPod(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)
	pod := lab.NewPod(t)
	lab.IP(t, pod.NetNS, "link add eth0 type bridge")
	_, err := n.Attach(t.Context(), pod)
	refuse(t, err, func(err error) bool { return errors.Is(err, unix.EEXIST) }, "has an eth0 already")
	if n.Holds(pod.ID) {
		t.Error("the refused pod is recorded")
	}
	assertClean(t, lab, n)
}

func TestDamagedRecord(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	n := openIn(t, lab, dir, subnet4, subnet6)
	pod, powerless := lab.NewPod(t), lab.NewPod(t)
	at, err := n.Attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	for _, id := range []string{pod.ID, powerless.ID} {
		if err := os.WriteFile(n.shelf.path(id), []byte("sampan netw"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	next := openIn(t, lab, dir, subnet4, subnet6)
	if next.Holds(powerless.ID) {
		t.Error("a pod without a link is kept")
	}
	again := networktest.Attach(t, next, pod)
	if diff := cmp.Diff(at, again, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestDamagedSubnets(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "subnets"), []byte("sampan netw"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := openIn(t, lab, dir, subnet4)
	if at := networktest.Attach(t, n, lab.NewPod(t)); !subnet4.Contains(at.IPs[0]) {
		t.Errorf("got %s", at.IPs[0])
	}
}

func TestRecordsOfAnEarlierBoot(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	n := openIn(t, lab, dir, subnet4)
	pod := lab.NewPod(t)
	stale := &record{Pod: pod.ID, Boot: "earlier", Link: "sampan0-abcdef", IPs: []podIP{{netip.MustParseAddr("10.88.0.2"), subnet4, netip.MustParseAddr("10.88.0.1")}}}
	if err := n.shelf.store(stale); err != nil {
		t.Fatal(err)
	}
	next := openIn(t, lab, dir, subnet4)
	if next.Holds(pod.ID) || state.Exists(next.shelf.path(pod.ID)) {
		t.Error("the record outlived its boot")
	}
	if at := networktest.Attach(t, next, lab.NewPod(t)); at.IPs[0].String() != "10.88.0.2" {
		t.Errorf("got %s although the first address is free", at.IPs[0])
	}
}

func TestSetPodCIDR(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	n := openIn(t, lab, dir, subnet4)
	old, young := lab.NewPod(t), lab.NewPod(t)
	atOld := networktest.Attach(t, n, old)
	cidr := netip.MustParsePrefix("10.244.3.0/24")
	for range 2 {
		if err := n.SetPodCIDR([]netip.Prefix{cidr}); err != nil {
			t.Fatal(err)
		}
	}
	atYoung := networktest.Attach(t, n, young)
	if !cidr.Contains(atYoung.IPs[0]) {
		t.Errorf("a new pod got %s", atYoung.IPs[0])
	}
	again, err := n.Attach(t.Context(), old)
	if err != nil || again.IPs[0] != atOld.IPs[0] {
		t.Errorf("the old pod changed from %v to %v, %v", atOld.IPs, again.IPs, err)
	}
	lab.Serve(t, old.NetNS, "tcp", ":80", "old")
	lab.Serve(t, lab.Outside, "tcp4", ":80", "outside")
	lab.MustAsk(t, young.NetNS, "tcp", "10.88.0.2:80", "old saw 10.244.3.2")
	lab.MustAsk(t, young.NetNS, "tcp", "192.0.2.2:80", "outside saw 192.0.2.1")
	lab.MustAsk(t, old.NetNS, "tcp", "192.0.2.2:80", "outside saw 192.0.2.1")

	next := openIn(t, lab, dir, subnet4)
	if at := networktest.Attach(t, next, lab.NewPod(t)); !cidr.Contains(at.IPs[0]) {
		t.Errorf("the next process forgot the subnet: %s", at.IPs[0])
	}
	refuse(t, n.SetPodCIDR([]netip.Prefix{cidr, subnet4}), errdefs.IsInvalidArgument)

	if err := n.Detach(t.Context(), old.ID); err != nil {
		t.Fatal(err)
	}
	networktest.Eventually(t, "the old pod is forgotten", func() bool { return !n.Holds(old.ID) })
	n.caretaker.restore()
	for _, what := range []string{"route show", "addr show dev sampan0"} {
		if out := lab.IP(t, lab.Host, what); strings.Contains(out, "10.88.") {
			t.Errorf("the old subnet is still there: %s", out)
		}
	}
}

func TestOverlapWithTheHost(t *testing.T) {
	lab := networktest.NewLab(t)
	lab.IP(t, lab.Host, "route add 10.88.7.0/24 via 192.0.2.2")
	n := openIn(t, lab, t.TempDir(), subnet4)
	pod := lab.NewPod(t)
	_, err := n.Attach(t.Context(), pod)
	refuse(t, err, errdefs.IsUnavailable, "10.88.0.0/16", "10.88.7.0/24")
	refuse(t, n.Ready(), errdefs.IsUnavailable, "10.88.7.0/24")
	lab.IP(t, lab.Host, "route del 10.88.7.0/24")
	networktest.Attach(t, n, pod)
	if err := n.Ready(); err != nil {
		t.Error(err)
	}
}

func TestFlushedRuleSetComesBack(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)
	pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
	networktest.Attach(t, n, pod)
	lab.Serve(t, pod.NetNS, "tcp", ":80", "pod")
	n.host.firewall.conn.FlushRuleset()
	if err := n.host.firewall.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	lab.MustNotAsk(t, lab.Outside, "tcp", "192.0.2.1:8080")
	n.caretaker.restore()
	lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.1:8080", "pod saw 192.0.2.2")
}

func TestSweepRemovesUnknownLinks(t *testing.T) {
	lab, dir := networktest.NewLab(t), t.TempDir()
	n := openIn(t, lab, dir, subnet4)
	pod := lab.NewPod(t)
	if _, err := n.Attach(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	lab.IP(t, lab.Host, "link add sampan0-mine type bridge")
	n.Close()
	if err := n.shelf.forget(pod.ID); err != nil {
		t.Fatal(err)
	}
	next := openIn(t, lab, dir, subnet4)
	if err := next.Sweep(t.Context(), func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	assertClean(t, lab, next)
	lab.IP(t, lab.Host, "link show sampan0-mine")
}

// The host keeps the IPv6 routes it learns from its router.
func TestForwardingKeepsRouterAdvertisements(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet6)
	networktest.Attach(t, n, lab.NewPod(t))
	if got := lab.Run(t, lab.Host, "cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra"); got != "2\n" {
		t.Errorf("accept_ra is %q", got)
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"two of a kind": {Subnets: []netip.Prefix{subnet4, netip.MustParsePrefix("10.1.0.0/16")}},
		"host bits":     {Subnets: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/16")}},
		"too small":     {Subnets: []netip.Prefix{netip.MustParsePrefix("10.88.0.0/31")}},
		"link name":     {Subnets: []netip.Prefix{subnet4}, Link: "averylongname"},
	} {
		cfg.Dir, cfg.Logger = t.TempDir(), slog.New(slog.DiscardHandler)
		if _, err := Open(cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want an invalid argument", name, err)
		}
	}
}

// With the last pod goes everything, at Close or by Remove, and nothing that is
// not ours.
func TestLeavesNothing(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *networktest.Lab, *Network, network.Pod){
		"closed without pods": func(t *testing.T, lab *networktest.Lab, n *Network, pod network.Pod) {
			if err := n.Detach(t.Context(), pod.ID); err != nil {
				t.Fatal(err)
			}
			lab.Drop(t, pod.NetNS)
			networktest.Eventually(t, "the pod is forgotten", func() bool { return !n.Holds(pod.ID) })
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		},
		"removed": func(t *testing.T, lab *networktest.Lab, n *Network, _ network.Pod) {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := Remove(lab.Host, ""); err != nil {
					t.Error(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			lab := networktest.NewLab(t)
			lab.IP(t, lab.Host, "route add unreachable 10.99.0.0/16")
			lab.Run(t, lab.Host, "nft", "add table inet mine")
			look := func() string {
				var out strings.Builder
				for _, what := range []string{"-o link", "-4 -o addr", "-4 route", "-6 route show table all type unreachable"} {
					out.WriteString(lab.IP(t, lab.Host, what))
				}
				return out.String() + lab.Run(t, lab.Host, "nft", "list", "ruleset")
			}
			before := look()
			n := openIn(t, lab, t.TempDir(), subnet4, subnet6)
			pod := lab.NewPod(t, mapping(network.TCP, 8080, 80))
			if _, err := n.Attach(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			end(t, lab, n, pod)
			if diff := cmp.Diff(before, look()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestForwardingFirewall(t *testing.T) {
	lab := networktest.NewLab(t)
	var log bytes.Buffer
	n, err := Open(Config{Dir: t.TempDir(), State: t.TempDir(), Subnets: []netip.Prefix{subnet4}, NetNS: lab.Host, Logger: slog.New(slog.NewJSONHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	lab.Run(t, lab.Host, "nft", "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
	pod := lab.NewPod(t)
	networktest.Attach(t, n, pod)
	lab.Serve(t, lab.Outside, "tcp4", ":80", "outside")
	lab.MustNotAsk(t, pod.NetNS, "tcp", "192.0.2.2:80")

	var entry struct{ Remedy string }
	if err := json.Unmarshal(log.Bytes(), &entry); err != nil {
		t.Fatalf("no warning: %v in %q", err, log.String())
	}
	lab.Run(t, lab.Host, "sh", "-c", entry.Remedy)
	lab.MustAsk(t, pod.NetNS, "tcp", "192.0.2.2:80", "outside saw 192.0.2.1")
}
