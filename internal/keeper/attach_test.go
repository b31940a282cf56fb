package keeper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
)

// viewer is an attached client.
type viewer struct {
	mu       sync.Mutex
	out, err bytes.Buffer
	result   chan error
}

type lockedWriter struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (w lockedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(b)
}

func (l *lab) attach(ctx context.Context, id string, stdin io.Reader) *viewer {
	v := &viewer{result: make(chan error, 1)}
	go func() {
		v.result <- l.client.Attach(ctx, keeper.AttachRequest{
			ID: id, Stdin: stdin, Stdout: lockedWriter{&v.mu, &v.out}, Stderr: lockedWriter{&v.mu, &v.err},
		})
	}()
	return v
}

func (v *viewer) sees(t testing.TB, text string) {
	t.Helper()
	waitFor(t, func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return strings.Contains(v.out.String(), text)
	})
}

// withStdin creates and starts a container whose stdin is open.
func (l *lab) withStdin(id string, once bool, args ...string) keeper.CreateRequest {
	l.t.Helper()
	r := l.request(id, args...)
	r.Stdin, r.StdinOnce = true, once
	if _, err := l.client.Create(l.ctx(), r); err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.client.Start(l.ctx(), id); err != nil {
		l.t.Fatal(err)
	}
	return r
}

// TestAttach has two clients talk to one container, one after the other leave,
// and the log get it all.
func TestAttach(t *testing.T) {
	l := newLab(t)
	r := l.withStdin("c", false, "sh", "-c", `while read line; do echo "got $line"; echo "err $line" >&2; printf prompt; done`)
	inA, toA := io.Pipe()
	inB, toB := io.Pipe()
	ctxA, leaveA := context.WithCancel(t.Context())
	a, b := l.attach(ctxA, "c", inA), l.attach(t.Context(), "c", inB)
	fmt.Fprintln(toA, "one")
	a.sees(t, "got one\nprompt")
	fmt.Fprintln(toB, "two")
	b.sees(t, "got two\nprompt")
	a.sees(t, "got two\nprompt")
	toA.Close() // not once: stdin stays open
	leaveA()
	if err := <-a.result; !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	fmt.Fprintln(toB, "three")
	b.sees(t, "got three\nprompt")
	if err := l.client.Signal(l.ctx(), "c", 15, false); err != nil {
		t.Fatal(err)
	}
	if err := <-b.result; err != nil {
		t.Errorf("when the container had exited: %v", err)
	}
	if !strings.Contains(b.err.String(), "err two\nerr three\n") {
		t.Errorf("stderr is %q", b.err.String())
	}
	l.waitExit(r)
	log := l.output(r.LogPath)
	for _, want := range []string{"got one\n", "got two\n", "got three\n", "err three\n"} {
		if strings.Count(log, want) != 1 {
			t.Errorf("the log has not once %q:\n%s", want, log)
		}
	}
	for id, class := range map[string]func(error) bool{"c": errdefs.IsFailedPrecondition, "absent": errdefs.IsNotFound} {
		if err := l.client.Attach(l.ctx(), keeper.AttachRequest{ID: id, Stdout: io.Discard}); !class(err) {
			t.Errorf("attach to %s: %v", id, err)
		}
	}
}

// TestStdinOnce shows that the first client's end of input is the container's,
// and stays it for the next worker.
func TestStdinOnce(t *testing.T) {
	l := newLab(t)
	r := l.withStdin("c", true, "sh", "-c", "cat; echo end of input; read x; echo none; sleep 100")
	input := strings.Repeat("0123456789\n", 100_000)
	v := l.attach(t.Context(), "c", strings.NewReader(input))
	v.sees(t, "end of input\nnone\n")
	if !strings.HasPrefix(v.out.String(), input) {
		t.Error("output is not what went in")
	}
	// Who is attached sees it first.
	waitFor(t, func() bool { return strings.HasPrefix(l.output(r.LogPath), input) })
	l.kill(l.info().Worker)
	if err := <-v.result; !errdefs.IsUnavailable(err) {
		t.Errorf("when the worker was killed: %v", err)
	}
	v = l.attach(t.Context(), "c", strings.NewReader("nobody reads this"))
	waitFor(t, func() bool { return l.find("c") != nil })
	if err := l.client.Delete(l.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	if err := <-v.result; err != nil {
		t.Errorf("when the container was deleted: %v", err)
	}
}

// TestAttachSurvivesNothing kills the worker under a client whose stdin is open
// once: it may come again and finds it open.
func TestStdinOnceAfterWorker(t *testing.T) {
	l := newLab(t)
	r := l.withStdin("c", true, "cat")
	in, to := io.Pipe()
	v := l.attach(t.Context(), "c", in)
	fmt.Fprintln(to, "one")
	v.sees(t, "one\n")
	l.kill(l.info().Worker)
	if err := <-v.result; !errdefs.IsUnavailable(err) {
		t.Errorf("when the worker was killed: %v", err)
	}
	v = l.attach(t.Context(), "c", strings.NewReader("two\n"))
	if err := <-v.result; err != nil {
		t.Error(err)
	}
	l.waitExit(r)
	if got := l.output(r.LogPath); got != "one\ntwo\n" {
		t.Errorf("the log is %q", got)
	}
}

// TestAttachStalled has a client that does not read. It is left behind; the
// container and the log are not.
func TestAttachStalled(t *testing.T) {
	l := newLab(t)
	r := l.withStdin("c", true, "sh", "-c", "read go; seq 2000000; echo done; read x")
	stalled := make(chan struct{})
	result := make(chan error, 1)
	go func() {
		result <- l.client.Attach(t.Context(), keeper.AttachRequest{ID: "c", Stdout: writerFunc(func(b []byte) (int, error) {
			<-stalled
			return len(b), nil
		})})
	}()
	in, to := io.Pipe()
	v := l.attach(t.Context(), "c", in)
	time.Sleep(50 * time.Millisecond)
	begin := time.Now()
	fmt.Fprintln(to, "go")
	waitFor(t, func() bool { return strings.HasSuffix(l.output(r.LogPath), "\ndone\n") })
	t.Logf("%v", time.Since(begin))
	v.sees(t, "\n2000000\ndone\n")
	close(stalled)
	if err := <-result; !errdefs.IsResourceExhausted(err) {
		t.Errorf("the client that did not read got %v", err)
	}
	to.Close()
	if err := <-v.result; err != nil {
		t.Errorf("the client that did got %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
