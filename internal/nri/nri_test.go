package nri

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func container() *specs.Spec {
	limit := int64(100)
	return &specs.Spec{
		Process: &specs.Process{Args: []string{"a"}, Env: []string{"A=1", "B=2"}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 1}}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/data/sub", Source: "/s"}},
		Linux: &specs.Linux{
			CgroupsPath: "/p/c", Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace, Path: "/ipc"}},
			Devices:   []specs.LinuxDevice{{Path: "/dev/old", Type: "c"}},
			Sysctl:    map[string]string{"kernel.a": "1"},
			Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}},
		},
	}
}

// TestAdjust wants everything at once that a plugin can want.
func TestAdjust(t *testing.T) {
	a := &api.ContainerAdjustment{}
	a.RemoveEnv("A")
	a.AddEnv("B", "3")
	a.AddEnv("C", "x=y")
	a.SetArgs([]string{"b", "c"})
	a.AddAnnotation("k", "v")
	a.AddMount(&api.Mount{Destination: "/data", Source: "/d", Type: "bind", Options: []string{"rbind"}})
	a.RemoveMount("/proc")
	a.AddRlimit("RLIMIT_NOFILE", 20, 10)
	a.AddRlimit("RLIMIT_CORE", 0, 0)
	a.RemoveDevice("/dev/old")
	a.AddDevice(&api.LinuxDevice{Path: "/dev/new", Type: "b", Major: 7, Minor: 8})
	a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "ipc", Path: "/other"})
	a.RemoveNamespace(&api.LinuxNamespace{Type: "pid"})
	a.SetLinuxSysctl("kernel.b", "2")
	a.SetLinuxCgroupsPath("/elsewhere")
	score := 5
	a.SetLinuxOomScoreAdj(&score)
	a.SetLinuxMemoryLimit(200)
	a.SetLinuxCPUShares(10)
	a.SetLinuxCPUQuota(11)
	a.SetLinuxCPUPeriod(12)
	a.SetLinuxCPUSetCPUs("0")
	a.SetLinuxCPUSetMems("1")
	a.SetLinuxPidLimits(9)
	a.AddLinuxHugepageLimit("2MB", 4)
	a.AddLinuxUnified("memory.high", "1")
	a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/hook"}}, Poststop: []*api.Hook{{Path: "/stop"}}})
	a.AddCDIDevice(&api.CDIDevice{Name: "v/c=d"})
	var injected []string
	oci, untouched := container(), container()
	shared := *oci.Linux
	if err := Adjust(oci, a, Host{InjectDevices: func(_ *specs.Spec, names []string) error { injected = names; return nil }}); err != nil {
		t.Fatal(err)
	}
	want, p := container(), specs.LinuxCPU{Cpus: "0", Mems: "1"}
	shares, quota, period, limit, pids, seven, eight := uint64(10), int64(11), uint64(12), int64(200), int64(9), int64(7), int64(8)
	p.Shares, p.Quota, p.Period = &shares, &quota, &period
	want.Annotations = map[string]string{"k": "v"}
	want.Process.Args, want.Process.Env, want.Process.OOMScoreAdj = []string{"b", "c"}, []string{"B=3", "C=x=y"}, &score
	want.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: 20}, {Type: "RLIMIT_CORE"}}
	want.Mounts = []specs.Mount{{Destination: "/data", Source: "/d", Type: "bind", Options: []string{"rbind"}}, {Destination: "/data/sub", Source: "/s"}}
	want.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/hook"}}, Poststop: []specs.Hook{{Path: "/stop"}}}
	want.Linux.CgroupsPath, want.Linux.Sysctl = "/elsewhere", map[string]string{"kernel.a": "1", "kernel.b": "2"}
	want.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: "/other"}}
	want.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/new", Type: "b", Major: 7, Minor: 8}}
	want.Linux.Resources = &specs.LinuxResources{
		CPU: &p, Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}}, Unified: map[string]string{"memory.high": "1"},
		Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "b", Major: &seven, Minor: &eight, Access: "rwm"}},
	}
	if diff := cmp.Diff(want, oci); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"v/c=d"}, injected); diff != "" {
		t.Error(diff)
	}
	// Arrays that others may share are as they were.
	if diff := cmp.Diff(untouched.Linux.Namespaces, shared.Namespaces); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(untouched.Linux.Devices, shared.Devices); diff != "" {
		t.Error(diff)
	}
}

// What cannot be had is an error, not left out.
func TestAdjustImpossible(t *testing.T) {
	for name, want := range map[string]func(*api.ContainerAdjustment){
		"blockio class": func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("gold") },
		"RDT class":     func(a *api.ContainerAdjustment) { a.SetLinuxRDTClass("gold") },
		"namespace": func(a *api.ContainerAdjustment) {
			a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "space"})
		},
	} {
		a := &api.ContainerAdjustment{}
		want(a)
		if err := Adjust(container(), a, Host{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

type nobody struct{}

func (nobody) Known() ([]*api.PodSandbox, []*api.Container) { return nil, nil }
func (nobody) ApplyUpdates(context.Context, []*api.ContainerUpdate) []*api.ContainerUpdate {
	return nil
}

// A socket that somebody serves stays his.
func TestSocketOfAnother(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	p, err := New(Config{Socket: socket, PluginDir: t.TempDir(), RequestTimeout: time.Second, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := p.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hold before the start: %v", err)
	}
	if err := p.Start(nobody{}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	release, listening, err := p.Hold(t.Context())
	if err != nil || listening {
		t.Errorf("hold: %v, %v", listening, err)
	}
	release()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// What there is is asked for only if there may be somebody to tell: the first
// introduction is for the plugins that are installed.
func TestNobodyToIntroduce(t *testing.T) {
	for _, installed := range []bool{false, true} {
		asked := asks{asked: new(atomic.Int32)}
		p := &Plugins{dir: t.TempDir(), runtime: asked}
		if installed {
			if err := os.WriteFile(filepath.Join(p.dir, "10-x"), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for later := range 2 {
			told := false
			tell := func(context.Context, []*api.PodSandbox, []*api.Container) ([]*api.ContainerUpdate, error) {
				told = true
				return nil, nil
			}
			before := asked.asked.Load()
			if err := p.introduce(t.Context(), tell); err != nil || !told {
				t.Errorf("told %v, error %v", told, err)
			}
			if is, want := asked.asked.Load() > before, installed || later > 0; is != want {
				t.Errorf("installed %v, introduction %d: asked %v", installed, later, is)
			}
		}
	}
}

// asks counts how often it is asked.
type asks struct {
	nobody
	asked *atomic.Int32
}

func (a asks) Known() ([]*api.PodSandbox, []*api.Container) {
	a.asked.Add(1)
	return a.nobody.Known()
}

func TestFailed(t *testing.T) {
	if Failed(nil) != nil {
		t.Error("an error out of nothing")
	}
	if err := Failed(errors.New("no")); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}
