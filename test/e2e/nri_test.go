package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// plugin is an NRI plugin, made with the library that plugins are made with. It
// notes all it hears.
type plugin struct {
	stub stub.Stub

	mu         sync.Mutex
	heard      []string // EVENT ID, in order
	pods       map[string]*api.PodSandbox
	containers map[string]*api.Container // as last heard of
	syncs      int

	// What it does; set before it connects.
	sync   func(ctx context.Context) []*api.ContainerUpdate
	hook   func(ctx context.Context, event, name string) error // name of the pod or container
	create func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
	update func(c *api.Container, r *api.LinuxResources) []*api.ContainerUpdate
}

// connect runs a plugin in the test's process until the test ends.
func (p *plugin) connect(t *testing.T, index, name string) *plugin {
	t.Helper()
	p.pods, p.containers = map[string]*api.PodSandbox{}, map[string]*api.Container{}
	var err error
	p.stub, err = stub.New(p, stub.WithPluginName(name), stub.WithPluginIdx(index), stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.stub.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Errorf("plugin %s does not end", name)
		}
	})
	await(t, "the introduction of plugin "+name, func() bool {
		select {
		case err := <-ended:
			t.Fatalf("plugin %s: %v", name, err)
		default:
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.syncs > 0
	})
	return p
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	for _, pod := range pods {
		p.heard = append(p.heard, "Synchronize "+pod.GetId())
		p.pods[pod.GetId()] = pod
	}
	for _, c := range containers {
		p.heard = append(p.heard, "Synchronize "+c.GetId())
		p.containers[c.GetId()] = c
	}
	p.mu.Unlock()
	var updates []*api.ContainerUpdate
	if p.sync != nil {
		updates = p.sync(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.syncs++
	return updates, nil
}

func (p *plugin) pod(ctx context.Context, event string, pod *api.PodSandbox) error {
	p.mu.Lock()
	p.heard = append(p.heard, event+" "+pod.GetId())
	p.pods[pod.GetId()] = pod
	p.mu.Unlock()
	if p.hook != nil {
		return p.hook(ctx, event, pod.GetName())
	}
	return nil
}

func (p *plugin) container(ctx context.Context, event string, c *api.Container) error {
	p.mu.Lock()
	p.heard = append(p.heard, event+" "+c.GetId())
	p.containers[c.GetId()] = c
	p.mu.Unlock()
	if p.hook != nil {
		return p.hook(ctx, event, c.GetName())
	}
	return nil
}

func (p *plugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "RunPodSandbox", pod)
}

func (p *plugin) UpdatePodSandbox(ctx context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.pod(ctx, "UpdatePodSandbox", pod)
}

func (p *plugin) PostUpdatePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "PostUpdatePodSandbox", pod)
}

func (p *plugin) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "StopPodSandbox", pod)
}

func (p *plugin) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "RemovePodSandbox", pod)
}

func (p *plugin) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.container(ctx, "CreateContainer", c); err != nil || p.create == nil {
		return nil, nil, err
	}
	adjust, updates := p.create(c)
	return adjust, updates, nil
}

func (p *plugin) PostCreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.container(ctx, "PostCreateContainer", c)
}

func (p *plugin) StartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.container(ctx, "StartContainer", c)
}

func (p *plugin) PostStartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.container(ctx, "PostStartContainer", c)
}

func (p *plugin) UpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	if err := p.container(ctx, "UpdateContainer", c); err != nil || p.update == nil {
		return nil, err
	}
	return p.update(c, r), nil
}

func (p *plugin) PostUpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.container(ctx, "PostUpdateContainer", c)
}

func (p *plugin) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.container(ctx, "StopContainer", c)
}

func (p *plugin) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.container(ctx, "RemoveContainer", c)
}

// of returns the events of one pod or container, in order.
func (p *plugin) of(id string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var events []string
	for _, h := range p.heard {
		if event, of, _ := strings.Cut(h, " "); of == id {
			events = append(events, event)
		}
	}
	return events
}

// expect waits until the plugin has heard exactly these events of one.
func (p *plugin) expect(t *testing.T, id string, events ...string) {
	t.Helper()
	await(t, fmt.Sprintf("%v", events), func() bool { return len(p.of(id)) >= len(events) })
	if got := p.of(id); !slices.Equal(got, events) {
		t.Errorf("heard %v, want %v", got, events)
	}
}

