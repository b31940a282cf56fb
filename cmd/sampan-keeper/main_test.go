package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/program"
	"sampan.dev/sampan/internal/ociruntime/builtin"
	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// TestMain makes the test's binary the keeper that it tests.
func TestMain(m *testing.M) {
	builtin.Init()
	if len(os.Args) > 1 && (os.Args[1] == "supervisor" || os.Args[1] == "worker") {
		os.Exit(program.Main(os.Args[1:], program.Config{Runtime: runtimeOf, IdleTimeout: 300 * time.Millisecond}))
	}
	os.Exit(m.Run())
}

// TestImports keeps what is paid for at every start of a container, and what could
// be attacked from the network, out of the keeper.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "netgo,osusergo,seccomp,static_build", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range strings.Lines(string(out)) {
		pkg = strings.TrimSpace(pkg)
		for _, banned := range []string{
			"net/http", "crypto/tls", "k8s.io/", "google.golang.org/grpc/internal/transport", "html/template", "text/template",
			"sampan.dev/sampan/internal/cri", "sampan.dev/sampan/internal/pod", "sampan.dev/sampan/internal/image",
		} {
			if pkg == banned || strings.HasPrefix(pkg, strings.TrimSuffix(banned, "/")+"/") {
				t.Errorf("the keeper imports %s", pkg)
			}
		}
		if pkg == "google.golang.org/grpc" {
			t.Errorf("the keeper imports %s", pkg)
		}
	}
}

type lab struct {
	*conformance.Lab
	t      testing.TB
	dir    string
	client *keeper.Client
	kind   keeper.Handler
}

// handlers are those that this machine has.
func handlers() map[string]keeper.Handler {
	h := map[string]keeper.Handler{"builtin": {Kind: keeper.Builtin}}
	if path, err := exec.LookPath("runc"); err == nil {
		h["runc"] = keeper.Handler{Kind: keeper.CLI, Path: path}
	}
	return h
}

func eachHandler(t *testing.T, fn func(*testing.T, *lab)) {
	for name, h := range handlers() {
		t.Run(name, func(t *testing.T) { fn(t, newLab(t, h)) })
	}
}

func newLab(t testing.TB, h keeper.Handler) *lab {
	l := &lab{Lab: conformance.NewLab(t), t: t, dir: t.TempDir(), kind: h}
	var err error
	cgroup := fmt.Sprintf("/sampan.keeper-test-%d", os.Getpid())
	l.client, err = keeper.Ensure(l.ctx(), keeper.Config{Dir: filepath.Join(l.dir, "keeper"), Binary: os.Args[0], Cgroup: cgroup})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.end(cgroup) })
	return l
}

func (l *lab) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	l.t.Cleanup(cancel)
	return ctx
}

// end deletes the containers and waits until the keeper has gone by itself and has
// left nothing.
func (l *lab) end(cgroup string) {
	log, _ := os.ReadFile(filepath.Join(l.dir, "keeper/log"))
	if l.t.Failed() || strings.Contains(string(log), "DATA RACE") || strings.Contains(string(log), "goroutine ") {
		l.t.Errorf("log of the keeper:\n%s", log)
	}
	list, err := l.client.List(l.ctx())
	if err != nil {
		l.t.Error(err)
	}
	for _, c := range list {
		if err := l.client.Delete(l.ctx(), c.ID); err != nil {
			l.t.Error(err)
		}
	}
	l.client.Close()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroup)
		_, err := os.Stat(filepath.Join(l.dir, "keeper"))
		if len(dirs) == 0 && errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			l.t.Errorf("the keeper does not go: %v, cgroups %v", err, dirs)
			return
		}
	}
}

