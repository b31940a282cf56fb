package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/keeper"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestLifecycle(t *testing.T) {
	l := newLab(t)
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	p := id(s.Run(ctx, podNamed("a"), ""))
	if st, err := s.Get(p[:12]); err != nil || !st.Ready || st.ID != p {
		t.Fatalf("by the start of its id: %+v, %v", st, err)
	}
	c := id(s.CreateContainer(ctx, p, containerNamed("c")))
	if st, _ := s.GetContainer(c); st.State != Created || !st.StartedAt.IsZero() || st.StopSignal != unix.SIGTERM {
		t.Fatalf("created: %+v", st)
	}
	if err := s.StartContainer(ctx, c); err != nil {
		t.Fatal(err)
	}
	if err := s.StartContainer(ctx, c); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("started twice: %v", err)
	}
	for range 2 {
		if err := s.StopContainer(ctx, c, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if st, _ := s.GetContainer(c); st.State != Exited || st.Exit.Code != 143 || st.StartedAt.IsZero() {
		t.Fatalf("stopped: %+v", st)
	}
	for range 2 {
		if err := errors.Join(s.RemoveContainer(ctx, c), s.Stop(ctx, p)); err != nil {
			t.Fatal(err)
		}
	}
	if st, _ := s.Get(p); st.Ready {
		t.Fatal("a stopped pod is ready")
	}
	if _, err := s.CreateContainer(ctx, p, containerNamed("d")); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("create in a stopped pod: %v", err)
	}
	for range 2 {
		if err := s.Remove(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	l.checkEmpty(s)
}

// The kubelet repeats requests whose answers it did not get.
func TestRepeatedRequestsAreOne(t *testing.T) {
	l := newLab(t)
	s := l.start()
	ids := make([]string, 16)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			p, err := s.Run(t.Context(), podNamed("a"), "")
			if err != nil {
				t.Error(err)
				return
			}
			ids[i], err = s.CreateContainer(t.Context(), p, containerNamed("c"))
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("different containers: %v", ids)
		}
	}
	if l.keeper.creates != 1 {
		t.Fatalf("created %d times", l.keeper.creates)
	}
	other := podNamed("a")
	other.LogDirectory = "/elsewhere"
	if _, err := s.Run(t.Context(), other, ""); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("same pod, other configuration: %v", err)
	}
}

// A request that would join another one's work, but asks for something else, does
// not get what the other asked for.
func TestOtherRequestsAreNotJoined(t *testing.T) {
	s := newLab(t).start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	run := func(dir string) error {
		c := podNamed("b")
		c.LogDirectory = dir
		_, err := s.Run(t.Context(), c, "")
		return err
	}
	create := func(dir string) error {
		c := containerNamed("c")
		c.WorkingDir = dir
		_, err := s.CreateContainer(t.Context(), p, c)
		return err
	}
	for name, call := range map[string]func(string) error{"run": run, "create": create} {
		var wg sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			wg.Go(func() { errs[i] = call([]string{"/one", "/other"}[i%2]) })
		}
		wg.Wait()
		for i := range errs {
			same, other := errs[i], errs[(i+1)%len(errs)]
			if (same == nil) == (other == nil) || same != nil && !errdefs.IsAlreadyExists(same) {
				t.Errorf("%s: of two configurations, one must be refused: %v and %v", name, same, other)
				break
			}
		}
	}
}

func TestFailuresAreUndone(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	c := containerNamed("c")
	tests := map[string]func(){
		"mount":  func() { l.layers.fail = errdefs.ErrResourceExhausted },
		"keeper": func() { l.layers.fail = nil; l.keeper.failCreate = errdefs.ErrInvalidArgument },
	}
	for _, name := range []string{"mount", "keeper"} {
		tests[name]()
		if _, err := s.CreateContainer(t.Context(), p, c); err == nil {
			t.Fatalf("%s: no error", name)
		}
		if len(s.ListContainers()) != 0 {
			t.Fatalf("%s: still listed", name)
		}
	}
	l.keeper.failCreate = nil
	must[string](t)(s.CreateContainer(t.Context(), p, c))
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Run(t.Context(), podNamed("b"), "absent"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "builtin") {
		t.Fatalf("unknown handler: %v", err)
	}
	l.checkEmpty(s)
}

func TestBadRequests(t *testing.T) {
	s := newLab(t).start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	with := func(change func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
		c := containerNamed("c")
		change(c)
		return c
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mount := func(path string) *runtimeapi.ContainerConfig {
		return with(func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: path, ContainerPath: "/m"}}
		})
	}
	tests := map[string]struct {
		config *runtimeapi.ContainerConfig
		is     func(error) bool
		says   string
	}{
		"missing image": {with(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "absent" }), errdefs.IsNotFound, "absent"},
		"relative path": {mount("x/y"), errdefs.IsInvalidArgument, "mounts[0].host_path"},
		"lost volume":   {mount("/var/lib/kubelet/pods/uid-a/volumes/x"), errdefs.IsInvalidArgument, "kubelet"},
		"path in file":  {mount(file + "/sub"), errdefs.IsInvalidArgument, file},
		"no such target": {with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "none"}
		}), errdefs.IsNotFound, "target_id"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := s.CreateContainer(t.Context(), p, tt.config)
			if !tt.is(err) || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := s.CreateContainer(t.Context(), "none", containerNamed("c")); !errdefs.IsNotFound(err) {
		t.Fatalf("unknown pod: %v", err)
	}
}