// forHandlers runs a test with the built-in handler and with runc.
func forHandlers(t *testing.T, config string, test func(t *testing.T, l *lab.Lab)) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("%v: install runc", err)
	}
	for _, handler := range []string{"builtin", "runc"} {
		t.Run(handler, func(t *testing.T) {
			test(t, lab.New(t, lab.Options{
				Keys:   fmt.Sprintf("default_handler = %q", handler),
				Config: fmt.Sprintf("[handlers.runc]\npath = %q\n%s", runc, config),
			}))
		})
	}
}

// pluginPod runs a pod whose name no other has.
func pluginPod(t *testing.T, l *lab.Lab, name string) (string, *runtimeapi.PodSandboxConfig) {
	t.Helper()
	config := l.PodConfig(name)
	return l.RunPod(t, config), config
}

// TestPluginsHearLives is about the order of what a plugin hears, and what it is
// told of whom.
func TestPluginsHearLives(t *testing.T) {
	forHandlers(t, "", func(t *testing.T, l *lab.Lab) {
		l.Pull(t, "busybox")
		p := new(plugin).connect(t, "00", "listener")
		config := l.PodConfig("told")
		config.Labels = map[string]string{"l": "1"}
		pod := l.RunPod(t, config)
		cc := l.ContainerConfig("c", "busybox", "sleep", "1000")
		cc.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
		c := l.CreateContainer(t, pod, config, cc)
		l.StartContainer(t, c)
		ctx := t.Context()
		_, err := l.Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: c, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 512}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Runtime.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: &runtimeapi.LinuxContainerResources{CpuShares: 512}}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c, Timeout: 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c}); err != nil {
			t.Fatal(err)
		}
		failing := l.CreateContainer(t, pod, config, l.ContainerConfig("failing", "busybox", "sh", "-c", "exit 3"))
		l.StartContainer(t, failing)
		// Of an exit plugins hear by themselves, not when somebody removes it.
		p.expect(t, failing, "CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "StopContainer")
		p.mu.Lock()
		code := p.containers[failing].GetExitCode()
		p.mu.Unlock()
		if code != 3 {
			t.Errorf("exit code %d, want 3", code)
		}
		// A pod is removed with all in it; plugins hear of the end of each.
		running := l.CreateContainer(t, pod, config, l.ContainerConfig("running", "busybox", "sleep", "1000"))
		l.StartContainer(t, running)
		l.RemovePod(t, pod)
		p.expect(t, pod, "RunPodSandbox", "UpdatePodSandbox", "PostUpdatePodSandbox", "StopPodSandbox", "RemovePodSandbox")
		p.expect(t, c, "CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "UpdateContainer", "PostUpdateContainer", "StopContainer", "RemoveContainer")
		p.expect(t, running, "CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "StopContainer", "RemoveContainer")
		if stop, gone := slices.Index(p.heard, "StopPodSandbox "+pod), slices.Index(p.heard, "StopContainer "+running); stop < gone {
			t.Errorf("the pod was stopped before its container: %v", p.heard)
		}
		described := p.pods[pod]
		if described.GetName() != "told" || described.GetNamespace() != "lab" || described.GetUid() != "uid-told" || described.GetLabels()["l"] != "1" || len(described.GetIps()) != 1 {
			t.Errorf("pod: %v", described)
		}
		if d := p.containers[c]; d.GetName() != "c" || d.GetPodSandboxId() != pod || !slices.Contains(d.GetEnv(), "A=b") || !slices.Equal(d.GetArgs(), []string{"sleep", "1000"}) || len(d.GetMounts()) == 0 || d.GetLinux().GetResources().GetCpu().GetShares().GetValue() != 512 {
			t.Errorf("container: %v", d)
		}
	})
}

