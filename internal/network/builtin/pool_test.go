package builtin

import (
	"net/netip"
	"testing"
)

func TestPool(t *testing.T) {
	p := newPool(netip.MustParsePrefix("10.0.0.0/29"))
	used := map[netip.Addr]string{netip.MustParseAddr("10.0.0.3"): "x"}
	for _, want := range []string{"10.0.0.2", "10.0.0.4", "10.0.0.5", "10.0.0.6"} {
		got, ok := p.take(used)
		if !ok || got.String() != want {
			t.Fatalf("got %s, %v; want %s", got, ok, want)
		}
		used[got] = "y"
	}
	if got, ok := p.take(used); ok {
		t.Fatalf("got %s from a full subnet", got)
	}
	delete(used, netip.MustParseAddr("10.0.0.2"))
	delete(used, netip.MustParseAddr("10.0.0.6"))
	if got, ok := p.take(used); !ok || got.String() != "10.0.0.2" {
		t.Errorf("got %s, %v; want the address that rested longest", got, ok)
	}
}

func TestPoolIPv6UsesTheLastAddress(t *testing.T) {
	p := newPool(netip.MustParsePrefix("fd00::/126"))
	used := make(map[netip.Addr]string)
	for _, want := range []string{"fd00::2", "fd00::3"} {
		got, ok := p.take(used)
		if !ok || got.String() != want {
			t.Fatalf("got %s, %v; want %s", got, ok, want)
		}
		used[got] = "x"
	}
	if _, ok := p.take(used); ok {
		t.Error("an address from a full subnet")
	}
}

func TestAfterLast(t *testing.T) {
	for subnet, want := range map[string]string{
		"10.88.0.0/16":   "10.89.0.0",
		"10.0.0.0/8":     "11.0.0.0",
		"192.0.2.128/25": "192.0.3.0",
		"192.0.2.8/30":   "192.0.2.12",
		"fd00::/64":      "fd00:0:0:1::",
		"fd00::10/124":   "fd00::20",
	} {
		if got, _ := netip.AddrFromSlice(afterLast(netip.MustParsePrefix(subnet))); got != netip.MustParseAddr(want) {
			t.Errorf("%s: got %s, want %s", subnet, got, want)
		}
	}
}
