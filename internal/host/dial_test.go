package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDialInNetNS(t *testing.T) {
	const ns = "/proc/self/ns/net"
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, path := range []string{"", ns} {
		conn, err := DialInNetNS(t.Context(), path, "tcp4", listener.Addr().String())
		if errors.Is(err, unix.EPERM) {
			t.Skipf("probe: setns(2) is not permitted here: %v", err)
		}
		if err != nil {
			t.Errorf("through %q: %v", path, err)
			continue
		}
		conn.Close()
	}
	if _, err := DialInNetNS(t.Context(), "/proc/self/ns/absent", "tcp4", listener.Addr().String()); err == nil {
		t.Error("a namespace that is not there can be entered")
	}
	fresh, err := freshNetNS(t)
	if err != nil {
		t.Skipf("probe: unshare(2) is not permitted here: %v", err)
	}
	if conn, err := DialInNetNS(t.Context(), fresh, "tcp4", listener.Addr().String()); err == nil {
		conn.Close()
		t.Error("the connection was not made in the other namespace")
	}
}

// freshNetNS returns a path of a new namespace, in which all links are down.
func freshNetNS(t *testing.T) (path string, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			t.Cleanup(func() { f.Close() })
			path = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		}
		return err
	})
	return path, err
}

func TestHangup(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for name, leave := range map[string]func(*net.TCPConn){
		"close":      func(c *net.TCPConn) { c.Close() },
		"half close": func(c *net.TCPConn) { c.CloseWrite() },
		"reset":      func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			client, err := net.Dial("tcp4", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			left := make(chan struct{})
			h, err := WatchHangup(server.(*net.TCPConn), func() { close(left) })
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			client.Write([]byte("this is never read"))
			select {
			case <-left:
				t.Fatal("it is said to have left too early")
			case <-time.After(50 * time.Millisecond):
			}
			leave(client.(*net.TCPConn))
			select {
			case <-left:
			case <-time.After(5 * time.Second):
				t.Error("it left and nobody noticed")
			}
		})
	}
}
