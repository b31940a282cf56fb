package builtin

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
)

func mapping(proto network.Protocol, hostPort, containerPort uint16) network.PortMapping {
	return network.PortMapping{Protocol: proto, HostPort: hostPort, ContainerPort: containerPort}
}

func bound(ip string, m network.PortMapping) network.PortMapping {
	m.HostIP = netip.MustParseAddr(ip)
	return m
}

func TestHostPortPaths(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4, subnet6)
	server := lab.NewPod(t, mapping(network.TCP, 8080, 80), mapping(network.UDP, 8080, 53))
	client := lab.NewPod(t)
	networktest.Attach(t, n, server)
	atClient := networktest.Attach(t, n, client)
	for _, v := range []string{"4", "6"} {
		lab.Serve(t, server.NetNS, "tcp"+v, ":80", "tcp")
		lab.Serve(t, server.NetNS, "udp"+v, ":53", "udp")
	}
	const gateway4, gateway6 = "10.88.0.1", "fd00:88::1"
	type hop struct{ from, addr, sees string }
	for name, h := range map[string]hop{
		"outside, IPv4":             {lab.Outside, "192.0.2.1", "192.0.2.2"},
		"outside, IPv6":             {lab.Outside, "2001:db8::1", "2001:db8::2"},
		"host's own address":        {lab.Host, "192.0.2.1", "192.0.2.1"},
		"host's own IPv6 address":   {lab.Host, "2001:db8::1", "2001:db8::1"},
		"host through 127.0.0.1":    {lab.Host, "127.0.0.1", gateway4},
		"host through 127.0.0.2":    {lab.Host, "127.0.0.2", gateway4},
		"host through the gateway":  {lab.Host, gateway4, gateway4},
		"another pod, IPv4":         {client.NetNS, "192.0.2.1", atClient.IPs[0].String()},
		"another pod, IPv6":         {client.NetNS, "2001:db8::1", atClient.IPs[1].String()},
		"another pod, gateway":      {client.NetNS, gateway4, atClient.IPs[0].String()},
		"another pod, IPv6 gateway": {client.NetNS, gateway6, atClient.IPs[1].String()},
		"the pod itself, IPv4":      {server.NetNS, "192.0.2.1", gateway4},
		"the pod itself, IPv6":      {server.NetNS, "2001:db8::1", gateway6},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			t.Run(name+", "+proto, func(t *testing.T) {
				lab.MustAsk(t, h.from, proto, net.JoinHostPort(h.addr, "8080"), proto+" saw "+h.sees)
			})
		}
	}

	t.Run("::1 is refused at once", func(t *testing.T) {
		start := time.Now()
		_, err := lab.Ask(lab.Host, "tcp", "[::1]:8080")
		if err == nil || !strings.Contains(err.Error(), "refused") || time.Since(start) > 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
	t.Run("a pod's port is not taken from others", func(t *testing.T) {
		lab.Serve(t, lab.Outside, "tcp4", ":8080", "outside")
		lab.MustAsk(t, client.NetNS, "tcp", "192.0.2.2:8080", "outside saw 192.0.2.1")
	})
}

func TestHostPortBound(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4, subnet6)
	lab.IP(t, lab.Host, "addr add 192.0.2.9/24 dev eth0")
	for name, m := range map[string]network.PortMapping{
		"one":      bound("192.0.2.9", mapping(network.TCP, 8080, 80)),
		"other":    bound("192.0.2.1", mapping(network.TCP, 8080, 80)),
		"loopback": bound("127.0.0.1", mapping(network.TCP, 8080, 80)),
		"v6":       bound("::", mapping(network.TCP, 8080, 80)),
	} {
		pod := lab.NewPod(t, m)
		networktest.Attach(t, n, pod)
		lab.Serve(t, pod.NetNS, "tcp", ":80", name)
	}
	lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.9:8080", "one saw 192.0.2.2")
	lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.1:8080", "other saw 192.0.2.2")
	lab.MustAsk(t, lab.Host, "tcp", "127.0.0.1:8080", "loopback saw 10.88.0.1")
	lab.MustAsk(t, lab.Outside, "tcp", "[2001:db8::1]:8080", "v6 saw 2001:db8::2")
	lab.MustNotAsk(t, lab.Host, "tcp", "10.88.0.1:8080")
}

