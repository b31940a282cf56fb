// Package pod is the heart of the daemon: pods and containers, what may happen
// to them in which state, and how they come back after a restart. It decides;
// the work is done by the parts it is given: images, layers, network, keepers.
//
// What is true is derived from files and from the keepers, never only from
// memory: every change is recorded before it is made, and everything made can be
// removed by one undo that copes with any half-made state.
//
// The package must not know gRPC, and never waits for anything while it holds a
// lock: a hanging volume, plugin or runtime holds up one container, not a list.
package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/flight"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/spec"
)

// Image is what a container needs to know of its image.
type Image struct {
	ID          string          // "sha256:..." of the configuration
	RepoTags    []string        // may be empty
	RepoDigests []string        // name@digest, may be empty
	Layers      []digest.Digest // diff ids, bottom first
	Config      ocispec.ImageConfig
	Checkpoint  string // the name of the container that it is a checkpoint of, or empty
}

// Images finds images and keeps them while they are used.
type Images interface {
	// Get returns the image a reference or id names; ErrNotFound if none.
	Get(ref string) (Image, error)
	// Acquire keeps the image with this id for the holder until Release, also
	// if it is removed meanwhile. A holder may acquire several images, and each
	// any number of times; Release lets go of all.
	Acquire(id, holder string) (Image, error)
	Release(holder string)
	// RetainOnly releases every holder that is not live.
	RetainOnly(live func(holder string) bool)
}

// Layers mounts root file systems. Both calls may be repeated.
type Layers interface {
	Mount(ctx context.Context, m layer.MountSpec) error
	Unmount(target string) error
	// Diff and RestoreUpper take what is in a writable layer elsewhere.
	Diff(ctx context.Context, layers []digest.Digest, upper string, w io.Writer) (deleted []string, err error)
	RestoreUpper(ctx context.Context, layers []digest.Digest, upper string, diff io.Reader, deleted []string) error
}

// Keeper runs containers; see keeper.Client for the contract.
type Keeper interface {
	Create(ctx context.Context, r keeper.CreateRequest) (keeper.CreateResponse, error)
	Start(ctx context.Context, id string) (time.Time, error)
	Signal(ctx context.Context, id string, sig unix.Signal, all bool) error
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	ReopenLog(ctx context.Context, id string) error
	Exec(ctx context.Context, r keeper.ExecRequest) (keeper.ExecResult, error)
	ExecOutput(ctx context.Context, r keeper.ExecRequest, limit int) (stdout, stderr []byte, res keeper.ExecResult, err error)
	Attach(ctx context.Context, r keeper.AttachRequest) error
	Resize(ctx context.Context, id string, width, height uint16) error
	Checkpoint(ctx context.Context, r keeper.CheckpointRequest, meanwhile func(context.Context) error) error
	Delete(ctx context.Context, id string) error
	List(ctx context.Context) ([]keeper.ContainerState, error)
	Watch(ctx context.Context, onConnect func([]keeper.ContainerState), onEvent func(keeper.Event)) error
	Close() error
}

// Config is what Pods are made of.
type Config struct {
	Root  string // survives a reboot
	State string // dies with the boot
	NetNS string // directory of pinned network namespaces, /run/netns

	Images  Images
	Layers  Layers
	Network network.Network

	// Keeper connects to the keeper called name, and starts it if it does not run.
	Keeper func(ctx context.Context, name string) (Keeper, error)
	// KeeperHolds reports whether that keeper has, or had when it died, a
	// container. It works also when the keeper cannot be started.
	KeeperHolds func(name, id string) bool
	// SweepKeepers removes what keepers have left that died and that nobody
	// needs, and returns what else there is of keepers that nobody needs.
	SweepKeepers func(needed func(name string) bool) (left LeftKeepers, err error)
	// KeeperFor names the keeper that gets a new pod's containers.
	KeeperFor func(podID string) string

	Plugins Plugins // nil if there can be none

	Handlers       map[string]keeper.Handler // by name
	DefaultHandler string                    // what the empty name means
	// Features tells what a handler's runtime can do.
	Features func(ctx context.Context, handler string) (spec.Features, error)
	// AppArmor returns the name of a profile that the kernel has: the one called
	// so, or the runtime's default if the name is empty.
	AppArmor    func(ctx context.Context, name string) (string, error)
	SELinux     *selinux.SELinux
	Init        string // the program that is PID 1 of a shared PID namespace
	VolumePaths host.VolumePaths
	Facts       host.Facts
	Units       Units    // makes pods' cgroups; nil makes them without systemd
	CDIDirs     []string // where CDI specs are; later ones win

	// CRIU finds the program that checkpoints are made and restored with.
	CRIU func(ctx context.Context) (host.Program, error)
	// RestoreImages lets CreateContainer restore images that are checkpoints.
	// Whoever may name such an image has the node, since CRIU does as it says.
	RestoreImages bool

	Logger *slog.Logger
}

