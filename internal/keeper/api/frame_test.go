package api

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// pair returns two ends of a connection.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

func TestFrame(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want := &ExecRequest{Id: "c", Args: []string{strings.Repeat("x", 1<<20)}}
	sent := make(chan error, 1)
	go func() {
		sent <- SendFrame(a, want, w)
		w.Close()
	}()
	var got ExecRequest
	files, err := RecvFrame(b, &got)
	if err != nil || !proto.Equal(&got, want) || len(files) != 1 {
		t.Fatalf("received %d bytes and %d files, %v", len(got.Args), len(files), err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if _, err := files[0].WriteString("through the file"); err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	if text, err := io.ReadAll(r); err != nil || string(text) != "through the file" {
		t.Errorf("%q, %v", text, err)
	}
}

// Whatever comes in, RecvFrame returns: a message, or an error.
func FuzzRecvFrame(f *testing.F) {
	whole, err := proto.Marshal(&ExecRequest{Id: "c"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append([]byte{0, 0, 0, byte(len(whole))}, whole...))
	f.Add([]byte{0, 0, 0, 200, 1})
	f.Add([]byte{255, 255, 255, 255, 1})
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := pair(t)
		go func() {
			_, _ = a.Write(data) // b may be closed
			a.Close()
		}()
		for {
			var m ExecRequest
			files, err := RecvFrame(b, &m)
			if len(files) > 0 {
				t.Errorf("%d files out of nowhere", len(files))
			}
			if err != nil {
				return
			}
		}
	})
}
