package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/iotest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

// serve connects a client to a server with the loader l.
func serve(t *testing.T, l LoaderFunc) grpc.ClientConnInterface {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	s := grpc.NewServer()
	Register(s, l)
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(listener) }()
	cc, err := grpc.NewClient("passthrough:test",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close(); s.Stop(); <-done })
	return cc
}

func TestLoadCarriesEveryByte(t *testing.T) {
	for _, size := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize + 7} {
		want := make([]byte, size)
		random := rand.NewChaCha8([32]byte{byte(size)})
		random.Read(want)
		cc := serve(t, func(_ context.Context, r io.Reader, name string) ([]Loaded, error) {
			got, err := io.ReadAll(r)
			if err != nil {
				return nil, err
			}
			if !bytes.Equal(got, want) {
				return nil, errors.New("other bytes")
			}
			return []Loaded{{ID: "sha256:1", References: []string{name}, Size: uint64(len(got))}}, nil
		})
		got, err := Load(t.Context(), cc, iotest.HalfReader(bytes.NewReader(want)), "a:b")
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if len(got) != 1 || got[0].ID != "sha256:1" || got[0].Size != uint64(size) || got[0].References[0] != "a:b" {
			t.Errorf("%d bytes: got %+v", size, got)
		}
	}
}

func TestLoadReturnsTheServersError(t *testing.T) {
	cc := serve(t, func(_ context.Context, r io.Reader, _ string) ([]Loaded, error) {
		return nil, status.Error(codes.InvalidArgument, "not an archive")
	})
	// Far more than fits in flight, so the answer comes while the client sends.
	_, err := Load(t.Context(), cc, io.LimitReader(endless{}, 64<<20), "")
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "not an archive") {
		t.Errorf("got %v", err)
	}
}

func TestLoadThatBreaksOffIsNotTheEnd(t *testing.T) {
	seen := make(chan error, 1)
	cc := serve(t, func(_ context.Context, r io.Reader, _ string) ([]Loaded, error) {
		_, err := io.Copy(io.Discard, r)
		seen <- err
		return nil, err
	})
	broken := errors.New("disk gone")
	archive := io.MultiReader(io.LimitReader(endless{}, 3*chunkSize), iotest.ErrReader(broken))
	if _, err := Load(t.Context(), cc, archive, ""); !errors.Is(err, broken) {
		t.Errorf("client got %v", err)
	}
	if err := <-seen; err == nil {
		t.Error("the server took half an archive for a whole one")
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
