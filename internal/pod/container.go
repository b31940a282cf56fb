package pod

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// Container is one container. What it was asked to be never changes.
type Container struct {
	containerRecord

	created chan struct{} // closed when its creation has succeeded or been undone
	exited  chan struct{} // closed when it has exited

	mu        sync.Mutex
	state     State
	process   host.Process
	user      *userRecord
	startedAt time.Time
	exit      *keeper.Exit
	resources *runtimeapi.LinuxContainerResources
	abandon   context.CancelFunc // ends its creation
	starting  bool               // the keeper was asked to start it and has not answered

	told  EventKind // the last event that was announced; guarded by Pods.events
	heard heard     // by plugins
	// startTold is closed when plugins know that a start has succeeded or failed;
	// nil if nobody has tried.
	startTold chan struct{}

	problem     string // why nothing is known but that it is there; empty if that is not so
	lost        bool   // its keeper has it, but cannot read its records
	cgroupsPath string // of the spec, if plugins have chosen another; set before the container is visible
}

// State is where a container is in its life.
type State int

const (
	Creating State = iota // invisible
	Created
	Running
	Exited
	Removing // invisible to nobody, but on its way out
	Unknown  // only in a ContainerStatus: it is there, but its keeper cannot tell more
)

// ContainerStatus is a snapshot of a container.
type ContainerStatus struct {
	ID, PodID   string
	Config      containerConfig // read-only
	ImageID     string
	ImageDigest string             // name@digest, may be empty
	MountImages map[int]MountImage // by the index of the mount; read-only
	CreatedAt   time.Time
	StartedAt   time.Time // zero if it never started
	State       State
	Exit        keeper.Exit // of an exited container
	Process     host.Process
	Resources   *runtimeapi.LinuxContainerResources // as last updated
	StopSignal  unix.Signal
	User        *runtimeapi.ContainerUser
	LogPath     string
	Problem     string // why it cannot be told what it is; empty if it can
}

// Status returns what is known of the container; it never waits.
func (c *Container) Status() ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := ContainerStatus{
		ID: c.ID, PodID: c.PodID, Config: c.Config, ImageID: c.ImageID, ImageDigest: c.ImageDigest,
		MountImages: c.MountImages, CreatedAt: c.CreatedAt, StartedAt: c.startedAt, State: c.state, Process: c.process,
		Resources: c.resources, StopSignal: unix.Signal(c.StopSignal), Problem: c.problem,
	}
	if c.exit != nil {
		st.Exit = *c.exit
		st.State = Exited
	} else if c.lost {
		st.State, st.Problem = Unknown, "its keeper cannot read its records, and does not take its output: stop it; the keeper's log says more"
	}
	if c.user != nil {
		st.User = &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{Uid: c.user.UID, Gid: c.user.GID, SupplementalGroups: c.user.Groups}}
	}
	return st
}

func (c *Container) visible() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state != Creating
}

// String names the container as people do, for errors.
func (c *Container) String() string {
	return fmt.Sprintf("container %s (%s)", c.Config.GetMetadata().GetName(), short(c.ID))
}

// end records that the container has exited; the first word counts. One that is
// being made, or unmade because it was half made, stays invisible.
func (c *Container) end(exit keeper.Exit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.exit != nil {
		return
	}
	c.exit = &exit
	if c.state != Creating {
		c.state = max(c.state, Exited)
	}
	close(c.exited)
}

// strand makes a half-made container that cannot be undone visible, as one that
// has exited, so that the client can remove what is left.
func (s *Pods) strand(c *Container, why string) {
	c.end(keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: time.Now(), Message: why})
	c.mu.Lock()
	c.state = max(c.state, Exited)
	c.mu.Unlock()
	s.announceContainer(c)
}

// ended is end, and lets it be known.
func (s *Pods) ended(c *Container, exit keeper.Exit) {
	c.end(exit)
	s.announceContainer(c)
	s.hearsExit(c)
}

// giveUp makes a creation under way undo itself.
func (c *Container) giveUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.abandon != nil {
		c.abandon()
	}
}

func (c *Container) waitCreated(ctx context.Context) error {
	c.giveUp()
	select {
	case <-c.created:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%v is still being created and does not give up: %w", c, context.Cause(ctx))
	}
}