// TestPluginsDelayPods holds what a client can see while a plugin thinks.
func TestPluginsDelayPods(t *testing.T) {
	forHandlers(t, "", func(t *testing.T, l *lab.Lab) {
		l.Pull(t, "busybox")
		reached, release := make(chan string), make(chan struct{})
		var id string
		p := &plugin{}
		refuse := map[string]bool{"RunPodSandbox": true, "CreateContainer": true, "StartContainer": true}
		p.hook = func(ctx context.Context, event, name string) error {
			switch {
			case name == "slow" && (event == "RunPodSandbox" || event == "CreateContainer" || event == "StopPodSandbox"):
				reached <- event
				<-release
			case strings.HasPrefix(name, "refused") && refuse[event]:
				return errors.New("not this one")
			}
			return nil
		}
		p.connect(t, "00", "slow")
		ctx := t.Context()
		within := func(event string, request func() error, look func()) {
			t.Helper()
			done := make(chan error, 1)
			go func() { done <- request() }()
			if got := <-reached; got != event {
				t.Fatalf("hook %s, want %s", got, event)
			}
			look()
			release <- struct{}{}
			if err := <-done; err != nil {
				t.Fatalf("%s: %v", event, err)
			}
		}
		config := l.PodConfig("slow")
		var pod string
		within("RunPodSandbox", func() (err error) {
			r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
			pod = r.GetPodSandboxId()
			return err
		}, func() {
			p.mu.Lock()
			for id = range p.pods {
			}
			p.mu.Unlock()
			if r, err := l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err != nil || len(r.GetItems()) > 0 {
				t.Errorf("a pod is listed while a plugin thinks: %v, %v", r, err)
			}
			if _, err := l.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id}); status.Code(err) != codes.NotFound {
				t.Errorf("status: %v, want NotFound", err)
			}
			if _, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: l.ContainerConfig("early", "busybox"), SandboxConfig: config}); status.Code(err) != codes.NotFound {
				t.Errorf("create: %v, want NotFound", err)
			}
		})
		if pod != id {
			t.Errorf("the plugin heard of pod %s, the client of %s", id, pod)
		}
		var c string
		within("CreateContainer", func() error {
			r, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: l.ContainerConfig("slow", "busybox", "sleep", "1000"), SandboxConfig: config})
			c = r.GetContainerId()
			return err
		}, func() {
			if r, err := l.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err != nil || len(r.GetContainers()) > 0 {
				t.Errorf("a container is listed while a plugin thinks: %v, %v", r, err)
			}
		})
		if s := l.Status(t, c).GetState(); s != runtimeapi.ContainerState_CONTAINER_CREATED {
			t.Errorf("container is %v", s)
		}
		l.StartContainer(t, c)

		// A refusal fails the request, leaves nothing, and is told to those who
		// heard of it.
		_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: l.ContainerConfig("refused", "busybox"), SandboxConfig: config})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not this one") {
			t.Errorf("refused: %v", err)
		}
		if r, _ := l.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); len(r.GetContainers()) != 1 {
			t.Errorf("a refused container stays: %v", r)
		}
		refused := l.PodConfig("refused")
		if _, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: refused}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not this one") {
			t.Errorf("refused pod: %v", err)
		}
		if r, _ := l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); len(r.GetItems()) != 1 {
			t.Errorf("a refused pod stays: %v", r)
		}
		refuse["RunPodSandbox"], refuse["CreateContainer"] = false, false
		second := l.RunPod(t, refused)
		again := l.CreateContainer(t, second, refused, l.ContainerConfig("refused", "busybox", "sleep", "1000"))
		if _, err := l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: again}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("refused start: %v", err)
		}
		refuse["StartContainer"] = false
		l.StartContainer(t, again)

		within("StopPodSandbox", func() error {
			_, err := l.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}, func() {
			if s := l.Status(t, c).GetState(); s != runtimeapi.ContainerState_CONTAINER_EXITED {
				t.Errorf("container is %v while plugins hear that its pod is stopped", s)
			}
			if s := podStatus(t, l, pod).GetState(); s != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				t.Errorf("pod is %v", s)
			}
		})
		if _, err := l.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
		before := len(p.of(pod))
		if _, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: l.ContainerConfig("late", "busybox"), SandboxConfig: config}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("create in a stopped pod: %v", err)
		}
		if got := p.of(pod); len(got) != before || got[before-1] != "StopPodSandbox" || slices.Index(got, "StopPodSandbox") != before-1 {
			t.Errorf("heard %v", got)
		}
	})
}