// How long work may take at most, whoever waits for it.
const (
	maxOperation = 15 * time.Minute
	maxUndo      = 2 * time.Minute
	// maxKill bounds the wait for a process to go after SIGKILL. It is gone at
	// once unless the kernel is stuck in a device or a dead file system.
	maxKill = 90 * time.Second
)

// Pods are all pods and containers of the node.
type Pods struct {
	cfg      Config
	paths    paths
	log      *slog.Logger
	keepers  keepers
	ops      flight.Group[string, string]      // mutations under way, by what they do
	updates  network.Locks                     // of containers' limits, by their id
	relabels flight.Group[[2]string, struct{}] // of volumes, by path and label

	// checkpoints and restores of pods under way. They end with those who want
	// them, who are answered when nothing is left of them.
	checkpoints flight.Group[string, restored]

	work sync.WaitGroup // in the background

	hostUserNamespaces func() error // nil, or why there are none; tried out once
	sweeping           atomic.Bool  // of keepers that were let go; it comes soon
	readying           atomic.Bool  // of the kernel; see readyAttach

	events events
	// Since the start: leftovers that were removed, and connections to keepers
	// that were made again.
	swept, reconnects atomic.Int64

	newer []error // records that a newer sampan wrote; used by Open alone

	mu         sync.RWMutex // guards the maps; no other lock is taken while it is held
	pods       map[string]*Pod
	containers map[string]*Container
}

// LeftKeepers are keepers of no pod that a sweep has not removed.
type LeftKeepers struct {
	Occupied []string // names of those that have containers
	Leaving  bool     // there are others, which are alive and leave by themselves
}

// Pod is one pod. Its configuration never changes.
type Pod struct {
	podRecord

	mu                  sync.Mutex
	phase               phase
	ips                 []string
	problem             string                              // why a pod is not ready, if not because it was stopped
	updating            sync.Mutex                          // held by updatePod, so that updates follow each other; taken before mu
	overhead, resources *runtimeapi.LinuxContainerResources // as last updated
	released            bool                                // everything Stop gives back has been given back
	made                chan struct{}                       // closed when Run has succeeded or been undone

	told  EventKind // the last event that was announced; guarded by Pods.events
	heard heard     // by plugins
}

// phase is where a pod is in its life; it only grows.
type phase int

const (
	making   phase = iota // invisible: RunPodSandbox is under way
	ready                 // containers can be created
	stopped               // or being stopped; cannot become ready again
	removing              // being removed
)

// Status is a snapshot of a pod.
type Status struct {
	ID                  string
	Config              podConfig // read-only
	Handler             string    // as asked for; may be empty
	CreatedAt           time.Time
	Ready               bool
	IPs                 []string // the primary one first; none on the host's network
	NetNS               string   // where the network namespace is pinned; empty for the host's
	Problem             string   // why the pod is not ready, if it was not stopped
	KeeperName          string
	containersCgroup    string
	RuntimeName         string                              // the handler that "" stands for, resolved
	Overhead, Resources *runtimeapi.LinuxContainerResources // as last updated
}

// Status returns what is known of the pod; it never waits.
func (p *Pod) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Status{
		ID: p.ID, Config: p.Config, Handler: p.Handler, CreatedAt: p.CreatedAt,
		Ready: p.phase == ready, IPs: p.ips, NetNS: p.NetNS, Problem: p.problem,
		KeeperName: p.Keeper, containersCgroup: p.Cgroup, RuntimeName: p.Runtime, Overhead: p.overhead, Resources: p.resources,
	}
}

