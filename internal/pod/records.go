package pod

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/state"
)

// paths says where everything is. docs/STATE.md lists the files.
type paths struct{ root, state, netns string }

func (p paths) pods() string       { return filepath.Join(p.root, "pods") }
func (p paths) containers() string { return filepath.Join(p.root, "containers") }
func (p paths) trash() string      { return filepath.Join(p.root, "trash") }

// checkpoints has a directory for each checkpoint that is being made or read.
func (p paths) checkpoints() string { return filepath.Join(p.root, "checkpoints") }

func (p paths) pod(id string) string       { return filepath.Join(p.root, "pods", id) }
func (p paths) container(id string) string { return filepath.Join(p.root, "containers", id) }

func (p paths) podState(id string) string       { return filepath.Join(p.state, "pods", id) }
func (p paths) containerState(id string) string { return filepath.Join(p.state, "containers", id) }
func (p paths) bundle(id string) string         { return filepath.Join(p.containerState(id), "bundle") }
func (p paths) rootfs(id string) string         { return filepath.Join(p.bundle(id), "rootfs") }
func (p paths) images(id string) string         { return filepath.Join(p.containerState(id), "images") }
func (p paths) exit(id string) string           { return filepath.Join(p.container(id), "exit") }

// netNS is where a pod's network namespace is pinned, in the place where CNI
// plugins and ip(8) look for them.
func (p paths) netNS(id string) string {
	return filepath.Join(p.netns, "sampan-"+id[:min(16, len(id))])
}

// make creates the directories that everything else is in.
func (p paths) make() error {
	for _, dir := range []string{p.pods(), p.containers(), p.trash(), p.checkpoints(), filepath.Join(p.state, "pods"), filepath.Join(p.state, "containers")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	host.Spread(p.pods())
	host.Spread(p.containers())
	// The namespace directory is shared with others and stays as they like it.
	return os.MkdirAll(p.netns, 0o755)
}

// podLink is a symbolic link in a container's directory: which pod's it is, also
// when its records are damaged.
const podLink = "pod"

// A pod's directory has its configuration, written once, a fact: ready, which is
// renamed to stopped, and resources if they were updated. A container's has
// config, created, started, resources, and exit, which the keeper writes.
var (
	podKind          = state.Kind{Name: "pod-config", Version: 1}
	readyKind        = state.Kind{Name: "pod-ready", Version: 1}
	podResourcesKind = state.Kind{Name: "pod-resources", Version: 1}
	containerKind    = state.Kind{Name: "container-config", Version: 1}
	createdKind      = state.Kind{Name: "container-created", Version: 1}
	startedKind      = state.Kind{Name: "container-started", Version: 1}
	resourcesKind    = state.Kind{Name: "container-resources", Version: 1}
	checkpointKind   = state.Kind{Name: "checkpoint", Version: 1}
)

type podRecord struct {
	ID        string         `json:"id"`
	CreatedAt time.Time      `json:"createdAt"`
	Handler   string         `json:"handler"` // as asked for
	Runtime   string         `json:"runtime"` // the handler's name
	Keeper    string         `json:"keeper"`  // the keeper's name
	NetNS     string         `json:"netns,omitempty"`
	Labels    selinux.Labels `json:"selinux,omitzero"`
	Cgroup    string         `json:"cgroup"`         // in which its containers have theirs, below the root of every hierarchy
	Unit      string         `json:"unit,omitempty"` // of systemd, whose cgroup that is
	Config    podConfig      `json:"config"`
}

type readyRecord struct {
	Boot string   `json:"boot"`
	IPs  []string `json:"ips,omitempty"`
}

type podResourcesRecord struct {
	Overhead  linuxResources `json:"overhead"`
	Resources linuxResources `json:"resources"`
}

type containerRecord struct {
	ID          string    `json:"id"`
	PodID       string    `json:"podId"`
	CreatedAt   time.Time `json:"createdAt"`
	ImageID     string    `json:"imageId"`
	ImageDigest string    `json:"imageDigest,omitempty"` // name@digest
	// MountImages are the images of image volumes, by the index of the mount.
	MountImages map[int]MountImage `json:"mountImages,omitempty"`
	StopSignal  int                `json:"stopSignal"`
	// Checkpoint is where the container was restored from: an archive, a directory
	// or an image.
	Checkpoint string          `json:"checkpoint,omitempty"`
	Config     containerConfig `json:"config"`
}

type createdRecord struct {
	Process host.Process `json:"process"`
	User    *userRecord  `json:"user,omitempty"`
	// CgroupsPath is the spec's, if plugins have chosen another than is usual.
	CgroupsPath string `json:"cgroupsPath,omitempty"`
}

type userRecord struct {
	UID    int64   `json:"uid"`
	GID    int64   `json:"gid"`
	Groups []int64 `json:"groups,omitempty"`
}

type startedRecord struct {
	At time.Time `json:"at"`
}

// podConfig and containerConfig are the client's messages, kept as they came.
type podConfig struct{ *runtimeapi.PodSandboxConfig }

type containerConfig struct{ *runtimeapi.ContainerConfig }

func (c podConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.PodSandboxConfig) }

