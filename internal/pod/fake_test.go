package pod

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/checkpoint"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// lab is a node in a directory: what outlives a daemon (files, containers) does
// so here too. The pods of these tests use the host's namespaces, so that no
// privileges are needed.
type lab struct {
	t       *testing.T
	dir     string
	keeper  *fakeKeeper
	network *fakeNetwork
	images  *fakeImages
	layers  *fakeLayers
	dialErr error // why no keeper starts
	plugins Plugins
	criuErr error // why there are no checkpoints

	facts      host.Facts
	selinux    selinux.Config
	noAppArmor bool // no profile can be had, whatever the facts say
}

func newLab(t *testing.T) *lab {
	return &lab{
		t: t, dir: t.TempDir(),
		keeper:  &fakeKeeper{containers: make(map[string]*fakeContainer)},
		network: &fakeNetwork{attached: make(map[string]bool)},
		images:  &fakeImages{holders: make(map[string][]string)},
		layers:  &fakeLayers{mounted: make(map[string]bool), labels: make(map[string]string)},
	}
}

// start opens the pods as a new daemon would, and adopts what runs.
func (l *lab) start() *Pods {
	l.t.Helper()
	s := l.open()
	s.Adopt(l.t.Context())
	return s
}

func (l *lab) open() *Pods {
	l.t.Helper()
	s, err := Open(Config{
		Root: filepath.Join(l.dir, "root"), State: filepath.Join(l.dir, "state"), NetNS: filepath.Join(l.dir, "netns"),
		Images: l.images, Layers: l.layers, Network: l.network, Plugins: l.plugins,
		Keeper:       func(context.Context, string) (Keeper, error) { return l.keeper, l.dialErr },
		KeeperHolds:  func(string, string) bool { return false },
		SweepKeepers: func(func(string) bool) (LeftKeepers, error) { return LeftKeepers{}, nil },
		KeeperFor:    func(string) string { return "node" },
		Handlers:     map[string]keeper.Handler{"builtin": {Kind: keeper.Builtin}}, DefaultHandler: "builtin",
		Facts: l.facts, AppArmor: l.apparmor, SELinux: selinux.New(l.selinux),
		Features: func(context.Context, string) (spec.Features, error) { return spec.BuiltinFeatures(), nil },
		CRIU:     func(context.Context) (host.Program, error) { return host.Program{Path: "/usr/sbin/criu"}, l.criuErr },
		Logger:   slog.New(slog.DiscardHandler),
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(s.Close)
	return s
}

// apparmor knows two profiles.
func (l *lab) apparmor(_ context.Context, name string) (string, error) {
	switch {
	case l.noAppArmor:
		return "", fmt.Errorf("no AppArmor: %w", errdefs.ErrFailedPrecondition)
	case name == "":
		return "the-default", nil
	case name == "loaded":
		return name, nil
	}
	return "", fmt.Errorf("profile %s is not loaded: %w", name, errdefs.ErrFailedPrecondition)
}

// checkEmpty fails if anything is left of any pod.
func (l *lab) checkEmpty(s *Pods) {
	l.t.Helper()
	s.work.Wait()
	for _, dir := range []string{"root/pods", "root/containers", "root/trash", "state/pods", "state/containers"} {
		entries, err := os.ReadDir(filepath.Join(l.dir, dir))
		if err != nil || len(entries) > 0 {
			l.t.Errorf("%s: left %v, %v", dir, entries, err)
		}
	}
	if n := len(l.keeper.list()); n > 0 {
		l.t.Errorf("the keeper still has %d containers", n)
	}
	if len(l.images.holders) > 0 || len(l.layers.mounted) > 0 || len(l.network.attached) > 0 {
		l.t.Errorf("left: images %v, mounts %v, network %v", l.images.holders, l.layers.mounted, l.network.attached)
	}
	if len(s.List()) > 0 || len(s.ListContainers()) > 0 {
		l.t.Errorf("still listed: %v %v", s.List(), s.ListContainers())
	}
}

func podNamed(name string) *runtimeapi.PodSandboxConfig {
	node := runtimeapi.NamespaceMode_NODE
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: "/test", SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Network: node, Ipc: node, Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func containerNamed(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: "busybox"},
		Command:  []string{"sleep", "1000"},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: podNamed("").Linux.SecurityContext.NamespaceOptions,
		}},
	}
}

type fakeImages struct {
	mu      sync.Mutex
	holders map[string][]string
}

func (f *fakeImages) Get(ref string) (Image, error) {
	if ref == "absent" {
		return Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	if strings.TrimPrefix(ref, "sha256:") == "data" {
		return Image{ID: "sha256:data", RepoDigests: []string{"busybox@sha256:2"}}, nil
	}
	return Image{ID: "sha256:1", RepoDigests: []string{"busybox@sha256:2"}}, nil
}

func (f *fakeImages) Acquire(id, holder string) (Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holders[holder] = append(f.holders[holder], id)
	return f.Get(id)
}

func (f *fakeImages) Release(holder string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.holders, holder)
}

