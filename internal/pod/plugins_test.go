package pod

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakePlugins is one plugin that notes what it hears. It answers with what its
// fields say; what is not called here is not there.
type fakePlugins struct {
	Plugins
	mu      sync.Mutex
	holds   int
	heard   []string
	failing map[string]bool
	create  *api.CreateContainerResponse
}

func (f *fakePlugins) Hold(context.Context) (func(), bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holds++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.holds--
	}, true, nil
}

func (f *fakePlugins) hear(event string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.holds == 0 {
		panic(event + " is told while plugins may be introduced")
	}
	f.heard = append(f.heard, event)
	if f.failing[event] {
		return errors.New("no")
	}
	return nil
}

func (f *fakePlugins) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.heard
	f.heard = nil
	return h
}

func (f *fakePlugins) RunPodSandbox(context.Context, *api.RunPodSandboxRequest) error {
	return f.hear("RunPodSandbox")
}

func (f *fakePlugins) StopPodSandbox(context.Context, *api.StopPodSandboxRequest) error {
	return f.hear("StopPodSandbox")
}

func (f *fakePlugins) RemovePodSandbox(context.Context, *api.RemovePodSandboxRequest) error {
	return f.hear("RemovePodSandbox")
}

func (f *fakePlugins) CreateContainer(context.Context, *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	return f.create, f.hear("CreateContainer")
}

func (f *fakePlugins) PostCreateContainer(context.Context, *api.PostCreateContainerRequest) error {
	return f.hear("PostCreateContainer")
}

func (f *fakePlugins) StartContainer(context.Context, *api.StartContainerRequest) error {
	return f.hear("StartContainer")
}

func (f *fakePlugins) PostStartContainer(context.Context, *api.PostStartContainerRequest) error {
	return f.hear("PostStartContainer")
}

func (f *fakePlugins) StopContainer(context.Context, *api.StopContainerRequest) (*api.StopContainerResponse, error) {
	return nil, f.hear("StopContainer")
}

func (f *fakePlugins) RemoveContainer(context.Context, *api.RemoveContainerRequest) error {
	return f.hear("RemoveContainer")
}

// TestPluginsObject: what plugins refuse is undone, and they hear of that; what
// they cannot refuse is done all the same.
func TestPluginsObject(t *testing.T) {
	l := newLab(t)
	f := &fakePlugins{failing: map[string]bool{"RunPodSandbox": true, "StopPodSandbox": true, "StopContainer": true, "RemoveContainer": true}}
	l.plugins = f
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	if _, err := s.Run(ctx, podNamed("a"), ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("run: %v", err)
	}
	if got, want := f.take(), []string{"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"}; !slices.Equal(got, want) {
		t.Errorf("heard %v, want %v", got, want)
	}
	l.checkEmpty(s)

	f.failing["RunPodSandbox"], f.failing["CreateContainer"] = false, true
	p := id(s.Run(ctx, podNamed("a"), ""))
	if _, err := s.CreateContainer(ctx, p, containerNamed("c")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("create: %v", err)
	}
	if got, want := f.take(), []string{"RunPodSandbox", "CreateContainer", "StopContainer", "RemoveContainer"}; !slices.Equal(got, want) {
		t.Errorf("heard %v, want %v", got, want)
	}
	// A container that plugins never heard of goes without a word.
	absent := containerNamed("absent")
	absent.Image.Image = "absent"
	if _, err := s.CreateContainer(ctx, p, absent); !errdefs.IsNotFound(err) {
		t.Errorf("create: %v", err)
	}
	if err := s.Remove(ctx, p); err != nil {
		t.Error(err)
	}
	if got, want := f.take(), []string{"StopPodSandbox", "RemovePodSandbox"}; !slices.Equal(got, want) {
		t.Errorf("heard %v, want %v", got, want)
	}
	l.checkEmpty(s)
}

// TestPluginsEvict: a plugin wants another container to be gone.
func TestPluginsEvict(t *testing.T) {
	l := newLab(t)
	f := &fakePlugins{}
	l.plugins = f
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	p := id(s.Run(ctx, podNamed("a"), ""))
	victim := id(s.CreateContainer(ctx, p, containerNamed("victim")))
	if err := s.StartContainer(ctx, victim); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.create = &api.CreateContainerResponse{Evict: []*api.ContainerEviction{{ContainerId: victim, Reason: "room"}, {ContainerId: "nobody"}}}
	f.mu.Unlock()
	id(s.CreateContainer(ctx, p, containerNamed("favourite")))
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		st, err := s.GetContainer(victim)
		if err == nil && st.State == Exited {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not evicted: %+v, %v", st, err)
		}
	}
}

// TestPluginsKnown: what a plugin is introduced to, before and after a restart of
// the daemon.
func TestPluginsKnown(t *testing.T) {
	l := newLab(t)
	l.plugins = &fakePlugins{}
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	p := id(s.Run(ctx, podNamed("a"), ""))
	c := id(s.CreateContainer(ctx, p, containerNamed("c")))
	over := id(s.CreateContainer(ctx, p, containerNamed("over")))
	if err := errors.Join(s.StartContainer(ctx, c), s.StartContainer(ctx, over), s.StopContainer(ctx, over, 0)); err != nil {
		t.Fatal(err)
	}
	stopped := id(s.Run(ctx, podNamed("stopped"), ""))
	if err := s.Stop(ctx, stopped); err != nil {
		t.Fatal(err)
	}
	check := func(s *Pods) {
		t.Helper()
		pods, containers := s.Known()
		if len(pods) != 1 || pods[0].GetId() != p || pods[0].GetName() != "a" {
			t.Errorf("pods: %v", pods)
		}
		if len(containers) != 1 || containers[0].GetId() != c || containers[0].GetState() != api.ContainerState_CONTAINER_RUNNING || !slices.Equal(containers[0].GetArgs(), []string{"sleep", "1000"}) {
			t.Errorf("containers: %v", containers)
		}
	}
	check(s)
	s.Close()
	f := &fakePlugins{}
	l.plugins = f
	s = l.start()
	check(s)
	if err := errors.Join(s.Remove(ctx, p), s.Remove(ctx, stopped)); err != nil {
		t.Fatal(err)
	}
	want := []string{"StopContainer", "StopPodSandbox", "RemoveContainer", "RemoveContainer", "RemovePodSandbox", "RemovePodSandbox"}
	if got := f.take(); !slices.Equal(got, want) {
		t.Errorf("heard %v, want %v", got, want)
	}
}

func TestPluginLimits(t *testing.T) {
	r := &runtimeapi.LinuxContainerResources{
		CpuShares: 1, CpuQuota: 2, CpuPeriod: 3, CpusetCpus: "4", CpusetMems: "5", MemoryLimitInBytes: 6, MemorySwapLimitInBytes: 7,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 8}}, Unified: map[string]string{"a": "b"},
	}
	back, err := criResources(pluginResources(r))
	if err != nil || back.String() != r.String() {
		t.Errorf("there and back: %v, %v", back, err)
	}
	for name, r := range map[string]*api.LinuxResources{
		"pids":    {Pids: &api.LinuxPids{Limit: 1}},
		"rdt":     {RdtClass: api.String("x")},
		"memory":  {Memory: &api.LinuxMemory{Swappiness: api.UInt64(uint64(1))}},
		"devices": {Devices: []*api.LinuxDeviceCgroup{{}}},
	} {
		if _, err := criResources(r); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