func (c *podConfig) UnmarshalJSON(b []byte) error {
	c.PodSandboxConfig = new(runtimeapi.PodSandboxConfig)
	return protojson.Unmarshal(b, c.PodSandboxConfig)
}

func (c containerConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.ContainerConfig) }

func (c *containerConfig) UnmarshalJSON(b []byte) error {
	c.ContainerConfig = new(runtimeapi.ContainerConfig)
	return protojson.Unmarshal(b, c.ContainerConfig)
}

// linuxResources is limits as last updated.
type linuxResources struct {
	*runtimeapi.LinuxContainerResources
}

func (r linuxResources) MarshalJSON() ([]byte, error) {
	return protojson.Marshal(r.LinuxContainerResources)
}

func (r *linuxResources) UnmarshalJSON(b []byte) error {
	r.LinuxContainerResources = new(runtimeapi.LinuxContainerResources)
	return protojson.Unmarshal(b, r.LinuxContainerResources)
}

// discard makes the directory of a pod or container disappear at once and its
// files soon: what is in the trash is nobody's.
func (s *Pods) discard(dir string) error {
	target := filepath.Join(s.paths.trash(), filepath.Base(dir)+"-"+newID()[:8])
	err := os.Rename(dir, target)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", filepath.Base(dir), err)
	}
	s.work.Go(func() {
		if err := os.RemoveAll(target); err != nil {
			s.log.Warn("trash stays until the next start", "err", err)
		}
	})
	return nil
}

// emptyTrash removes what an earlier process did not get to.
func (s *Pods) emptyTrash() {
	entries, err := os.ReadDir(s.paths.trash())
	if err != nil {
		s.log.Warn("read trash", "err", err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(s.paths.trash(), e.Name())); err != nil {
			s.log.Warn("trash stays until the next start", "err", err)
		}
	}
}

// loadContainer rebuilds a container from its records, as far as they tell. Made
// is false if its creation never finished.
func (s *Pods) loadContainer(id string) (c *Container, made bool, err error) {
	dir := s.paths.container(id)
	c = &Container{exited: make(chan struct{}), created: make(chan struct{})}
	close(c.created)
	unreadable := s.read(filepath.Join(dir, "config"), containerKind, &c.containerRecord)
	if errors.Is(unreadable, os.ErrNotExist) {
		return nil, false, unreadable
	}
	if unreadable != nil {
		if c.containerRecord, err = s.unreadableContainer(id); err != nil {
			return nil, false, errors.Join(unreadable, err)
		}
		c.problem = unreadable.Error()
	}
	c.resources = c.Config.GetLinux().GetResources()
	var created createdRecord
	if err := s.read(filepath.Join(dir, "created"), createdKind, &created); err != nil {
		return c, false, ignoreAbsent(err)
	}
	c.process, c.user, c.cgroupsPath, c.state = created.Process, created.User, created.CgroupsPath, Created
	var started startedRecord
	if err := s.read(filepath.Join(dir, "started"), startedKind, &started); err == nil {
		c.startedAt, c.state = started.At, Running
	}
	var limits linuxResources
	if err := s.read(filepath.Join(dir, "resources"), resourcesKind, &limits); err == nil {
		c.resources = limits.LinuxContainerResources
	}
	var exit keeper.Exit
	err = s.read(s.paths.exit(id), keeper.ExitKind, &exit)
	switch {
	case err == nil:
		c.end(exit)
	case !errors.Is(err, os.ErrNotExist):
		c.end(keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: c.CreatedAt, Message: err.Error()})
	case c.process.Boot != host.BootID():
		c.end(keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: bootTime(), Message: "the machine was restarted while the container was there"})
	}
	return c, true, nil
}

// unreadableContainer stands for a container whose record is damaged: it can be seen,
// stopped and removed, alone or with its pod. What it was asked to be is lost.
func (s *Pods) unreadableContainer(id string) (containerRecord, error) {
	dir := s.paths.container(id)
	pod, err := os.Readlink(filepath.Join(dir, podLink))
	if err != nil {
		return containerRecord{}, err
	}
	r := containerRecord{
		ID: id, PodID: filepath.Base(pod), StopSignal: int(unix.SIGTERM),
		Config: containerConfig{&runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "unreadable-" + short(id)},
		}},
	}
	if info, err := os.Lstat(filepath.Join(dir, podLink)); err == nil {
		r.CreatedAt = info.ModTime()
	}
	return r, nil
}

// read is state.Read during Open, which notes what a newer sampan has written.
func (s *Pods) read(path string, kind state.Kind, v any) error {
	err := state.Read(path, kind, v)
	if errors.Is(err, state.ErrVersion) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.newer = append(s.newer, err)
	}
	return err
}

func ignoreAbsent(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