func (l *lab) create(id string, args []string, edits ...func(*specs.Spec)) keeper.CreateRequest {
	l.t.Helper()
	id = fmt.Sprintf("%s-%d", id, os.Getpid())
	spec := l.Spec(id, args...)
	for _, edit := range edits {
		edit(spec)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		l.t.Fatal(err)
	}
	r := keeper.CreateRequest{
		ID: id, PodID: "pod", Bundle: filepath.Join(l.dir, id), Handler: l.kind, Terminal: spec.Process.Terminal,
		LogPath: filepath.Join(l.dir, id+".log"), ExitRecord: filepath.Join(l.dir, id+".exit"),
	}
	if err := errors.Join(os.Mkdir(r.Bundle, 0o755), os.WriteFile(filepath.Join(r.Bundle, "config.json"), data, 0o600)); err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.client.Create(l.ctx(), r); err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *lab) sh(id, script string, edits ...func(*specs.Spec)) keeper.CreateRequest {
	l.t.Helper()
	r := l.create(id, []string{"/bin/sh", "-c", script}, edits...)
	if _, err := l.client.Start(l.ctx(), r.ID); err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *lab) waitExit(r keeper.CreateRequest) keeper.Exit {
	l.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if e, err := keeper.ReadExit(r.ExitRecord); err == nil {
			return e
		}
	}
	l.t.Fatalf("container %s: no exit record", r.ID)
	return keeper.Exit{}
}

func (l *lab) output(r keeper.CreateRequest) string {
	data, err := os.ReadFile(r.LogPath)
	if err != nil {
		l.t.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		b.WriteString(f[3])
		if f[2] == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

func TestLife(t *testing.T) {
	eachHandler(t, func(t *testing.T, l *lab) {
		r := l.sh("life", "echo out; echo again > /dev/stdout; hostname; exit 7")
		if e := l.waitExit(r); e.Code != 7 || e.OOMKilled {
			t.Fatalf("got %+v", e)
		}
		if got := l.output(r); got != "out\nagain\nlab\n" {
			t.Fatalf("log: %q", got)
		}
		r = l.sh("unstarted", "sleep 100")
		if err := l.client.Signal(l.ctx(), r.ID, unix.SIGKILL, false); err != nil {
			t.Fatal(err)
		}
		if e := l.waitExit(r); e.Code != 137 || e.Signal != 9 || e.OOMKilled {
			t.Fatalf("got %+v", e)
		}
	})
}

func TestTerminal(t *testing.T) {
	eachHandler(t, func(t *testing.T, l *lab) {
		r := l.sh("tty", "tty; echo to the terminal; exit 5", func(s *specs.Spec) { s.Process.Terminal = true })
		if e := l.waitExit(r); e.Code != 5 {
			t.Fatalf("got %+v", e)
		}
		if got := l.output(r); got != "/dev/pts/0\r\nto the terminal\r\n" {
			t.Fatalf("log: %q", got)
		}
	})
}

// TestOOM has a process killed for want of memory, the first one or a child.
func TestOOM(t *testing.T) {
	const hog = "x=0123456789abcdef; while :; do x=$x$x; done"
	limit := func(s *specs.Spec) {
		bytes := int64(64 << 20) // the race detector wants much of it before the program starts
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &bytes, Swap: &bytes}
	}
	eachHandler(t, func(t *testing.T, l *lab) {
		r := l.sh("oom", hog, limit)
		if e := l.waitExit(r); e.Code != 137 || !e.OOMKilled || e.OOMKills == 0 {
			t.Errorf("the first process: %+v", e)
		}
		r = l.sh("oomchild", "sh -c '"+hog+"'; exit $?", limit)
		if e := l.waitExit(r); e.Code != 137 || !e.OOMKilled || e.OOMKills == 0 {
			t.Errorf("a child: %+v", e)
		}
	})
}

func TestExec(t *testing.T) {
	eachHandler(t, func(t *testing.T, l *lab) {
		r := l.sh("exec", "trap 'exit 0' TERM; sleep 1000 & wait")
		out, errs, res, err := l.client.ExecOutput(l.ctx(), keeper.ExecRequest{ID: r.ID, Args: []string{"sh", "-c", "hostname; echo e >&2; exit 3"}}, 1<<20)
		if err != nil || string(out) != "lab\n" || string(errs) != "e\n" || res.ExitCode != 3 {
			t.Fatalf("got %q, %q, %+v, %v", out, errs, res, err)
		}
		begin := time.Now()
		out, _, res, err = l.client.ExecOutput(l.ctx(), keeper.ExecRequest{
			ID: r.ID, Args: []string{"sh", "-c", "echo before; (sleep 1234 &); sleep 1234"}, Timeout: 1500 * time.Millisecond,
		}, 1<<20)
		if err != nil || string(out) != "before\n" || !res.TimedOut || res.ExitCode != 137 || time.Since(begin) > 30*time.Second {
			t.Fatalf("got %q, %+v, %v after %v", out, res, err, time.Since(begin))
		}
		out, _, _, err = l.client.ExecOutput(l.ctx(), keeper.ExecRequest{ID: r.ID, Args: []string{"sh", "-c", "ps | grep -c 'sleep 123[4]'"}}, 1<<20)
		if err != nil || string(out) != "0\n" {
			t.Fatalf("left: %q, %v", out, err)
		}
		if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: r.ID, Args: []string{"/bin/absent"}}); err == nil {
			t.Error("no such program: no error")
		}
		if l.kind.Kind == keeper.Builtin {
			l.execTerminal(r.ID)
		}
	})
}

