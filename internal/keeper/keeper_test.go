package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/program"
)

// TestMain makes the test's binary the keeper it tests, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "supervisor", "worker":
			os.Exit(program.Main(os.Args[1:], program.Config{Runtime: newFakeRuntime, IdleTimeout: idleTimeout}))
		case fakeInitArg:
			fmt.Fprintln(os.Stderr, fakeInit(os.Args[2], os.Args[3]))
			os.Exit(127)
		}
	}
	os.Exit(m.Run())
}

const idleTimeout = 500 * time.Millisecond

// lab is a keeper of one test.
type lab struct {
	t       testing.TB
	dir     string // the keeper's
	root    string // of bundles, logs and exit records
	client  *keeper.Client
	handler keeper.Handler
}

func newLab(t testing.TB) *lab {
	t.Helper()
	root := t.TempDir()
	l := &lab{t: t, dir: filepath.Join(root, "keepers", "k"), root: root, handler: keeper.Handler{Kind: keeper.Builtin}}
	l.client = l.connect()
	t.Cleanup(l.end)
	return l
}

func (l *lab) connect() *keeper.Client {
	l.t.Helper()
	c, err := keeper.Ensure(l.ctx(), keeper.Config{Dir: l.dir, Binary: os.Args[0], Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		l.t.Fatal(err, l.keeperLog())
	}
	return c
}

func (l *lab) keeperLog() string {
	data, _ := os.ReadFile(filepath.Join(l.dir, "log"))
	return "\n" + string(data)
}

func (l *lab) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	l.t.Cleanup(cancel)
	return ctx
}

// end deletes all containers and waits for the keeper to go by itself.
func (l *lab) end() {
	if log := l.keeperLog(); l.t.Failed() || strings.Contains(log, "DATA RACE") || strings.Contains(log, "goroutine ") {
		l.t.Error(log)
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
	waitFor(l.t, func() bool { _, err := os.Stat(l.dir); return errors.Is(err, fs.ErrNotExist) })
}

// kill kills a process and waits for its end.
func (l *lab) kill(p host.Process) {
	l.t.Helper()
	h, err := p.Open()
	if err != nil {
		return
	}
	defer h.Close()
	h.Signal(unix.SIGKILL)
	if err := h.Wait(l.ctx()); err != nil {
		l.t.Error(err)
	}
}

// stop stops a process, lest it does something before it is killed.
func (l *lab) stop(p host.Process) {
	if h, err := p.Open(); err == nil {
		defer h.Close()
		h.Signal(unix.SIGSTOP)
	}
}

func (l *lab) info() keeper.Info {
	l.t.Helper()
	info, err := l.client.Info(l.ctx())
	if err != nil {
		l.t.Fatal(err, l.keeperLog())
	}
	return info
}

func (l *lab) request(id string, args ...string) keeper.CreateRequest {
	l.t.Helper()
	bundle := filepath.Join(l.root, "bundle-"+id)
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		l.t.Fatal(err)
	}
	data, err := json.Marshal(specs.Spec{Process: &specs.Process{Args: args, Env: os.Environ(), Cwd: "/"}})
	if err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		l.t.Fatal(err)
	}
	return keeper.CreateRequest{
		ID: id, PodID: "pod-" + id, Bundle: bundle, Handler: l.handler,
		LogPath: l.logPath(id), ExitRecord: filepath.Join(l.root, id+".exit"),
	}
}

func (l *lab) logPath(id string) string { return filepath.Join(l.root, id+".log") }

// sh creates and starts a container that runs a shell script.
func (l *lab) sh(id, script string) keeper.CreateRequest {
	l.t.Helper()
	r := l.request(id, "sh", "-c", script)
	if _, err := l.client.Create(l.ctx(), r); err != nil {
		l.t.Fatal(err, l.keeperLog())
	}
	if _, err := l.client.Start(l.ctx(), id); err != nil {
		l.t.Fatal(err, l.keeperLog())
	}
	return r
}

func (l *lab) waitExit(r keeper.CreateRequest) keeper.Exit {
	l.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		e, err := keeper.ReadExit(r.ExitRecord)
		if err == nil {
			return e
		}
		if !errors.Is(err, fs.ErrNotExist) {
			l.t.Fatal(err)
		}
	}
	l.t.Fatalf("container %s: no exit record%s", r.ID, l.keeperLog())
	return keeper.Exit{}
}