// CreateContainer makes a container in a pod and returns its id. The config has
// passed spec.ValidateContainer. A container of the same name and attempt in the
// pod is the answer if it is there already or being made; if its configuration
// is another the error is ErrAlreadyExists.
func (s *Pods) CreateContainer(ctx context.Context, podID string, config *runtimeapi.ContainerConfig) (string, error) {
	p, err := s.pod(podID)
	if err != nil {
		return "", err
	}
	m := config.GetMetadata()
	key := strings.Join([]string{"create", p.ID, m.GetName(), fmt.Sprint(m.GetAttempt())}, "\x00")
	id, err := s.ops.Do(ctx, key, func(ctx context.Context) (string, error) {
		for _, c := range s.containersOf(p.ID) {
			if !proto.Equal(c.Config.GetMetadata(), m) {
				continue
			}
			if !c.visible() {
				return "", fmt.Errorf("%v was half made when the daemon died and is being removed; try again: %w", c, errdefs.ErrUnavailable)
			}
			return c.ID, nil
		}
		s.readyAttach()
		return s.createContainer(ctx, p, config)
	})
	if err != nil {
		return "", err
	}
	// Also of one that another caller was making.
	if c, err := s.container(id); err == nil && !proto.Equal(c.Config.ContainerConfig, config) {
		return "", fmt.Errorf("%v exists in %v with another configuration; remove it or use a new attempt: %w", c, p, errdefs.ErrAlreadyExists)
	}
	return id, nil
}

func (s *Pods) createContainer(ctx context.Context, p *Pod, config *runtimeapi.ContainerConfig) (string, error) {
	from, done, err := s.sourceOf(ctx, p, config)
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", config.GetMetadata().GetName(), err)
	}
	defer done()
	return s.createFrom(ctx, p, config, from)
}

// createFrom makes a container, from a checkpoint unless from is nil.
func (s *Pods) createFrom(ctx context.Context, p *Pod, config *runtimeapi.ContainerConfig, from *source) (string, error) {
	image, err := s.imageOf(config, from)
	if err != nil {
		return "", fmt.Errorf("create container %s: image: %w", config.GetMetadata().GetName(), err)
	}
	mounted, err := s.imagesToMount(config)
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", config.GetMetadata().GetName(), err)
	}
	signal, err := spec.StopSignal(config, image.Config)
	if err != nil {
		return "", err
	}
	making, abandon := context.WithCancel(ctx)
	defer abandon()
	c := &Container{
		containerRecord: containerRecord{
			ID: newID(), PodID: p.ID, CreatedAt: time.Now(), ImageID: image.ID, StopSignal: int(signal),
			MountImages: mounted, Config: containerConfig{config},
		},
		created: make(chan struct{}), exited: make(chan struct{}),
		resources: config.GetLinux().GetResources(), abandon: abandon,
	}
	defer close(c.created)
	if from != nil {
		c.Checkpoint = from.name
	}
	if len(image.RepoDigests) > 0 {
		c.ImageDigest = image.RepoDigests[0]
	}
	if err := s.admit(p, c); err != nil {
		return "", err
	}
	if err := s.assemble(making, p, c, from); err != nil {
		if making.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("it, or its pod, is being stopped or removed: %w", errdefs.ErrAborted)
		}
		err = fmt.Errorf("create %v: %w", c, err)
		undo, cancel := undoContext(ctx)
		defer cancel()
		if uerr := s.undoContainer(undo, p, c); uerr != nil {
			s.strand(c, fmt.Sprintf("%v; and undoing it: %v", err, uerr))
			return "", fmt.Errorf("%w (undo: %w)", err, uerr)
		}
		return "", err
	}
	s.announceContainer(c)
	s.tellCreated(ctx, p, c)
	return c.ID, nil
}

func (s *Pods) imageOf(config *runtimeapi.ContainerConfig, from *source) (Image, error) {
	if from != nil {
		return from.image, nil
	}
	return s.cfg.Images.Get(imageName(config))
}

// imageName prefers what the client resolved already.
func imageName(config *runtimeapi.ContainerConfig) string { return config.GetImage().GetImage() }

// admit lets a container into a pod that is ready. From here on a Stop of the
// pod finds it.
func (s *Pods) admit(p *Pod, c *Container) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase != ready {
		return fmt.Errorf("create %v: %v is not ready: %w", c, p, errdefs.ErrFailedPrecondition)
	}
	s.addContainer(c)
	return nil
}