func (l *lab) execTerminal(id string) {
	l.t.Helper()
	var screen strings.Builder
	shown := make(chan struct{})
	res, err := l.client.Exec(l.ctx(), keeper.ExecRequest{
		ID: id, Args: []string{"sh", "-c", "stty size; read x; echo got $x; exit 4"}, Terminal: true, Width: 90, Height: 30,
		OnConsole: func(master *os.File) {
			go func() {
				defer close(shown)
				defer master.Close()
				io.WriteString(master, "hello\n")
				io.Copy(&screen, master)
			}()
		},
	})
	<-shown
	if err != nil || res.ExitCode != 4 {
		l.t.Fatalf("got %+v, %v", res, err)
	}
	if got := screen.String(); !strings.Contains(got, "30 90") || !strings.Contains(got, "got hello") {
		l.t.Fatalf("screen: %q", got)
	}
}

// TestKilled kills worker, supervisor, and both.
func TestKilled(t *testing.T) {
	eachHandler(t, func(t *testing.T, l *lab) {
		const script = "trap 'echo end; exit 33' TERM; i=0; while :; do echo line $i; i=$((i+1)); test $((i%1000)) = 0 && usleep 1000; done"
		requests := []keeper.CreateRequest{l.sh("a", script), l.sh("b", script)}
		created := l.create("created", []string{"sh", "-c", "exit 9"})
		for round := range 9 {
			time.Sleep(30 * time.Millisecond)
			info, err := l.client.Info(l.ctx())
			if err != nil {
				t.Fatal(err)
			}
			switch round % 3 {
			case 0:
				kill(t, info.Worker)
			case 1:
				kill(t, info.Supervisor)
			case 2:
				signal(info.Worker, unix.SIGSTOP)
				kill(t, info.Supervisor)
				kill(t, info.Worker)
			}
		}
		for _, r := range requests {
			if err := l.client.Signal(l.ctx(), r.ID, unix.SIGTERM, false); err != nil {
				t.Fatal(err)
			}
			if e := l.waitExit(r); e.Code != 33 {
				t.Errorf("got %+v", e)
			}
			lines := strings.Split(strings.TrimSuffix(l.output(r), "\n"), "\n")
			for i, line := range lines[:len(lines)-1] {
				if line != fmt.Sprint("line ", i) {
					t.Errorf("line %d is %q", i, line)
					break
				}
			}
			if last := lines[len(lines)-1]; last != "end" {
				t.Errorf("last line is %q", last)
			}
		}
		if _, err := l.client.Start(l.ctx(), created.ID); err != nil {
			t.Fatal(err)
		}
		if e := l.waitExit(created); e.Code != 9 {
			t.Errorf("got %+v", e)
		}
	})
}

func signal(p host.Process, sig unix.Signal) {
	if h, err := p.Open(); err == nil {
		defer h.Close()
		h.Signal(sig)
	}
}

func kill(t testing.TB, p host.Process) {
	h, err := p.Open()
	if err != nil {
		return
	}
	defer h.Close()
	h.Signal(unix.SIGKILL)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := h.Wait(ctx); err != nil {
		t.Error(err)
	}
}

func BenchmarkLife(b *testing.B) {
	l := newLab(b, keeper.Handler{Kind: keeper.Builtin})
	n := 0
	for b.Loop() {
		n++
		r := l.sh(fmt.Sprint("bench", n), "exit 0")
		l.waitExit(r)
		if err := l.client.Delete(l.ctx(), r.ID); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkExec(b *testing.B) {
	l := newLab(b, keeper.Handler{Kind: keeper.Builtin})
	r := l.sh("exec", "sleep 1000")
	for b.Loop() {
		if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: r.ID, Args: []string{"true"}}); err != nil {
			b.Fatal(err)
		}
	}
}