func (l *lab) find(id string) *keeper.ContainerState {
	l.t.Helper()
	list, err := l.client.List(l.ctx())
	if err != nil {
		l.t.Fatal(err)
	}
	for _, c := range list {
		if c.ID == id {
			return &c
		}
	}
	return nil
}

// output is what the container has written, put together from its log.
func (l *lab) output(path string) string {
	l.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		l.t.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break // being written
		}
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			l.t.Fatalf("malformed line %q", line)
		}
		b.WriteString(f[3])
		if f[2] == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

func TestLife(t *testing.T) {
	l := newLab(t)
	r := l.request("c1", "sh", "-c", "echo out; echo err >&2; exit 3")
	created, err := l.client.Create(l.ctx(), r)
	if err != nil {
		t.Fatal(err)
	}
	if s := l.find("c1"); s == nil || s.State != keeper.Created || s.Process != created.Process || s.PodID != r.PodID || s.CreatedAt.IsZero() {
		t.Fatalf("got %+v", s)
	}
	again, err := l.client.Create(l.ctx(), r)
	if err != nil || again != created {
		t.Fatalf("create again: %+v, %v", again, err)
	}
	if _, err := l.client.Start(l.ctx(), "c1"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.client.Start(l.ctx(), "c1"); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("start again: %v", err)
	}
	if e := l.waitExit(r); e.Code != 3 || e.Signal != 0 || e.FinishedAt.IsZero() || e.OOMKilled {
		t.Fatalf("got %+v", e)
	}
	if got := l.output(r.LogPath); got != "out\nerr\n" && got != "err\nout\n" {
		t.Fatalf("log: %q", got)
	}
	waitFor(t, func() bool {
		s := l.find("c1")
		return s.State == keeper.Exited && s.Exit.Code == 3 && !s.StartedAt.IsZero()
	})
	if err := l.client.Signal(l.ctx(), "c1", unix.SIGTERM, false); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("signal after exit: %v", err)
	}
	for range 2 {
		if err := l.client.Delete(l.ctx(), "c1"); err != nil {
			t.Fatal(err)
		}
	}
	if s := l.find("c1"); s != nil {
		t.Fatalf("still there: %+v", s)
	}
	if entries, _ := os.ReadDir(filepath.Join(l.dir, "containers")); len(entries) != 0 {
		t.Fatalf("left behind: %v", entries)
	}
	if _, err := keeper.ReadExit(r.ExitRecord); err != nil {
		t.Fatal(err)
	}
	if err := l.client.Signal(l.ctx(), "c1", unix.SIGTERM, false); !errdefs.IsNotFound(err) {
		t.Fatalf("signal after delete: %v", err)
	}
}

func TestSignals(t *testing.T) {
	l := newLab(t)
	r := l.sh("term", "exec sleep 100")
	if err := l.client.Signal(l.ctx(), "term", unix.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if e := l.waitExit(r); e.Code != 143 || e.Signal != 15 {
		t.Fatalf("got %+v", e)
	}
	r = l.sh("kill", "sleep 100; :")
	if err := l.client.Delete(l.ctx(), "kill"); err != nil {
		t.Fatal(err)
	}
	if e := l.waitExit(r); e.Code != 137 || e.Signal != 9 {
		t.Fatalf("got %+v", e)
	}
}

func TestFailedCreate(t *testing.T) {
	l := newLab(t)
	tests := map[string]struct {
		edit func(*keeper.CreateRequest)
		want func(error) bool
	}{
		"no bundle":  {func(r *keeper.CreateRequest) { r.Bundle = "/absent" }, func(err error) bool { return err != nil }},
		"no log dir": {func(r *keeper.CreateRequest) { r.LogPath = "/absent/log" }, func(err error) bool { return err != nil }},
		"bad id":     {func(r *keeper.CreateRequest) { r.ID = "../x" }, errdefs.IsInvalidArgument},
		"no pod id":  {func(r *keeper.CreateRequest) { r.PodID = "" }, errdefs.IsInvalidArgument},
		"handler":    {func(r *keeper.CreateRequest) { r.Handler.Kind = "x" }, errdefs.IsInvalidArgument},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := l.request("f", "true")
			tt.edit(&r)
			if _, err := l.client.Create(l.ctx(), r); !tt.want(err) {
				t.Fatalf("got %v", err)
			}
			if entries, _ := os.ReadDir(filepath.Join(l.dir, "containers")); len(entries) != 0 {
				t.Fatalf("left behind: %v", entries)
			}
		})
	}
}