// assemble makes the container, each step recorded or derivable before it is
// taken.
func (s *Pods) assemble(ctx context.Context, p *Pod, c *Container, from *source) error {
	if err := s.recordContainer(c); err != nil {
		return err
	}
	image, err := s.cfg.Images.Acquire(c.ImageID, c.ID)
	if err != nil {
		return err
	}
	oci, err := s.prepare(ctx, p, c, image, from)
	if err != nil {
		return err
	}
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	fault.Point("container.bundle-written")
	create := keeper.CreateRequest{
		ID: c.ID, PodID: p.ID, Bundle: s.paths.bundle(c.ID), Handler: s.cfg.Handlers[p.Runtime],
		LogPath: logPath(p, c), ExitRecord: s.paths.exit(c.ID),
		Terminal: c.Config.GetTty(), Stdin: c.Config.GetStdin(), StdinOnce: c.Config.GetStdinOnce(),
	}
	if from != nil {
		create.Restore = &keeper.Checkpoint{Dir: from.dir, CRIU: from.criu.Path}
	}
	resp, err := k.Create(ctx, create)
	if err != nil {
		return err
	}
	fault.Point("container.created")
	u := oci.Process.User
	user := &userRecord{UID: int64(u.UID), GID: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		user.Groups = append(user.Groups, int64(g))
	}
	if err := state.Write(filepath.Join(s.paths.container(c.ID), "created"), createdKind, createdRecord{Process: resp.Process, User: user, CgroupsPath: c.cgroupsPath}, state.Volatile); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("the pod was stopped meanwhile: %w", errdefs.ErrAborted)
	}
	c.state = Created
	if c.exit != nil {
		c.state = Exited
	}
	c.process, c.user, c.abandon = resp.Process, user, nil
	return nil
}

func logPath(p *Pod, c *Container) string {
	dir, name := p.Config.GetLogDirectory(), c.Config.GetLogPath()
	if dir == "" || name == "" {
		return ""
	}
	return filepath.Join(dir, name)
}

// StartContainer runs a created container. It fails with ErrFailedPrecondition
// if it was started before.
func (s *Pods) StartContainer(ctx context.Context, id string) error {
	c, err := s.container(id)
	if err != nil {
		return err
	}
	return s.once(ctx, "start", c, c.ID, func(ctx context.Context) error { return s.startContainer(ctx, c) })
}

func (s *Pods) startContainer(ctx context.Context, c *Container) error {
	st := c.Status()
	if st.State != Created {
		return fmt.Errorf("it is %v, not created: %w", st.State, errdefs.ErrFailedPrecondition)
	}
	p, err := s.pod(c.PodID)
	if err != nil {
		return err
	}
	defer c.startsTelling()()
	if err := s.tellStart(ctx, p, c); err != nil {
		return err
	}
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	defer s.announceContainer(c)
	at, err := c.start(func() (time.Time, error) { return s.startInKeeper(ctx, k, c) })
	if err != nil {
		return err
	}
	fault.Point("container.started")
	if err := s.recordStart(c.ID, at); err != nil {
		return err
	}
	s.tellStarted(ctx, p, c)
	return nil
}

// recordStart notes when a container was started.
func (s *Pods) recordStart(id string, at time.Time) error {
	return state.Write(filepath.Join(s.paths.container(id), "started"), startedKind, startedRecord{at}, state.Volatile)
}

// startInKeeper has the keeper start the container. An earlier daemon may have done
// so and died before it could say so to anybody: then this is its answer.
func (s *Pods) startInKeeper(ctx context.Context, k Keeper, c *Container) (time.Time, error) {
	at, err := k.Start(ctx, c.ID)
	if !errdefs.IsFailedPrecondition(err) {
		return at, err
	}
	all, lerr := k.List(ctx)
	if lerr != nil {
		return at, err
	}
	for _, ks := range all {
		if ks.ID == c.ID && !ks.StartedAt.IsZero() {
			return ks.StartedAt, nil
		}
	}
	return at, err
}

// start marks the container as running. Its exit may be known before the keeper
// has answered; it counts as started all the same.
func (c *Container) start(run func() (time.Time, error)) (time.Time, error) {
	c.mu.Lock()
	c.starting = true
	c.mu.Unlock()
	at, err := run()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.starting = false
	if err != nil {
		return at, err
	}
	c.startedAt = at
	if c.exit == nil && c.state == Created {
		c.state = Running
	}
	return at, nil
}

// String returns the state as in "it is running".
func (s State) String() string {
	return [...]string{"being created", "created", "running", "exited", "being removed", "unknown"}[s]
}