// TestPluginsComeLate introduces plugins while containers come and go: each hears
// of each exactly once.
func TestPluginsComeLate(t *testing.T) {
	forHandlers(t, "", func(t *testing.T, l *lab.Lab) {
		l.Pull(t, "busybox")
		new(plugin).connect(t, "00", "early")
		pod, config := pluginPod(t, l, "late")
		first := l.CreateContainer(t, pod, config, l.ContainerConfig("first", "busybox", "sleep", "1000"))
		l.StartContainer(t, first)
		gone := l.CreateContainer(t, pod, config, l.ContainerConfig("gone", "busybox", "true"))
		l.StartContainer(t, gone)
		l.AwaitExit(t, gone, 10*time.Second)

		inSync, release := make(chan struct{}), make(chan struct{})
		p := &plugin{sync: func(context.Context) []*api.ContainerUpdate {
			close(inSync)
			<-release
			return nil
		}}
		connected := make(chan struct{})
		go func() {
			defer close(connected)
			<-inSync
			time.Sleep(2 * time.Second) // plugins with many pods take that long
			close(release)
		}()
		ids := make(chan string, 8)
		go func() {
			<-inSync
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					ids <- l.CreateContainer(t, pod, config, l.ContainerConfig(fmt.Sprint("during", i), "busybox", "sleep", "1000"))
				})
			}
			wg.Wait()
			close(ids)
		}()
		p.connect(t, "10", "late")
		<-connected
		for id := range ids {
			p.expect(t, id, "CreateContainer", "PostCreateContainer")
		}
		p.expect(t, pod, "Synchronize")
		p.expect(t, first, "Synchronize")
		p.expect(t, gone)
		p.mu.Lock()
		if c := p.containers[first]; c.GetState() != api.ContainerState_CONTAINER_RUNNING || c.GetPid() == 0 || len(c.GetMounts()) == 0 {
			t.Errorf("introduced to %v", c)
		}
		p.mu.Unlock()

		// Under load, whoever comes when.
		all := make(chan string, 100)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 24 {
				all <- l.CreateContainer(t, pod, config, l.ContainerConfig(fmt.Sprint("load", i), "busybox", "sleep", "1000"))
			}
		}()
		var late []*plugin
		for i := range 5 {
			late = append(late, new(plugin).connect(t, fmt.Sprint(20+i), fmt.Sprint("late", i)))
		}
		<-done
		close(all)
		for id := range all {
			for i, p := range late {
				if got := p.of(id); len(got) == 0 || got[0] != "Synchronize" && got[0] != "CreateContainer" || slices.Contains(got[1:], "CreateContainer") {
					t.Errorf("late plugin %d heard %v of %s", i, got, id)
				}
			}
		}
	})
}