// A volume that hangs holds up one container: not a list, not another pod, not
// the stop of its own pod. The retry joins; in the end everything can be removed.
func TestHangingCreate(t *testing.T) {
	l := newLab(t)
	s := l.start()
	hung := must[string](t)(s.Run(t.Context(), podNamed("hung"), ""))
	other := must[string](t)(s.Run(t.Context(), podNamed("other"), ""))
	l.layers.hang = make(chan struct{})
	brief, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	for range 2 {
		if _, err := s.CreateContainer(brief, hung, containerNamed("c")); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("hanging create: %v", err)
		}
	}
	release := l.layers.hang
	l.layers.mu.Lock()
	l.layers.hang = nil
	l.layers.mu.Unlock()
	must[string](t)(s.CreateContainer(t.Context(), other, containerNamed("c")))
	if n := len(s.ListContainers()); n != 1 {
		t.Fatalf("%d containers are listed, want 1", n)
	}
	joined := make(chan error, 1)
	go func() {
		_, err := s.CreateContainer(t.Context(), hung, containerNamed("c"))
		joined <- err
	}()
	time.Sleep(20 * time.Millisecond)
	if err := s.Stop(t.Context(), hung); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(brief, hung); err == nil {
		t.Fatal("a pod was removed under a creation")
	}
	close(release)
	if err := <-joined; !errdefs.IsAborted(err) {
		t.Errorf("a creation that its pod's end has cut off: %v", err)
	}
	if err := errors.Join(s.Remove(t.Context(), hung), s.Remove(t.Context(), other)); err != nil {
		t.Fatal(err)
	}
	l.checkEmpty(s)
}

// runDeaf runs a container that ignores SIGTERM.
func (l *lab) runDeaf(s *Pods) string {
	l.t.Helper()
	p := must[string](l.t)(s.Run(l.t.Context(), podNamed("a"), ""))
	c := must[string](l.t)(s.CreateContainer(l.t.Context(), p, containerNamed("c")))
	if err := s.StartContainer(l.t.Context(), c); err != nil {
		l.t.Fatal(err)
	}
	l.keeper.deaf = true
	return c
}

