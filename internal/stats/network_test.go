package stats

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"sampan.dev/sampan/internal/host"
)

// podNetwork makes a network namespace with loopback and two ends of a link, eth0
// and net1, over which a packet has gone, and returns where it is pinned.
func podNetwork(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	path := filepath.Join(t.TempDir(), "net")
	ns := host.Namespaces{Net: path}
	if err := ns.Create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Remove(); err != nil {
			t.Error(err)
		}
	})
	err := host.InNetNS(path, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "eth0"}); err != nil {
			return err
		}
		for _, name := range []string{"lo", "net1", "eth0"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 255, 0, 1), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		conn, err := net.Dial("udp", "10.255.0.2:9") // asks who has the address, which is a packet
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte("x"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNetwork(t *testing.T) {
	c := collector(t, nil)
	path := podNetwork(t)
	for range 2 { // with and without an id
		got := c.networkUsage(Pod{ID: "p", NetNS: path})
		if got.GetDefaultInterface().GetName() != "eth0" || len(got.GetInterfaces()) != 1 || got.GetInterfaces()[0].GetName() != "net1" || got.GetTimestamp() == 0 {
			t.Fatalf("network: %v; want eth0 as the default and net1 besides", got)
		}
		if sent, received := got.DefaultInterface.TxBytes.Value, got.Interfaces[0].RxBytes.Value; sent == 0 || received == 0 {
			t.Errorf("eth0 sent %d bytes, net1 received %d", sent, received)
		}
	}
}

func TestNetworkThatIsGone(t *testing.T) {
	c := collector(t, nil)
	for _, path := range []string{"", filepath.Join(t.TempDir(), "none"), t.TempDir()} {
		if got := c.networkUsage(Pod{ID: "p", NetNS: path}); got != nil {
			t.Errorf("network of %q: %v", path, got)
		}
	}
}

func BenchmarkNetwork(b *testing.B) {
	c := collector(b, nil)
	path := podNetwork(b)
	for b.Loop() {
		if got := c.networkUsage(Pod{ID: "p", NetNS: path}); got == nil {
			b.Fatal("no figures")
		}
	}
}