func (s *Pods) keeperOf(ctx context.Context, c *Container) (Keeper, error) {
	p, err := s.pod(c.PodID)
	if err != nil {
		return nil, err
	}
	return s.keeper(ctx, p)
}

// StopContainer sends the container's stop signal and, after the grace period,
// SIGKILL to all its processes. It may be called any number of times; an unknown
// container is stopped.
func (s *Pods) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := s.container(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := s.pod(c.PodID)
	if err != nil {
		return err
	}
	// Two stops with different grace periods must not wait for each other.
	key := fmt.Sprintf("%s\x00%d", c.ID, grace)
	return s.once(ctx, "stop", c, key, func(ctx context.Context) error {
		if err := s.stopContainer(ctx, p, c, grace); err != nil {
			return err
		}
		s.tellContainerStopped(ctx, p, c)
		return nil
	})
}

func (s *Pods) stopContainer(ctx context.Context, p *Pod, c *Container, grace time.Duration) error {
	if c.Status().State == Exited {
		return nil
	}
	if grace > 0 {
		k, err := s.keeper(ctx, p)
		if err != nil {
			return err
		}
		if err := k.Signal(ctx, c.ID, unix.Signal(c.StopSignal), false); err != nil && !isGone(err) {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		if c.waitExited(wait) == nil {
			return nil
		}
	}
	return s.kill(ctx, p, c)
}

// kill ends the container now, with all its processes.
func (s *Pods) kill(ctx context.Context, p *Pod, c *Container) error {
	if c.Status().State == Exited {
		return nil
	}
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	if err := k.Signal(ctx, c.ID, unix.SIGKILL, true); err != nil && !isGone(err) {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, maxKill)
	defer cancel()
	if err := c.waitExited(wait); err != nil {
		return fmt.Errorf("%v was killed, but does not end: the kernel still works for it, perhaps on a volume that hangs: %w", c, err)
	}
	return nil
}

// isGone reports errors of signalling what has exited already.
func isGone(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) }

