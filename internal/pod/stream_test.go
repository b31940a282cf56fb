package pod

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
)

func (f *fakeKeeper) Attach(context.Context, keeper.AttachRequest) error   { return nil }
func (f *fakeKeeper) Resize(context.Context, string, uint16, uint16) error { return nil }

// TestDial connects to ports of a pod on the host's network.
func TestDial(t *testing.T) {
	l := newLab(t)
	s := l.start()
	id, err := s.Run(t.Context(), podNamed("a"), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("probe: %v", err)
			continue
		}
		defer listener.Close()
		go func() {
			if conn, err := listener.Accept(); err == nil {
				conn.Write([]byte("hello"))
				conn.Close()
			}
		}()
		conn, err := s.Dial(t.Context(), id, uint16(listener.Addr().(*net.TCPAddr).Port))
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		if got, err := io.ReadAll(conn); string(got) != "hello" || err != nil {
			t.Errorf("%s: %q, %v", address, got, err)
		}
		conn.Close()
	}
	if _, err := s.Dial(t.Context(), id, 1); !errdefs.IsUnavailable(err) {
		t.Errorf("a port nobody listens at: %v", err)
	}
	if _, err := s.Dial(t.Context(), "absent", 1); !errdefs.IsNotFound(err) {
		t.Errorf("a pod that is not there: %v", err)
	}
	if err := s.Stop(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Dial(t.Context(), id, 1); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a stopped pod: %v", err)
	}
	if err := s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}