// TestPluginsAdjust lets plugins change what is in a container before it is made,
// and the limits of others.
func TestPluginsAdjust(t *testing.T) {
	forHandlers(t, "", func(t *testing.T, l *lab.Lab) {
		l.Pull(t, "busybox")
		extra := filepath.Join(l.Dir, "extra")
		if err := os.MkdirAll(extra, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(extra, "file"), []byte("from a plugin\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var victim string
		p := &plugin{}
		p.create = func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			mu.Lock()
			defer mu.Unlock()
			a := &api.ContainerAdjustment{}
			switch c.GetName() {
			case "adjusted":
				a.AddEnv("ADDED", "yes")
				a.RemoveEnv("UNWANTED")
				a.AddEnv("CHANGED", "new")
				a.AddMount(&api.Mount{Destination: "/extra", Source: extra, Type: "bind", Options: []string{"bind", "ro"}})
				a.RemoveMount("/dev/mqueue")
				a.RemoveDevice("/dev/unwanted")
				a.AddRlimit("RLIMIT_NOFILE", 2000, 1000)
				a.AddDevice(&api.LinuxDevice{Path: "/dev/plugged", Type: "c", Major: 1, Minor: 3})
				a.SetLinuxMemoryLimit(64 << 20)
				a.SetLinuxCPUShares(300)
				a.SetLinuxPidLimits(50)
				a.SetArgs([]string{"sleep", "999"})
				a.AddAnnotation("plugin.example/seen", "1")
				update := &api.ContainerUpdate{ContainerId: victim}
				update.SetLinuxCPUShares(700)
				return a, []*api.ContainerUpdate{update}
			case "moved":
				a.SetLinuxCgroupsPath(c.GetLinux().GetCgroupsPath() + "-moved")
			case "absurd":
				a.AddMount(&api.Mount{Destination: "relative", Source: extra, Type: "bind", Options: []string{"bind"}})
			}
			return a, nil
		}
		p.connect(t, "00", "adjuster")
		pod, config := pluginPod(t, l, "adjusted")
		id := l.CreateContainer(t, pod, config, l.ContainerConfig("victim", "busybox", "sleep", "1000"))
		l.StartContainer(t, id)
		mu.Lock()
		victim = id
		mu.Unlock()
		cc := l.ContainerConfig("adjusted", "busybox", "sleep", "1000")
		cc.Envs = []*runtimeapi.KeyValue{{Key: "UNWANTED", Value: []byte("1")}, {Key: "CHANGED", Value: []byte("old")}, {Key: "KEPT", Value: []byte("1")}}
		cc.Devices = []*runtimeapi.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/unwanted"}}
		c := l.CreateContainer(t, pod, config, cc)
		l.StartContainer(t, c)
		out := string(l.ExecSync(t, c, "sh", "-c", `tr '\0' '\n' </proc/1/environ | grep -E 'ADDED|UNWANTED|CHANGED|KEPT' | sort; tr '\0' ' ' </proc/1/cmdline; echo; cat /extra/file; grep 'open files' /proc/1/limits | tr -s ' '; echo x >/dev/plugged && echo device; ls /dev/unwanted 2>&1 | grep -o 'No such'; grep -c mqueue /proc/mounts; touch /extra/x 2>&1 | grep -o Read-only`).GetStdout())
		want := "ADDED=yes\nCHANGED=new\nKEPT=1\nsleep 999 \nfrom a plugin\nMax open files 1000 2000 files \ndevice\nNo such\n0\nRead-only\n"
		if out != want {
			t.Errorf("in the container:\n%swant:\n%s", out, want)
		}
		if r := l.Status(t, c).GetResources().GetLinux(); r.GetMemoryLimitInBytes() != 64<<20 || r.GetCpuShares() != 300 {
			t.Errorf("limits: %v", r)
		}
		if r := l.Status(t, victim).GetResources().GetLinux(); r.GetCpuShares() != 700 {
			t.Errorf("the other's limits: %v", r)
		}
		// An update that says nothing of memory leaves it as the plugin has set it.
		if _, err := l.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: c, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 400}}); err != nil {
			t.Fatal(err)
		}
		if r := l.Status(t, c).GetResources().GetLinux(); r.GetMemoryLimitInBytes() != 64<<20 || r.GetCpuShares() != 400 {
			t.Errorf("limits after an update: %v", r)
		}
		stats, err := l.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: c})
		if err != nil || stats.GetStats().GetMemory().GetAvailableBytes().GetValue() > 64<<20 || stats.GetStats().GetMemory().GetAvailableBytes().GetValue() == 0 {
			t.Errorf("the kernel's limit: %v, %v", stats.GetStats().GetMemory(), err)
		}

		moved := l.CreateContainer(t, pod, config, l.ContainerConfig("moved", "busybox", "sleep", "1000"))
		l.StartContainer(t, moved)
		stats, err = l.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: moved})
		if err != nil || stats.GetStats().GetMemory().GetUsageBytes().GetValue() == 0 {
			t.Errorf("figures of a container whose cgroup a plugin chose: %v, %v", stats, err)
		}
		if cgroup := string(l.ExecSync(t, moved, "cat", "/proc/1/cgroup").GetStdout()); cgroup == "" {
			t.Error("no cgroup")
		}

		_, err = l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: l.ContainerConfig("absurd", "busybox"), SandboxConfig: config})
		if err == nil || !strings.Contains(err.Error(), "plugin") || !strings.Contains(err.Error(), `"relative"`) {
			t.Errorf("a plugin wants what cannot be: %v", err)
		}

		// Unasked.
		update := &api.ContainerUpdate{ContainerId: c}
		update.SetLinuxCPUShares(500)
		impossible := &api.ContainerUpdate{ContainerId: c}
		impossible.SetLinuxPidLimits(3)
		failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update, impossible})
		if err != nil || len(failed) != 1 {
			t.Errorf("failed updates: %v, %v", failed, err)
		}
		if r := l.Status(t, c).GetResources().GetLinux(); r.GetCpuShares() != 500 {
			t.Errorf("limits after a plugin's update: %v", r)
		}

		// Two plugins that want different things of one container.
		other := &plugin{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			a := &api.ContainerAdjustment{}
			a.AddEnv("ADDED", "otherwise")
			return a, nil
		}}
		other.connect(t, "10", "contrary")
		_, err = l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: func() *runtimeapi.ContainerConfig {
			cc := l.ContainerConfig("adjusted", "busybox")
			cc.Metadata.Attempt = 1
			return cc
		}(), SandboxConfig: config})
		if err == nil || !strings.Contains(err.Error(), "10-contrary") || !strings.Contains(err.Error(), "00-adjuster") {
			t.Errorf("conflict: %v", err)
		}
	})
}

