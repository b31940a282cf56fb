package builtin

import (
	"log/slog"
	"net/netip"
	"testing"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
)

var (
	subnet4 = netip.MustParsePrefix("10.88.0.0/16")
	subnet6 = netip.MustParsePrefix("fd00:88::/64")
)

// bench is a network in a lab.
func openIn(t testing.TB, lab *networktest.Lab, dir string, subnets ...netip.Prefix) *Network {
	t.Helper()
	n, err := Open(Config{Dir: dir, Subnets: subnets, NetNS: lab.Host, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
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
