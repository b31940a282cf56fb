// Package networktest holds what the tests of every network share: a lab of
// network namespaces in which nothing touches the machine's own links, and the
// suite that each implementation of network.Network passes.
package networktest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
)

// Lab is a host with a link to the outside world, both of them namespaces.
//
//	outside (eth0 192.0.2.2, 2001:db8::2) ─── (eth0 192.0.2.1, 2001:db8::1) host ─── pods
//
// The outside has no route to pods: their traffic comes back only if the host
// masquerades it.
type Lab struct {
	Host, Outside string // pins of the namespaces
	dir           string
}

// The lab's addresses.
var (
	Host4    = netip.MustParseAddr("192.0.2.1")
	Host6    = netip.MustParseAddr("2001:db8::1")
	Outside4 = netip.MustParseAddr("192.0.2.2")
	Outside6 = netip.MustParseAddr("2001:db8::2")
)

// NewLab makes a lab that goes with the test. The test is skipped where network
// namespaces cannot be made.
func NewLab(t testing.TB) *Lab {
	t.Helper()
	lab := &Lab{dir: t.TempDir()}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	lab.Host, lab.Outside = lab.NetNS(t), lab.NetNS(t)
	lab.IP(t, lab.Host, "link add eth0 type veth peer name eth0 netns "+lab.bound(t, lab.Outside))
	for ns, addrs := range map[string][]netip.Addr{lab.Host: {Host4, Host6}, lab.Outside: {Outside4, Outside6}} {
		lab.IP(t, ns, "link set lo up")
		lab.IP(t, ns, "link set eth0 up")
		lab.IP(t, ns, fmt.Sprintf("addr add %s/24 dev eth0", addrs[0]))
		lab.IP(t, ns, fmt.Sprintf("addr add %s/64 dev eth0 nodad", addrs[1]))
	}
	// A link drops packets for a moment after it came up.
	for _, addr := range []netip.Addr{Host4, Host6} {
		Eventually(t, "the lab's link works", func() bool {
			_, err := lab.Ask(lab.Outside, "tcp", netip.AddrPortFrom(addr, 9).String())
			return errors.Is(err, unix.ECONNREFUSED)
		})
	}
	return lab
}

// bound gives the namespace a name that ip(8) understands, for the test's time.
func (l *Lab) bound(t testing.TB, ns string) string {
	t.Helper()
	f, err := os.Open(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

// NetNS makes a namespace that goes with the test.
func (l *Lab) NetNS(t testing.TB) string {
	t.Helper()
	pin := filepath.Join(l.dir, newID()[:12])
	if err := (host.Namespaces{Net: pin}).Create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Drop(t, pin) })
	return pin
}

// Drop removes a namespace's pin.
func (l *Lab) Drop(t testing.TB, ns string) {
	t.Helper()
	if err := host.Unpin(ns); err != nil {
		t.Error(err)
	}
}

// IP runs ip(8) in a namespace.
func (l *Lab) IP(t testing.TB, ns, args string) string {
	t.Helper()
	return l.Run(t, ns, "ip", strings.Fields(args)...)
}

// Run runs a command in a namespace and returns what it printed.
func (l *Lab) Run(t testing.TB, ns, name string, args ...string) string {
	t.Helper()
	var out []byte
	err := host.InNetNS(ns, func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// NewPod makes a pod with a namespace of its own.
func (l *Lab) NewPod(t testing.TB, ports ...network.PortMapping) network.Pod {
	t.Helper()
	id := newID()
	return network.Pod{
		ID:           id,
		Namespace:    "default",
		Name:         "pod-" + id[:6],
		UID:          "uid-" + id[:6],
		NetNS:        l.NetNS(t),
		PortMappings: ports,
	}
}

func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Serve answers on an address in a namespace, over tcp or udp, with "NAME saw
// CLIENT" for as long as the test runs.
func (l *Lab) Serve(t testing.TB, ns, proto, addr, name string) {
	t.Helper()
	err := host.InNetNS(ns, func() error {
		if strings.HasPrefix(proto, "udp") {
			conn, err := net.ListenPacket(proto, addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			go servePackets(conn, name)
			return nil
		}
		ln, err := net.Listen(proto, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { ln.Close() })
		go serveStreams(ln, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func serveStreams(ln net.Listener, name string) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		fmt.Fprintf(conn, "%s saw %s", name, clientIP(conn.RemoteAddr()))
		conn.Close()
	}
}

func servePackets(conn net.PacketConn, name string) {
	buf := make([]byte, 1500)
	for {
		_, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		fmt.Fprint(packetTo{conn, from}, name, " saw ", clientIP(from))
	}
}

type packetTo struct {
	net.PacketConn
	to net.Addr
}

func (p packetTo) Write(b []byte) (int, error) { return p.WriteTo(b, p.to) }

func clientIP(a net.Addr) netip.Addr {
	return netip.MustParseAddrPort(a.String()).Addr().Unmap()
}

// Ask connects from a namespace to an address and returns what the server says.
func (l *Lab) Ask(ns, proto, addr string) (string, error) {
	return l.ask(ns, proto, addr, 3*time.Second)
}

func (l *Lab) ask(ns, proto, addr string, wait time.Duration) (string, error) {
	var conn net.Conn
	err := host.InNetNS(ns, func() (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		conn, err = new(net.Dialer).DialContext(ctx, proto, addr)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(wait))
	if strings.HasPrefix(proto, "udp") {
		buf := make([]byte, 1500)
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
		n, err := conn.Read(buf)
		return string(buf[:n]), err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// MustAsk is Ask where the answer is known.
func (l *Lab) MustAsk(t testing.TB, ns, proto, addr, want string) {
	t.Helper()
	if got, err := l.Ask(ns, proto, addr); err != nil || got != want {
		t.Errorf("ask %s %s: got %q, %v; want %q", proto, addr, got, err, want)
	}
}

// MustNotAsk fails the test if somebody answers.
func (l *Lab) MustNotAsk(t testing.TB, ns, proto, addr string) {
	t.Helper()
	if got, err := l.ask(ns, proto, addr, 300*time.Millisecond); err == nil {
		t.Errorf("ask %s %s: got %q, want no answer", proto, addr, got)
	}
}

// Eventually waits until cond holds.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