func (f *fakeImages) RetainOnly(live func(string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for h := range f.holders {
		if !live(h) {
			delete(f.holders, h)
		}
	}
}

type fakeLayers struct {
	mu      sync.Mutex
	mounted map[string]bool
	labels  map[string]string // by target, also of those that are gone
	hang    chan struct{}     // if set, Mount waits for it and ignores its context
	fail    error
}

func (f *fakeLayers) Mount(_ context.Context, m layer.MountSpec) error {
	f.mu.Lock()
	hang, fail := f.hang, f.fail
	f.mounted[m.Target], f.labels[m.Target] = true, m.Label
	f.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return fail
}

// Diff says that the layer has nothing.
func (f *fakeLayers) Diff(context.Context, []digest.Digest, string, io.Writer) ([]string, error) {
	return nil, nil
}

func (f *fakeLayers) RestoreUpper(context.Context, []digest.Digest, string, io.Reader, []string) error {
	return nil
}

func (f *fakeLayers) Unmount(target string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.mounted, target)
	return nil
}

func (f *fakeLayers) label(target string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.labels[target]
}

type fakeNetwork struct {
	network.Network // what is not faked panics
	attached        map[string]bool
}

func (f *fakeNetwork) Detach(context.Context, string) error { return nil }

func (f *fakeNetwork) Sweep(_ context.Context, live func(string) bool) error { return nil }

// fakeKeeper runs containers that do nothing until they are signalled.
type fakeKeeper struct {
	hangCheckpoint bool

	mu         sync.Mutex
	containers map[string]*fakeContainer
	watchers   []func(keeper.Event)
	failCreate error
	deaf       bool // SIGTERM does nothing
	creates    int
	signals    int
	limits     []int64 // of memory, as updated
}

type fakeContainer struct {
	keeper.ContainerState
	record string
}

func (f *fakeKeeper) Create(_ context.Context, r keeper.CreateRequest) (keeper.CreateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.creates++
	if f.failCreate != nil {
		return keeper.CreateResponse{}, f.failCreate
	}
	me, err := host.Identify(os.Getpid())
	f.containers[r.ID] = &fakeContainer{keeper.ContainerState{ID: r.ID, PodID: r.PodID, Process: me, State: keeper.Created, CreatedAt: time.Now()}, r.ExitRecord}
	return keeper.CreateResponse{Process: me}, err
}

func (f *fakeKeeper) Start(_ context.Context, id string) (time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[id]
	c.State, c.StartedAt = keeper.Running, time.Now()
	return c.StartedAt, nil
}

func (f *fakeKeeper) Signal(_ context.Context, id string, sig unix.Signal, _ bool) error {
	f.mu.Lock()
	f.signals++
	f.mu.Unlock()
	if f.deaf && sig != unix.SIGKILL {
		return nil
	}
	f.exit(id, keeper.Exit{Code: 128 + int32(sig), Signal: int(sig), FinishedAt: time.Now()})
	return nil
}

// exit ends a container as the keeper does: record, then event.
func (f *fakeKeeper) exit(id string, e keeper.Exit) {
	f.mu.Lock()
	c := f.containers[id]
	if c == nil || c.Exit != nil {
		f.mu.Unlock()
		return
	}
	c.State, c.Exit = keeper.Exited, &e
	state.Write(c.record, keeper.ExitKind, e, state.Volatile)
	watchers := f.watchers
	f.mu.Unlock()
	for _, w := range watchers {
		w(keeper.Event{ID: id, PodID: c.PodID, Exit: e})
	}
}

func (f *fakeKeeper) Delete(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.containers, id)
	return nil
}

func (f *fakeKeeper) list() []keeper.ContainerState {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []keeper.ContainerState
	for _, c := range f.containers {
		all = append(all, c.ContainerState)
	}
	return all
}

func (f *fakeKeeper) List(context.Context) ([]keeper.ContainerState, error) { return f.list(), nil }

func (f *fakeKeeper) Watch(ctx context.Context, onConnect func([]keeper.ContainerState), onEvent func(keeper.Event)) error {
	f.mu.Lock()
	f.watchers = append(f.watchers, onEvent)
	f.mu.Unlock()
	onConnect(f.list())
	<-ctx.Done()
	return ctx.Err()
}

// Checkpoint writes down the ids of the containers, and waits if it is to hang.
func (f *fakeKeeper) Checkpoint(ctx context.Context, r keeper.CheckpointRequest, meanwhile func(context.Context) error) error {
	f.mu.Lock()
	hang := f.hangCheckpoint
	f.mu.Unlock()
	for _, t := range r.Targets {
		if err := os.Mkdir(filepath.Join(t.Dir, checkpoint.ImagesDir), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(t.Dir, checkpoint.ImagesDir, "pages-1.img"), []byte(t.ID), 0o600); err != nil {
			return err
		}
	}
	if hang {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return meanwhile(ctx)
}

func (f *fakeKeeper) Update(_ context.Context, _ string, r *specs.LinuxResources) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limits = append(f.limits, *r.Memory.Limit)
	return nil
}

func (f *fakeKeeper) ReopenLog(context.Context, string) error { return nil }
func (f *fakeKeeper) Close() error                            { return nil }
func (f *fakeKeeper) Exec(context.Context, keeper.ExecRequest) (keeper.ExecResult, error) {
	return keeper.ExecResult{}, nil
}
func (f *fakeKeeper) ExecOutput(context.Context, keeper.ExecRequest, int) ([]byte, []byte, keeper.ExecResult, error) {
	return nil, nil, keeper.ExecResult{}, nil
}