func TestHostPortConflict(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)
	first := lab.NewPod(t, mapping(network.TCP, 8080, 80))
	networktest.Attach(t, n, first)

	second := lab.NewPod(t, bound("192.0.2.1", mapping(network.TCP, 8080, 80)))
	_, err := n.Attach(t.Context(), second)
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), first.Namespace+"/"+first.Name) || !strings.Contains(err.Error(), "8080/tcp") {
		t.Errorf("got %v, want already exists with the holder's name and the port", err)
	}
	if n.Holds(second.ID) {
		t.Error("the refused pod is recorded")
	}
	other := lab.NewPod(t, mapping(network.UDP, 8080, 80))
	networktest.Attach(t, n, other)

	if err := n.Detach(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	networktest.Attach(t, n, second) // free at once, although first's link is still there
	lab.Serve(t, second.NetNS, "tcp", ":80", "second")
	lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.1:8080", "second saw 192.0.2.2")
	networktest.Eventually(t, "the first pod is forgotten", func() bool { return !n.Holds(first.ID) })
	lab.MustAsk(t, lab.Outside, "tcp", "192.0.2.1:8080", "second saw 192.0.2.2")
}

// A client that keeps its UDP socket keeps a conntrack entry alive; it must not
// lead to a pod that is gone.
func TestHostPortUDPMovesWithThePort(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)

	var conn net.Conn
	err := host.InNetNS(lab.Outside, func() (err error) {
		conn, err = net.Dial("udp", "192.0.2.1:8080")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func() string {
		buf := make([]byte, 100)
		for range 20 {
			conn.Write([]byte("?"))
			conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if n, err := conn.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		return "nothing"
	}
	if got := ask(); got != "nothing" {
		t.Fatalf("somebody answered: %s", got)
	}
	for _, name := range []string{"first", "second"} {
		pod := lab.NewPod(t, mapping(network.UDP, 8080, 53))
		networktest.Attach(t, n, pod)
		lab.Serve(t, pod.NetNS, "udp", ":53", name)
		if got, want := ask(), name+" saw 192.0.2.2"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if err := n.Detach(t.Context(), pod.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// Not every kernel has SCTP sockets, but all translate its packets: an INIT
// written by hand arrives at the pod's port.
func TestHostPortSCTP(t *testing.T) {
	lab := networktest.NewLab(t)
	n := openIn(t, lab, t.TempDir(), subnet4)
	pod := lab.NewPod(t, mapping(network.SCTP, 9899, 36412))
	networktest.Attach(t, n, pod)

	raw := func(ns, laddr string) *net.IPConn {
		var conn net.PacketConn
		err := host.InNetNS(ns, func() (err error) {
			conn, err = net.ListenPacket("ip4:132", laddr)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.IPConn)
	}
	in := raw(pod.NetNS, "0.0.0.0")
	out := raw(lab.Outside, "192.0.2.2")
	if _, err := out.WriteTo(sctpInit(5000, 9899), &net.IPAddr{IP: networktest.Host4.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	in.SetReadDeadline(time.Now().Add(2 * time.Second))
	buf := make([]byte, 1500)
	size, from, err := in.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	if port := binary.BigEndian.Uint16(buf[2:]); size < 12 || port != 36412 || from.String() != "192.0.2.2" {
		t.Errorf("got %d bytes for port %d from %s", size, port, from)
	}
}

func sctpInit(from, to uint16) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint16(b[0:], from)
	binary.BigEndian.PutUint16(b[2:], to)
	b[12] = 1                              // INIT
	binary.BigEndian.PutUint16(b[14:], 20) // length of the chunk
	binary.BigEndian.PutUint32(b[16:], 77) // initiate tag
	binary.BigEndian.PutUint32(b[20:], 65536)
	binary.BigEndian.PutUint16(b[24:], 1)
	binary.BigEndian.PutUint16(b[26:], 1)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}