func TestWatch(t *testing.T) {
	l := newLab(t)
	early := l.sh("early", "exit 1")
	l.waitExit(early)
	var (
		mu     sync.Mutex
		exits  = map[string]int32{}
		rounds int
	)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- l.client.Watch(ctx, func(list []keeper.ContainerState) {
			mu.Lock()
			defer mu.Unlock()
			rounds++
			for _, c := range list {
				if c.Exit != nil {
					exits[c.ID] = c.Exit.Code
				}
			}
		}, func(e keeper.Event) {
			mu.Lock()
			defer mu.Unlock()
			exits[e.ID] = e.Exit.Code
			if e.PodID != "pod-"+e.ID {
				t.Errorf("pod %s", e.PodID)
			}
		})
	}()
	has := func(id string, code int32) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			got, ok := exits[id]
			return ok && got == code
		}
	}
	waitFor(t, has("early", 1))
	l.sh("live", "exit 2")
	waitFor(t, has("live", 2))
	l.sh("after", "sleep 0.2; exit 4")
	l.kill(l.info().Worker)
	waitFor(t, has("after", 4))
	mu.Lock()
	if rounds < 2 {
		t.Errorf("connected %d times", rounds)
	}
	mu.Unlock()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestReopenLog(t *testing.T) {
	l := newLab(t)
	if err := unix.Mkfifo(l.root+"/gate", 0o600); err != nil {
		t.Fatal(err)
	}
	r := l.sh("c", "echo one; read x < "+l.root+"/gate; echo two")
	waitFor(t, func() bool { return l.output(r.LogPath) == "one\n" })
	if err := os.Rename(r.LogPath, r.LogPath+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.client.ReopenLog(l.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.root+"/gate", []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.waitExit(r)
	if got := l.output(r.LogPath); got != "two\n" {
		t.Fatalf("got %q", got)
	}
	waitFor(t, func() bool { return l.find("c").State == keeper.Exited })
	if err := l.client.ReopenLog(l.ctx(), "c"); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("after exit: %v", err)
	}
}

func TestExec(t *testing.T) {
	l := newLab(t)
	l.sh("c", "sleep 100")
	const limit = 1 << 20
	exec := func(timeout time.Duration, script string) (string, string, keeper.ExecResult, time.Duration) {
		t.Helper()
		begin := time.Now()
		out, errs, res, err := l.client.ExecOutput(l.ctx(), keeper.ExecRequest{ID: "c", Args: []string{"sh", "-c", script}, Timeout: timeout}, limit)
		if err != nil {
			t.Fatal(err)
		}
		return string(out), string(errs), res, time.Since(begin)
	}
	if out, errs, res, _ := exec(0, "echo o; echo e >&2; exit 5"); out != "o\n" || errs != "e\n" || res.ExitCode != 5 || res.TimedOut {
		t.Fatalf("got %q, %q, %+v", out, errs, res)
	}
	if out, _, res, _ := exec(0, "head -c 3000000 /dev/zero; exit 1"); len(out) != limit || res.ExitCode != 1 {
		t.Fatalf("got %d bytes, %+v", len(out), res)
	}
	if _, _, res, _ := exec(0, "kill -USR1 $$"); res.ExitCode != 138 {
		t.Fatalf("got %+v", res)
	}
	// A child that holds stdio is not waited for.
	if out, _, res, d := exec(0, "echo before; sleep 60 & exit 6"); out != "before\n" || res.ExitCode != 6 || d > 30*time.Second {
		t.Fatalf("got %q, %+v after %v", out, res, d)
	}
	// With a timeout, neither grandchild nor orphan stays.
	marker := fmt.Sprint("sleep 10", rand.IntN(1e6)+1e6)
	out, _, res, d := exec(1500*time.Millisecond, "echo before; (("+marker+" & ); "+marker+" & wait) & wait")
	if out != "before\n" || !res.TimedOut || res.ExitCode != 137 || d > 30*time.Second {
		t.Fatalf("got %q, %+v after %v", out, res, d)
	}
	waitFor(t, func() bool { return countProcesses(marker) == 0 })

	// A caller who gives up takes the process along.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := l.client.Exec(ctx, keeper.ExecRequest{ID: "c", Args: strings.Fields(marker)}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	waitFor(t, func() bool { return countProcesses(marker) == 0 })

	if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "none", Args: []string{"true"}}); !errdefs.IsNotFound(err) {
		t.Fatalf("unknown container: %v", err)
	}
	if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "c"}); !errdefs.IsInvalidArgument(err) {
		t.Fatalf("no arguments: %v", err)
	}
	if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "c", Args: []string{"/absent"}}); err == nil {
		t.Fatal("no such program: no error")
	}
	if _, err := l.client.Create(l.ctx(), l.request("created", "true")); err != nil {
		t.Fatal(err)
	}
	if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "created", Args: []string{"true"}}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("not started: %v", err)
	}
}