// TestPluginsFail is about plugins that hang, die, and are there before the daemon.
func TestPluginsFail(t *testing.T) {
	l := lab.New(t, lab.Options{Config: "[nri]\nrequest_timeout = 3\n"})
	l.Pull(t, "busybox")
	pod, config := pluginPod(t, l, "failing")

	// It hangs past the request's deadline: one that answers just then has answered.
	hung, release := &plugin{}, make(chan struct{})
	hung.hook = func(_ context.Context, event, _ string) error {
		if event == "CreateContainer" {
			<-release
		}
		return nil
	}
	hung.connect(t, "00", "hung")
	t.Cleanup(func() { close(release) })
	start := time.Now()
	l.CreateContainer(t, pod, config, l.ContainerConfig("one", "busybox", "sleep", "1000"))
	if took := time.Since(start); took < 2900*time.Millisecond || took > 20*time.Second {
		t.Errorf("with a plugin that hangs: %v, want about its timeout of 3s", took)
	}
	start = time.Now()
	l.CreateContainer(t, pod, config, l.ContainerConfig("two", "busybox", "sleep", "1000"))
	if took := time.Since(start); took > 2900*time.Millisecond {
		t.Errorf("a plugin that hung is asked again: %v", took)
	}

	dying := &plugin{}
	dying.hook = func(_ context.Context, event, _ string) error {
		if event == "CreateContainer" {
			go dying.stub.Stop()
			time.Sleep(200 * time.Millisecond)
		}
		return nil
	}
	dying.connect(t, "00", "dying")
	l.CreateContainer(t, pod, config, l.ContainerConfig("three", "busybox", "sleep", "1000"))

	// The daemon goes and comes: a plugin that connects again knows all.
	c := l.CreateContainer(t, pod, config, l.ContainerConfig("four", "busybox", "sleep", "1000"))
	l.StartContainer(t, c)
	l.Kill(t)
	l.Start(t)
	back := new(plugin).connect(t, "00", "back")
	back.expect(t, c, "Synchronize")
	back.expect(t, pod, "Synchronize")
	l.RemovePod(t, pod)
	back.expect(t, c, "Synchronize", "StopContainer", "RemoveContainer")
}

// TestPluginInstalled has the daemon run a plugin: this test's program under
// another name.
func TestPluginInstalled(t *testing.T) {
	lab.Require(t)
	dir, conf := t.TempDir(), t.TempDir()
	heard := filepath.Join(dir, "heard")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", self, filepath.Join(dir, "05-installed")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(conf, "installed.conf"), []byte(heard), 0o644); err != nil {
		t.Fatal(err)
	}
	l := lab.New(t, lab.Options{Config: fmt.Sprintf("[nri]\nplugin_path = %q\nplugin_config_path = %q\n", dir, conf)})
	pod, _ := pluginPod(t, l, "seen")
	l.RemovePod(t, pod)
	await(t, "the plugin's notes", func() bool {
		text, _ := os.ReadFile(heard)
		return strings.Contains(string(text), "RunPodSandbox "+pod) && strings.Contains(string(text), "RemovePodSandbox "+pod)
	})
}

// installed is the plugin that the daemon runs. It writes what it hears to the
// file that its configuration names.
type installed struct{ file string }

func (p *installed) Configure(_ context.Context, config, _, _ string) (api.EventMask, error) {
	p.file = config
	return 0, nil
}

func (p *installed) note(event, id string) error {
	f, err := os.OpenFile(p.file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, event, id)
	return err
}

func (p *installed) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RunPodSandbox", pod.GetId())
}

func (p *installed) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RemovePodSandbox", pod.GetId())
}

// runInstalled is main of the program that the daemon runs as a plugin.
func runInstalled() int {
	s, err := stub.New(&installed{})
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