func (c *Container) waitExited(ctx context.Context) error {
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// RemoveContainer ends the container and removes all there is of it. An unknown
// container is removed already.
func (s *Pods) RemoveContainer(ctx context.Context, id string) error {
	c, err := s.container(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.removeContainer(ctx, c)
}

func (s *Pods) removeContainer(ctx context.Context, c *Container) error {
	return s.once(ctx, "remove", c, c.ID, func(ctx context.Context) error {
		p, err := s.pod(c.PodID)
		if errdefs.IsNotFound(err) {
			return nil // it went with its pod
		}
		if err != nil {
			return err
		}
		return s.undoContainer(ctx, p, c)
	})
}

// UpdateContainer changes the limits of a created or running container. On error
// they are what they were.
func (s *Pods) UpdateContainer(ctx context.Context, id string, update *runtimeapi.LinuxContainerResources) error {
	c, err := s.container(id)
	if err != nil {
		return err
	}
	update, err = s.tellUpdate(ctx, c, update)
	if err != nil {
		return fmt.Errorf("update %v: %w", c, err)
	}
	if err := s.changeLimits(ctx, c, update); err != nil {
		return err
	}
	s.tellUpdated(ctx, c)
	return nil
}

func (s *Pods) changeLimits(ctx context.Context, c *Container, update *runtimeapi.LinuxContainerResources) error {
	// One at a time: each builds on what the one before has set.
	unlock, err := s.updates.Lock(ctx, c.ID)
	if err != nil {
		return fmt.Errorf("update %v: another update is under way: %w", c, err)
	}
	defer unlock()
	if err := s.updateContainer(ctx, c, update); err != nil {
		return fmt.Errorf("update %v: %w", c, err)
	}
	return nil
}

func (s *Pods) updateContainer(ctx context.Context, c *Container, update *runtimeapi.LinuxContainerResources) error {
	c.mu.Lock()
	old, st := c.resources, c.state
	c.mu.Unlock()
	if st != Created && st != Running {
		return fmt.Errorf("it is %v: %w", st, errdefs.ErrFailedPrecondition)
	}
	merged := spec.MergeResources(old, update)
	limits, err := spec.Resources(merged, s.cfg.Facts)
	if err != nil {
		return err
	}
	k, err := s.keeperOf(ctx, c)
	if err != nil {
		return err
	}
	if err := k.Update(ctx, c.ID, limits); err != nil {
		return err
	}
	fault.Point("container.updated")
	if err := state.Write(filepath.Join(s.paths.container(c.ID), "resources"), resourcesKind, linuxResources{merged}, state.Volatile); err != nil {
		return errors.Join(err, s.restoreLimits(ctx, k, c, old))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resources = merged
	return nil
}

// restoreLimits undoes an update that could not be recorded.
func (s *Pods) restoreLimits(ctx context.Context, k Keeper, c *Container, old *runtimeapi.LinuxContainerResources) error {
	limits, err := spec.Resources(old, s.cfg.Facts)
	if err != nil {
		return err
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	if err := k.Update(undo, c.ID, limits); err != nil {
		return fmt.Errorf("put the limits back: %w", err)
	}
	return nil
}

// ReopenLog makes the output of a running container go to the file that is at
// its log path now.
func (s *Pods) ReopenLog(ctx context.Context, id string) error {
	_, k, err := s.running(ctx, id)
	if err != nil {
		return err
	}
	return k.ReopenLog(ctx, id)
}

// Exec runs a further process in a running container and waits for its end.
func (s *Pods) Exec(ctx context.Context, r keeper.ExecRequest) (keeper.ExecResult, error) {
	c, k, err := s.running(ctx, r.ID)
	if err != nil {
		return keeper.ExecResult{}, err
	}
	r.ID = c.ID
	return k.Exec(ctx, r)
}

// ExecOutput is Exec with the output returned, of each stream at most limit bytes.
func (s *Pods) ExecOutput(ctx context.Context, r keeper.ExecRequest, limit int) (stdout, stderr []byte, res keeper.ExecResult, err error) {
	c, k, err := s.running(ctx, r.ID)
	if err != nil {
		return nil, nil, keeper.ExecResult{}, err
	}
	r.ID = c.ID
	return k.ExecOutput(ctx, r, limit)
}

func (s *Pods) running(ctx context.Context, id string) (*Container, Keeper, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	if st := c.Status().State; st != Running {
		return nil, nil, fmt.Errorf("%v is %v, not running: %w", c, st, errdefs.ErrFailedPrecondition)
	}
	k, err := s.keeperOf(ctx, c)
	return c, k, err
}

// onExit is told by the keeper, after the exit is recorded.
func (s *Pods) onExit(id string, exit keeper.Exit) {
	s.mu.RLock()
	c, p := s.containers[id], s.pods[id]
	s.mu.RUnlock()
	switch {
	case c != nil:
		s.ended(c, exit)
	case p != nil:
		// Its init: with it the pod's PID namespace is gone.
		if p.Status().Ready {
			s.fail(p, fmt.Sprintf("the process that holds the pod's PID namespace ended with code %d", exit.Code))
		}
	}
}

// undoContainer removes all there is of a container, in whatever state: the one
// way out for failed creations, removals and recovery.
func (s *Pods) undoContainer(ctx context.Context, p *Pod, c *Container) error {
	if err := s.deleteFromKeeper(ctx, p, c.ID); err != nil {
		return err
	}
	fault.Point("container.deleted-from-keeper")
	// Somebody may wait for its end, and when the keeper's word of that comes the
	// container may be forgotten here.
	if c.Status().State != Exited {
		c.end(s.recordedExit(c))
	}
	s.tellContainerRemoved(ctx, p, c)
	if err := s.undoFiles(c.ID); err != nil {
		return err
	}
	s.announceContainer(c)
	return nil
}

// deleteFromKeeper makes the pod's keeper forget a container. A keeper that does
// not start is no obstacle to removing what it never had.
func (s *Pods) deleteFromKeeper(ctx context.Context, p *Pod, id string) error {
	k, err := s.keeper(ctx, p)
	if err != nil {
		if s.cfg.KeeperHolds(p.Keeper, id) {
			return err
		}
		return nil
	}
	return k.Delete(ctx, id)
}

// undoFiles removes what is left of a container no keeper knows any more.
func (s *Pods) undoFiles(id string) error {
	if err := s.cfg.Layers.Unmount(s.paths.rootfs(id)); err != nil {
		return err
	}
	fault.Point("container.rootfs-unmounted")
	if err := s.unmountImages(id); err != nil {
		return err
	}
	fault.Point("container.images-unmounted")
	if err := s.removeStateDir(s.paths.containerState(id)); err != nil {
		return err
	}
	fault.Point("container.state-removed")
	if err := s.discard(s.paths.container(id)); err != nil {
		return err
	}
	fault.Point("container.discarded")
	s.cfg.Images.Release(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
	return nil
}