// TestExecDiesWithWorker kills the worker under an exec.
func TestExecDiesWithWorker(t *testing.T) {
	l := newLab(t)
	l.sh("c", "sleep 100")
	marker := fmt.Sprint("sleep 10", rand.IntN(1e6)+1e6)
	result := make(chan error)
	go func() {
		_, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "c", Args: strings.Fields(marker)})
		result <- err
	}()
	waitFor(t, func() bool { return countProcesses(marker) == 1 })
	l.kill(l.info().Worker)
	if err := <-result; !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v", err)
	}
	waitFor(t, func() bool { return countProcesses(marker) == 0 })
}

func countProcesses(cmdline string) int {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	n := 0
	for _, p := range paths {
		data, _ := os.ReadFile(p)
		if strings.TrimSpace(strings.ReplaceAll(string(data), "\x00", " ")) == cmdline {
			n++
		}
	}
	return n
}

// TestKilled kills the keeper's processes while containers run, and checks that
// the containers' output and exit codes come through.
func TestKilled(t *testing.T) {
	for name, kill := range map[string]func(*lab, keeper.Info){
		"worker":     func(l *lab, i keeper.Info) { l.kill(i.Worker) },
		"supervisor": func(l *lab, i keeper.Info) { l.kill(i.Supervisor) },
		"both": func(l *lab, i keeper.Info) {
			l.stop(i.Worker) // lest it becomes the supervisor
			l.kill(i.Supervisor)
			l.kill(i.Worker)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			const n = 4
			var requests []keeper.CreateRequest
			for i := range n {
				requests = append(requests, l.sh(fmt.Sprint("c", i), fmt.Sprintf(
					"i=0; while test ! -e %s/stop; do echo line $i; i=$((i+1)); done; echo end; exit %d", l.root, 40+i)))
			}
			created := l.request("created", "sh", "-c", "exit 9")
			if _, err := l.client.Create(l.ctx(), created); err != nil {
				t.Fatal(err)
			}
			for round := range 3 {
				time.Sleep(50 * time.Millisecond)
				before := l.info()
				kill(l, before)
				// The worker may answer before it has noticed.
				begin := time.Now()
				waitFor(t, func() bool {
					after := l.info()
					return after.Worker != before.Worker
				})
				t.Logf("round %d: %v", round, time.Since(begin))
				for _, r := range requests {
					if s := l.find(r.ID); s == nil || s.State != keeper.Running || s.StartedAt.IsZero() {
						t.Fatalf("container %s: %+v%s", r.ID, s, l.keeperLog())
					}
				}
				if s := l.find("created"); s == nil || s.State != keeper.Created {
					t.Fatalf("created container: %+v", s)
				}
			}
			if err := os.WriteFile(l.root+"/stop", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			for i, r := range requests {
				if e := l.waitExit(r); e.Code != int32(40+i) {
					t.Errorf("container %d: %+v", i, e)
				}
				checkNumbered(t, l.output(r.LogPath))
			}
			if _, err := l.client.Start(l.ctx(), "created"); err != nil {
				t.Fatal(err)
			}
			if e := l.waitExit(created); e.Code != 9 {
				t.Errorf("created container: %+v", e)
			}
		})
	}
}

// checkNumbered checks output of "line 0", "line 1" and so on, and "end".
func checkNumbered(t testing.TB, output string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(output, "\n"), "\n")
	for i, line := range lines[:len(lines)-1] {
		if line != fmt.Sprint("line ", i) {
			t.Errorf("line %d is %q", i, line)
			return
		}
	}
	if last := lines[len(lines)-1]; last != "end" {
		t.Errorf("last line is %q", last)
	}
}

// TestExitWithoutWorker has containers exit while the supervisor is alone.
func TestExitWithoutWorker(t *testing.T) {
	l := newLab(t)
	var requests []keeper.CreateRequest
	for i := range 10 {
		requests = append(requests, l.sh(fmt.Sprint("c", i), fmt.Sprintf("echo line 0; sleep 0.%d; echo end; exit %d", i+1, i+1)))
	}
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
		l.kill(l.info().Worker)
	}
	for i, r := range requests {
		if e := l.waitExit(r); e.Code != int32(i+1) {
			t.Errorf("container %d: %+v", i, e)
		}
		checkNumbered(t, l.output(r.LogPath))
	}
}