func (p *Pod) visible() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase != making
}

// String names the pod as people do, for errors.
func (p *Pod) String() string {
	m := p.Config.GetMetadata()
	return fmt.Sprintf("pod %s/%s (%s)", m.GetNamespace(), m.GetName(), short(p.ID))
}

func short(id string) string { return id[:min(13, len(id))] }

// List returns all pods, in no order.
func (s *Pods) List() []Status {
	pods := s.snapshotPods()
	all := make([]Status, 0, len(pods))
	for _, p := range pods {
		if p.visible() {
			all = append(all, p.Status())
		}
	}
	return all
}

// Get returns the pod with this id, or whose id alone starts so.
func (s *Pods) Get(id string) (Status, error) {
	p, err := s.pod(id)
	if err != nil {
		return Status{}, err
	}
	return p.Status(), nil
}

// ListContainers returns all containers, in no order.
func (s *Pods) ListContainers() []ContainerStatus {
	s.mu.RLock()
	all := make([]*Container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.RUnlock()
	list := make([]ContainerStatus, 0, len(all))
	for _, c := range all {
		if c.visible() {
			list = append(list, c.Status())
		}
	}
	return list
}

// GetContainer returns the container with this id, or whose id alone starts so.
func (s *Pods) GetContainer(id string) (ContainerStatus, error) {
	c, err := s.container(id)
	if err != nil {
		return ContainerStatus{}, err
	}
	return c.Status(), nil
}

func (s *Pods) snapshotPods() []*Pod {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]*Pod, 0, len(s.pods))
	for _, p := range s.pods {
		all = append(all, p)
	}
	return all
}

// containersOf returns the containers of a pod, those being created too.
func (s *Pods) containersOf(podID string) []*Container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var all []*Container
	for _, c := range s.containers {
		if c.PodID == podID {
			all = append(all, c)
		}
	}
	return all
}

func (s *Pods) pod(id string) (*Pod, error) {
	s.mu.RLock()
	found := startingWith(s.pods, id)
	s.mu.RUnlock()
	return only("pod", id, found)
}

func (s *Pods) container(id string) (*Container, error) {
	s.mu.RLock()
	found := startingWith(s.containers, id)
	s.mu.RUnlock()
	return only("container", id, found)
}

// startingWith looks up an id, or the start of one or more.
func startingWith[T any](all map[string]T, id string) []T {
	if v, ok := all[id]; ok {
		return []T{v}
	}
	var found []T
	for key, v := range all {
		if strings.HasPrefix(key, id) {
			found = append(found, v)
		}
	}
	return found
}

// only returns the one visible pod or container among those found by an id.
func only[T interface{ visible() bool }](kind, id string, found []T) (T, error) {
	var none T
	if id == "" {
		return none, fmt.Errorf("find %s: the id is empty: %w", kind, errdefs.ErrInvalidArgument)
	}
	found = slices.DeleteFunc(found, func(v T) bool { return !v.visible() })
	switch len(found) {
	case 0:
		return none, fmt.Errorf("%s %q: %w", kind, id, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return none, fmt.Errorf("%s %q: %d ids start so; give more of it: %w", kind, id, len(found), errdefs.ErrInvalidArgument)
}

func (s *Pods) addPod(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods[p.ID] = p
}

func (s *Pods) dropPod(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pods, p.ID)
	s.cfg.SELinux.Release(p.ID)
}

func (s *Pods) addContainer(c *Container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[c.ID] = c
}

// once does something to a pod or container, or joins those who are at it; key says
// to which. Errors name the verb and the object.
func (s *Pods) once(ctx context.Context, verb string, object fmt.Stringer, key string, work func(context.Context) error) error {
	_, err := s.ops.Do(ctx, verb+"\x00"+key, func(ctx context.Context) (string, error) {
		if err := work(ctx); err != nil {
			return "", fmt.Errorf("%s %v: %w", verb, object, err)
		}
		return "", nil
	})
	return err
}

// newID returns 64 random hex digits.
func newID() string {
	var b [32]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// undoContext is for cleaning up after work whose own context may have ended.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), maxUndo)
}