func TestStopEscalates(t *testing.T) {
	l := newLab(t)
	s := l.start()
	c := l.runDeaf(s)
	if err := s.StopContainer(t.Context(), c, 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if st, _ := s.GetContainer(c); st.Exit.Code != 137 {
		t.Fatalf("exit code %d, want 137", st.Exit.Code)
	}
}

// A container that is removed while it is being stopped has stopped, though its
// keeper's word of that may come when nobody knows it any more.
func TestRemoveEndsStop(t *testing.T) {
	l := newLab(t)
	s := l.start()
	c := l.runDeaf(s)
	stopped := make(chan error, 1)
	go func() { stopped <- s.StopContainer(t.Context(), c, time.Hour) }()
	for signalled := false; !signalled; time.Sleep(time.Millisecond) {
		l.keeper.mu.Lock()
		signalled = l.keeper.signals > 0
		l.keeper.mu.Unlock()
	}
	if err := s.RemoveContainer(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the stop waits for what was removed")
	}
}

// What a daemon left is what the next one finds.
func TestRestart(t *testing.T) {
	l := newLab(t)
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	p := id(s.Run(ctx, podNamed("a"), ""))
	created, running := id(s.CreateContainer(ctx, p, containerNamed("created"))), id(s.CreateContainer(ctx, p, containerNamed("running")))
	gone, lost := id(s.CreateContainer(ctx, p, containerNamed("gone"))), id(s.CreateContainer(ctx, p, containerNamed("lost")))
	for _, c := range []string{running, gone, lost} {
		if err := s.StartContainer(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	stopped := id(s.Run(ctx, podNamed("stopped"), ""))
	if err := s.Stop(ctx, stopped); err != nil {
		t.Fatal(err)
	}
	s.Close()

	l.keeper.watchers = nil // the daemon is away
	l.keeper.exit(gone, keeper.Exit{Code: 3, FinishedAt: time.Now()})
	delete(l.keeper.containers, lost)
	l.keeper.containers["stray"] = &fakeContainer{ContainerState: keeper.ContainerState{ID: "stray"}}
	halfPod, halfContainer := strings.Repeat("1", 64), strings.Repeat("2", 64)
	if err := s.recordPod(&Pod{podRecord: podRecord{ID: halfPod, Keeper: "node", Config: podConfig{podNamed("half")}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.recordContainer(&Container{containerRecord: containerRecord{ID: halfContainer, PodID: p, Config: containerConfig{containerNamed("half")}}}); err != nil {
		t.Fatal(err)
	}
	damaged := strings.Repeat("3", 64)
	if err := os.MkdirAll(filepath.Join(l.dir, "root/pods", damaged), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, "root/pods", damaged, "config"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}

	s = l.start()
	awaitFollow(t, s, lost)
	for c, want := range map[string]struct {
		state State
		code  int32
	}{created: {Created, 0}, running: {Running, 0}, gone: {Exited, 3}, lost: {Exited, keeper.UnknownExitCode}} {
		if st, err := s.GetContainer(c); err != nil || st.State != want.state || st.Exit.Code != want.code {
			t.Errorf("%s: %v, code %d, %v; want %+v", st.Config.GetMetadata().GetName(), st.State, st.Exit.Code, err, want)
		}
	}
	if st, _ := s.Get(p); !st.Ready {
		t.Errorf("a running pod is not ready: %s", st.Problem)
	}
	if st, _ := s.Get(stopped); st.Ready {
		t.Error("a stopped pod is ready")
	}
	if st, err := s.Get(damaged); err != nil || st.Ready || !strings.Contains(st.Problem, "damaged") {
		t.Errorf("a pod with a damaged record: %+v, %v", st, err)
	}
	if _, err := s.Get(halfPod); !errdefs.IsNotFound(err) {
		t.Errorf("a half-made pod: %v", err)
	}
	if _, err := s.GetContainer(halfContainer); !errdefs.IsNotFound(err) {
		t.Errorf("a half-made container: %v", err)
	}
	for _, pod := range []string{p, stopped, damaged} {
		if err := s.Remove(ctx, pod); err != nil {
			t.Fatal(err)
		}
	}
	l.checkEmpty(s)
}

// A daemon died before it could note that it had a container started. The next one
// learns it from the keeper, and the one after that knows it from the beginning.
func TestStartOfTheDead(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	c := must[string](t)(s.CreateContainer(t.Context(), p, containerNamed("c")))
	s.Close()
	at, err := l.keeper.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s = l.start()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if st, err := s.GetContainer(c); err == nil && st.State == Running {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the daemon does not learn that the container runs")
		}
	}
	s.Close()
	if st, err := l.open().GetContainer(c); err != nil || st.State != Running || !st.StartedAt.Equal(at) {
		t.Errorf("the daemon after that: %v since %v, %v; want running since %v", st.State, st.StartedAt, err, at)
	}
}

// awaitFollow waits until the keeper was compared with what is known.
func awaitFollow(t *testing.T, s *Pods, lost string) {
	t.Helper()
	for range 200 {
		if st, err := s.GetContainer(lost); err == nil && st.State == Exited {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the daemon did not compare itself with its keeper")
}

// A retry that comes before the new daemon has removed what the old one left
// half made must not be answered with it.
func TestHalfMadeIsNoAnswer(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	c := &Container{containerRecord: containerRecord{ID: newID(), PodID: p, Config: containerConfig{containerNamed("half")}}, created: make(chan struct{}), exited: make(chan struct{})}
	close(c.created)
	s.addContainer(c)
	s.addPod(&Pod{podRecord: podRecord{ID: newID(), Keeper: "node", Config: podConfig{podNamed("half")}}})
	if _, err := s.CreateContainer(t.Context(), p, containerNamed("half")); !errdefs.IsUnavailable(err) {
		t.Errorf("container: %v", err)
	}
	if _, err := s.Run(t.Context(), podNamed("half"), ""); !errdefs.IsUnavailable(err) {
		t.Errorf("pod: %v", err)
	}
}

// Limits are changed and recorded, or they are what they were.
func TestUpdateIsAllOrNothing(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	config := containerNamed("c")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 100 << 20}
	c := must[string](t)(s.CreateContainer(t.Context(), p, config))
	update := func(mib int64) error {
		return s.UpdateContainer(t.Context(), c, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: mib << 20})
	}
	if err := update(200); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(l.dir, "root/containers", c, "resources")
	if err := errors.Join(os.Remove(record), os.MkdirAll(filepath.Join(record, "in the way"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := update(300); err == nil {
		t.Fatal("no error")
	}
	if st, _ := s.GetContainer(c); st.Resources.GetMemoryLimitInBytes() != 200<<20 {
		t.Errorf("the limit is said to be %d", st.Resources.GetMemoryLimitInBytes())
	}
	if want := []int64{200 << 20, 300 << 20, 200 << 20}; !slices.Equal(l.keeper.limits, want) {
		t.Errorf("limits were set to %v, want %v", l.keeper.limits, want)
	}
}

// Without a keeper nothing can be made, but everything can be removed.
func TestKeeperDoesNotStart(t *testing.T) {
	l := newLab(t)
	l.dialErr = errdefs.ErrUnavailable
	s := l.start()
	p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
	if _, err := s.CreateContainer(t.Context(), p, containerNamed("c")); !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v", err)
	}
	if err := s.recordPod(&Pod{podRecord: podRecord{ID: newID(), Keeper: "node", Config: podConfig{podNamed("half")}}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = l.start() // undoes the half-made one
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	l.checkEmpty(s)
}