// TestKilledAtRandom does what a node does, and kills worker or supervisor at
// random instants meanwhile. Whatever was asked for either is, or is not and can
// be asked for again.
func TestKilledAtRandom(t *testing.T) {
	l := newLab(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	duration := 3 * time.Second
	if testing.Short() {
		duration = time.Second
	}
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	var killer, users sync.WaitGroup
	kills := 0
	killer.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 0))
		for ctx.Err() == nil {
			time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
			info, err := l.client.Info(ctx)
			if err != nil {
				continue
			}
			kills++
			if rnd.IntN(3) == 0 {
				l.kill(info.Supervisor)
			} else {
				l.kill(info.Worker)
			}
		}
	})
	done := make([]int, 3)
	for u := range done {
		users.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				id := fmt.Sprintf("u%d-%d", u, n)
				code := n % 100
				r := l.request(id, "sh", "-c", fmt.Sprintf("echo line 0; echo end; exit %d", code))
				if _, err := l.client.Create(l.ctx(), r); err != nil {
					t.Errorf("create: %v", err)
					return
				}
				if _, err := l.client.Start(l.ctx(), id); err != nil {
					t.Errorf("start: %v", err)
					return
				}
				e := l.waitExit(r)
				if e.Code != int32(code) {
					t.Errorf("container %s: %+v", id, e)
				}
				checkNumbered(t, l.output(r.LogPath))
				if err := l.client.Delete(l.ctx(), id); err != nil {
					t.Errorf("delete: %v", err)
				}
				done[u]++
			}
		})
	}
	users.Wait()
	killer.Wait()
	if list, err := l.client.List(l.ctx()); err != nil || len(list) != 0 {
		t.Errorf("left: %+v, %v", list, err)
	}
	t.Logf("%d kills, %v containers", kills, done)
}

// A keeper that dies on its way up is started again, a few times.
func TestDiesOnItsWayUp(t *testing.T) {
	root := t.TempDir()
	dir, deaths, binary := filepath.Join(root, "k"), filepath.Join(root, "deaths"), filepath.Join(root, "keeper")
	if err := os.WriteFile(deaths, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ensure := func(after int) (*keeper.Client, error) {
		script := fmt.Sprintf("#!/bin/sh\n[ $(wc -l <%s) -ge %d ] && exec %s \"$@\"\necho dying | tee -a %[1]s\n", deaths, after, os.Args[0])
		if err := os.WriteFile(binary, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		return keeper.Ensure(t.Context(), keeper.Config{Dir: dir, Binary: binary})
	}
	if _, err := ensure(1000); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "start keeper: it exited") || !strings.Contains(err.Error(), "dying") {
		t.Errorf("it always dies: %v", err)
	}
	before, err := os.ReadFile(deaths)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ensure(strings.Count(string(before), "\n") + 2)
	if err != nil {
		t.Fatalf("it dies twice: %v", err)
	}
	c.Close()
	waitFor(t, func() bool { _, err := os.Stat(dir); return errors.Is(err, fs.ErrNotExist) })
}

func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatal("condition is not met in time")
}

// A worker takes the place of its supervisor also while it gets to know a runtime,
// for which it starts programs.
func TestKilledWhileRuntimeStarts(t *testing.T) {
	l := newLab(t)
	before := l.info()
	r := l.request("c", "sh", "-c", "exit 7")
	r.Handler.Path = slowHandler
	created := make(chan error, 1)
	go func() {
		_, err := l.client.Create(l.ctx(), r)
		created <- err
	}()
	time.Sleep(slowStart / 2)
	l.kill(before.Supervisor)
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	if _, err := l.client.Start(l.ctx(), r.ID); err != nil {
		t.Fatal(err)
	}
	if e := l.waitExit(r); e.Code != 7 {
		t.Errorf("%+v", e)
	}
	if after := l.info(); after.Supervisor == before.Supervisor {
		t.Error("nobody took the supervisor's place")
	}
}

// A keeper that cannot start says why, in the error that the client gets.
func TestDoesNotStart(t *testing.T) {
	program := filepath.Join(t.TempDir(), "keeper")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho first line >&2\necho no cgroups here >&2\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := keeper.Ensure(t.Context(), keeper.Config{Dir: filepath.Join(t.TempDir(), "k"), Binary: program})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), ": no cgroups here: ") {
		t.Fatalf("got %v", err)
	}
}
