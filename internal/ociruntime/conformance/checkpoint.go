package conformance

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/criu"
)

// counter counts in a variable of a shell, so that only its memory has it.
var counter = []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo count $i; usleep 20000; done"}

func (s *suite) pause(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Create(t, rt, counter)
	want(t, "Pause before Start", rt.Pause(t.Context(), c.Container), errdefs.ErrFailedPrecondition)
	c.Start()
	c.Expect("count 2\n")
	for range 2 {
		if err := rt.Pause(t.Context(), c.Container); err != nil {
			t.Fatal(err)
		}
	}
	before := c.Output()
	time.Sleep(100 * time.Millisecond)
	if after := c.Output(); after != before {
		t.Errorf("a paused container has written %q", strings.TrimPrefix(after, before))
	}
	for range 2 {
		if err := rt.Resume(t.Context(), c.Container); err != nil {
			t.Fatal(err)
		}
	}
	c.Expect("count " + strconv.Itoa(c.counted()+3) + "\n")
	if err := rt.Pause(t.Context(), c.Container); err != nil {
		t.Fatal(err)
	}
	c.Delete() // also while it is paused
}

// counted returns how far the counter has come.
func (c *Container) counted() int {
	out := strings.Split(strings.TrimSpace(c.Output()), "\n")
	n, _ := strconv.Atoi(strings.TrimPrefix(out[len(out)-1], "count "))
	return n
}

// program returns CRIU, or skips the test if it does not work here.
func program(t *testing.T) string {
	t.Helper()
	found, err := new(host.CRIU).Check(t.Context())
	if err != nil {
		t.Skipf("probe: %v", err)
	}
	return found.Path
}

// dump makes a checkpoint of c, which must succeed unless the runtime has no such
// command.
func (s *suite) dump(t *testing.T, c *Container) ociruntime.Checkpoint {
	t.Helper()
	to := ociruntime.Checkpoint{Dir: t.TempDir(), CRIU: program(t)}
	err := c.rt.Checkpoint(t.Context(), c.Container, c.Bundle, to)
	if errdefs.IsNotImplemented(err) {
		t.Skipf("probe: %v", err)
	}
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(to.Dir, criu.DumpLog))
		t.Fatalf("%v\n%s", err, log)
	}
	return to
}

// restoreIn makes a container, not started, of a checkpoint.
func (s *suite) restoreIn(t *testing.T, rt ociruntime.Runtime, from ociruntime.Checkpoint, edits ...func(*specs.Spec)) (*Container, error) {
	t.Helper()
	c := s.lab.Prepare(t, rt, counter, edits...)
	ctx, cancel := c.context()
	defer cancel()
	return c, c.create(ctx, &from)
}

func (s *suite) checkpoint(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, counter)
	c.Expect("count 5\n")
	from := s.dump(t, c)
	at := c.counted()
	c.Expect("count " + strconv.Itoa(at+5) + "\n") // it goes on

	if err := rt.Pause(t.Context(), c.Container); err != nil {
		t.Fatal(err)
	}
	paused := s.dump(t, c)
	before := c.Output()
	time.Sleep(100 * time.Millisecond)
	if after := c.Output(); after != before {
		t.Errorf("a container that was paused runs after its checkpoint, and has written %q", strings.TrimPrefix(after, before))
	}
	pausedAt := c.counted()
	c.Delete()
	c.Wait()

	for _, tc := range []struct {
		from     ociruntime.Checkpoint
		min, max int
	}{{from, 5, at + 1}, {paused, pausedAt, pausedAt}} {
		s.goesOn(t, rt, tc.from, tc.min, tc.max)
	}
}

// goesOn restores a counter, which has come to between least and most.
func (s *suite) goesOn(t *testing.T, rt ociruntime.Runtime, from ociruntime.Checkpoint, least, most int) {
	t.Helper()
	r, err := s.restoreIn(t, rt, from)
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(r.StateDir, criu.RestoreLog))
		t.Fatalf("%v\n%s", err, log)
	}
	s.wantState(t, r, ociruntime.Created)
	time.Sleep(100 * time.Millisecond)
	if out := r.Output(); out != "" {
		t.Errorf("output before Start: %q", out)
	}
	r.Start()
	want(t, "Start again", rt.Start(t.Context(), r.Container), errdefs.ErrFailedPrecondition)
	s.wantState(t, r, ociruntime.Running)
	r.Expect("\n")
	first, _, _ := strings.Cut(r.buf.String(), "\n")
	n, err := strconv.Atoi(strings.TrimPrefix(first, "count "))
	if err != nil || n < least+1 || n > most+1 {
		t.Errorf("the restored counter says %q, want %d to %d", first, least+1, most+1)
	}
	r.Expect("count " + strconv.Itoa(n+3) + "\n")
	if out, code, err := r.Exec(r.Process("echo", "hello"), ""); err != nil || code != 0 || out != "hello\n" {
		t.Errorf("exec in a restored container: output %q, code %d, error %v", out, code, err)
	}
	if err := rt.Signal(t.Context(), r.Container, unix.SIGKILL, false); err != nil {
		t.Error(err)
	}
	if code := r.Wait(); code != 128+9 {
		t.Errorf("exit code %d, want 137", code)
	}
	s.wantState(t, r, ociruntime.Stopped)
}

func (s *suite) checkpointRefuses(t *testing.T) {
	rt := s.factory(t)
	to := ociruntime.Checkpoint{Dir: t.TempDir(), CRIU: program(t)}
	c := s.lab.Create(t, rt, counter)
	want(t, "Checkpoint before Start", rt.Checkpoint(t.Context(), c.Container, c.Bundle, to), errdefs.ErrFailedPrecondition)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.Start()
	want(t, "Checkpoint with a context that has ended", rt.Checkpoint(ctx, c.Container, c.Bundle, to), context.Canceled)
	c.Expect("count 2\n")

	out := pipe(t)
	defer out.close()
	started, err := rt.Exec(t.Context(), c.Container, ociruntime.ExecRequest{Process: c.Process("sleep", "60"), Stdio: ociruntime.Stdio{Stdout: out.w}})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "Checkpoint during an exec", rt.Checkpoint(t.Context(), c.Container, c.Bundle, to), errdefs.ErrFailedPrecondition)
	if err := unix.Kill(started.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	reap(t, started)
	c.Expect("count " + strconv.Itoa(c.counted()+2) + "\n")
}

func (s *suite) restoreRefuses(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, counter)
	c.Expect("count 2\n")
	from := s.dump(t, c)
	for _, tc := range []struct {
		name  string
		edit  func(*specs.Spec)
		class error
	}{
		{"fewer capabilities", func(spec *specs.Spec) { spec.Process.Capabilities.Bounding = []string{"CAP_KILL"} }, errdefs.ErrPermissionDenied},
		{"seccomp", func(spec *specs.Spec) { spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow} }, errdefs.ErrPermissionDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := s.restoreIn(t, rt, from, tc.edit)
			want(t, "Create", err, tc.class)
			r.AssertGone()
			reapZombies(0)
		})
	}
	t.Run("images", func(t *testing.T) {
		bad := ociruntime.Checkpoint{Dir: t.TempDir(), CRIU: from.CRIU}
		if err := errors.Join(os.Mkdir(filepath.Join(bad.Dir, criu.ImagesDir), 0o700),
			os.WriteFile(filepath.Join(bad.Dir, criu.ImagesDir, "descriptors.json"), []byte(`["","",""]`), 0o600)); err != nil {
			t.Fatal(err)
		}
		r, err := s.restoreIn(t, rt, bad)
		if err == nil {
			t.Error("a container was restored of nothing")
		}
		r.AssertGone()
		reapZombies(0)
	})
}

func (s *suite) restoreUndone(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, counter)
	c.Expect("count 2\n")
	from := s.dump(t, c)
	for _, after := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 40 * time.Millisecond} {
		r := s.lab.Prepare(t, rt, counter)
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := r.create(ctx, &from)
		cancel()
		if err == nil {
			continue // it was faster
		}
		want(t, "Create that runs out of time", err, context.DeadlineExceeded)
		r.AssertGone()
		reapZombies(0)
	}
}
