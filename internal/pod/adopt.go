package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// Open reads the records of all pods and containers. What it returns can be
// listed and used at once; Adopt brings it up to date. If a newer sampan wrote any
// of them Open fails, with ErrVersion, and has changed nothing: what runs goes on,
// and is not run a second time beside.
func Open(cfg Config) (*Pods, error) {
	s := &Pods{
		cfg: cfg, log: cfg.Logger,
		paths:      paths{cfg.Root, cfg.State, cfg.NetNS},
		pods:       make(map[string]*Pod),
		containers: make(map[string]*Container),
	}
	s.ops.Limit = maxOperation
	s.checkpoints.Linger = true
	s.hostUserNamespaces = sync.OnceValue(func() error { return host.ProbeUserNamespaces(cfg.Root, cfg.Init) })
	s.keepers = keepers{dial: cfg.Keeper, follow: s.follow, needs: s.knowsPod, closed: make(chan struct{}), all: make(map[string]*keeperConn)}
	if err := s.paths.make(); err != nil {
		return nil, fmt.Errorf("open pods: %w", err)
	}
	unbegun, err := s.loadPods()
	err = errors.Join(err, s.loadContainers(), errors.Join(s.newer...))
	if err != nil {
		return nil, fmt.Errorf("open pods: %w", err)
	}
	for _, id := range unbegun {
		if err := s.discard(s.paths.pod(id)); err != nil {
			return nil, fmt.Errorf("open pods: %w", err)
		}
	}
	s.sweepCheckpoints()
	for _, p := range s.pods {
		p.told = s.podReached(p)
		switch p.phase {
		case ready:
			p.heard.Store(heardOf)
		case stopped:
			p.heard.Store(heardToStop)
		}
	}
	for _, c := range s.containers {
		c.told, _ = s.containerReached(c)
		switch c.state {
		case Created, Running:
			c.heard.Store(heardOf)
		case Exited:
			c.heard.Store(heardToStop)
		}
	}
	return s, nil
}

// Close ends the background work. Pods go on without the daemon.
func (s *Pods) Close() {
	s.keepers.close()
	s.work.Wait()
}

// loadPods returns the ids of those that there is nothing of but a directory.
func (s *Pods) loadPods() (unbegun []string, err error) {
	entries, err := os.ReadDir(s.paths.pods())
	pods := onAllCPUs(entries, func(e os.DirEntry) *Pod {
		if s.unbegun(e.Name()) {
			return nil
		}
		return s.loadPod(e.Name())
	})
	for i, p := range pods {
		if p == nil {
			unbegun = append(unbegun, entries[i].Name())
			continue
		}
		s.pods[p.ID] = p
		s.cfg.SELinux.Adopt(p.ID, p.Labels)
	}
	return unbegun, err
}

// onAllCPUs returns what do makes of each element. The daemon answers when all records
// are read, and reading them is nothing but work.
func onAllCPUs[E, R any](elements []E, do func(E) R) []R {
	results := make([]R, len(elements))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(elements)); i = next.Add(1) - 1 {
				results[i] = do(elements[i])
			}
		})
	}
	wg.Wait()
	return results
}

// unbegun tells whether a pod's making was cut off before its configuration was
// written, and so before anything else was made.
func (s *Pods) unbegun(id string) bool {
	dir := s.paths.pod(id)
	return !slices.ContainsFunc([]string{"config", "ready", "stopped"}, func(name string) bool {
		return state.Exists(filepath.Join(dir, name))
	})
}

// loadPod rebuilds a pod from its records. One that cannot be read is a pod
// that is not ready and says why, so that it can be seen and removed.
func (s *Pods) loadPod(id string) *Pod {
	dir := s.paths.pod(id)
	p := &Pod{made: make(chan struct{})}
	close(p.made)
	if err := s.read(filepath.Join(dir, "config"), podKind, &p.podRecord); err != nil {
		p.podRecord = s.unreadablePod(id)
		p.phase, p.problem = stopped, err.Error()
		return p
	}
	s.loadResources(p)
	var r readyRecord
	if err := s.read(filepath.Join(dir, "stopped"), readyKind, &r); !errors.Is(err, os.ErrNotExist) {
		p.phase, p.ips = stopped, r.IPs
		return p
	}
	err := s.read(filepath.Join(dir, "ready"), readyKind, &r)
	switch {
	case errors.Is(err, os.ErrNotExist):
		p.phase = making // never finished: Adopt undoes it
	case err != nil:
		p.phase, p.problem = stopped, err.Error()
	case r.Boot != host.BootID():
		p.phase, p.problem = stopped, "the machine was restarted"
	case p.NetNS != "" && !host.Pinned(p.NetNS):
		p.phase, p.problem = stopped, "its network namespace is gone"
	case spec.NamespacesOf(p.Config.PodSandboxConfig).User && !host.Pinned(s.pinned(id, "user")):
		p.phase, p.problem = stopped, "its user namespace is gone"
	default:
		p.phase, p.ips = ready, r.IPs
	}
	return p
}

// unreadablePod stands for a pod whose record is damaged. It may hold anything a
// pod can hold, so that its removal looks everywhere.
func (s *Pods) unreadablePod(id string) podRecord {
	r := podRecord{
		ID: id, CreatedAt: time.Unix(0, 0), Runtime: s.cfg.DefaultHandler, Keeper: s.cfg.KeeperFor(id), NetNS: s.paths.netNS(id),
		Config: podConfig{&runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "unreadable-" + short(id), Namespace: "sampan", Uid: id},
		}},
	}
	r.Cgroup, r.Unit = s.placeCgroup(id, "")
	if info, err := os.Stat(s.paths.pod(id)); err == nil {
		r.CreatedAt = info.ModTime()
	}
	return r
}

func (s *Pods) loadContainers() error {
	entries, err := os.ReadDir(s.paths.containers())
	if err != nil {
		return err
	}
	type loaded struct {
		c    *Container
		made bool
		err  error
	}
	all := onAllCPUs(entries, func(e os.DirEntry) loaded {
		c, made, err := s.loadContainer(e.Name())
		return loaded{c, made, err}
	})
	for i, e := range entries {
		c, made, err := all[i].c, all[i].made, all[i].err
		switch {
		case c == nil:
			// Nothing can be said of it; Adopt removes what it holds.
			s.log.Warn("container cannot be adopted", "container", e.Name(), "err", err)
		case s.pods[c.PodID] == nil:
			s.log.Warn("container cannot be adopted", "container", e.Name(), "err", "there is no pod "+c.PodID)
		default:
			if err != nil {
				c.end(keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: time.Now(), Message: err.Error()})
			}
			if made || err != nil {
				c.state = max(c.state, Created)
			}
			s.containers[c.ID] = c
		}
	}
	return nil
}

// Adopt brings everything back under control after a start: it finishes what an
// earlier process left half-made, reconnects to the keepers, and sweeps what
// belongs to nobody. It is called once, and may run while requests are served.
func (s *Pods) Adopt(ctx context.Context) {
	if name := s.cfg.KeeperFor(""); name != "" {
		s.work.Go(func() {
			if _, err := s.keepers.get(ctx, name, ""); err != nil && ctx.Err() == nil {
				s.log.Error("keeper does not start; pods will try again", "keeper", name, "err", err)
			}
		})
	}
	s.HoldImages()
	s.cfg.Images.RetainOnly(s.knowsContainer)
	var wg sync.WaitGroup
	for _, p := range s.snapshotPods() {
		wg.Go(func() { s.adoptPod(ctx, p) })
	}
	wg.Wait()
	s.sweep(ctx)
}

// HoldImages keeps the images of all containers. Those that were not there when
// they were asked for may be later.
func (s *Pods) HoldImages() {
	for _, c := range s.loadedContainers() {
		for _, image := range c.images() {
			if _, err := s.cfg.Images.Acquire(image, c.ID); err != nil {
				s.log.Warn("image of a container is gone", "container", c.ID, "image", image, "err", err)
			}
		}
	}
}

func (s *Pods) loadedContainers() []*Container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]*Container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	return all
}

func (s *Pods) knowsContainer(id string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers[id] != nil
}

func (s *Pods) knowsPod(id string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pods[id] != nil
}

// adoptPod finishes what was under way with one pod when the daemon died. What
// this process is making meanwhile is none of its business: that is asked first,
// since what is made in between is no longer half made either.
func (s *Pods) adoptPod(ctx context.Context, p *Pod) {
	ctx, cancel := context.WithTimeout(ctx, maxUndo)
	defer cancel()
	if !closed(p.made) {
		return
	}
	// Whoever has containers, or may have, is followed from now on.
	if err := s.reach(ctx, p); err != nil {
		s.log.Error("keeper of a pod is out of reach", "pod", p.ID, "err", err)
	}
	for _, c := range s.containersOf(p.ID) {
		if !closed(c.created) || c.visible() {
			continue
		}
		if err := persist(ctx, func() error { return s.undoContainer(ctx, p, c) }); err != nil {
			s.log.Error("half-made container stays", "container", c.ID, "err", err)
			s.strand(c, "its creation was interrupted: "+err.Error())
		}
	}
	if !p.visible() {
		if err := persist(ctx, func() error { return s.undoPod(ctx, p) }); err != nil {
			s.log.Error("half-made pod stays", "pod", p.ID, "err", err)
			s.fail(p, "its creation was interrupted: "+err.Error())
		}
	}
}

const (
	// maxReach bounds how long an adoption waits for a keeper. Another one may just
	// be leaving, or have been killed on its way up.
	maxReach   = 15 * time.Second
	reachPause = 200 * time.Millisecond
)

// reach connects to the pod's keeper, if need be several times.
func (s *Pods) reach(ctx context.Context, p *Pod) error {
	return persist(ctx, func() error {
		_, err := s.keeper(ctx, p)
		return err
	})
}

// persist does what needs a keeper, and again while the keeper is out of reach.
func persist(ctx context.Context, do func() error) error {
	late := time.After(maxReach)
	for {
		err := do()
		if !errdefs.IsUnavailable(err) {
			return err
		}
		select {
		case <-time.After(reachPause):
		case <-late:
			return err
		case <-ctx.Done():
			return err
		}
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// reconcile compares what a keeper has with what is known here.
func (s *Pods) reconcile(ctx context.Context, name string, k Keeper, all []keeper.ContainerState) {
	has := make(map[string]bool, len(all))
	for _, ks := range all {
		has[ks.ID] = true
		s.mu.RLock()
		c, p := s.containers[ks.ID], s.pods[ks.ID]
		s.mu.RUnlock()
		switch {
		case c != nil:
			s.refresh(c, ks)
		case p != nil:
			if ks.Exit != nil {
				s.onExit(ks.ID, *ks.Exit)
			}
		default:
			s.log.Warn("container of nobody is removed", "container", ks.ID, "keeper", name)
			if err := k.Delete(ctx, ks.ID); err != nil {
				s.log.Error("remove container of nobody", "container", ks.ID, "err", err)
			} else {
				s.swept.Add(1)
			}
		}
	}
	s.endMissing(ctx, name, k, has)
}

// endMissing ends the containers that their keeper does not have. The list at
// hand may be older than a container: only one that is in no later list either
// is missing.
func (s *Pods) endMissing(ctx context.Context, name string, k Keeper, has map[string]bool) {
	var doubtful []*Container
	for _, p := range s.snapshotPods() {
		if p.Keeper != name {
			continue
		}
		for _, c := range s.containersOf(p.ID) {
			if !has[c.ID] && c.visible() && c.Status().State != Exited {
				doubtful = append(doubtful, c)
			}
		}
	}
	if len(doubtful) == 0 {
		return
	}
	all, err := k.List(ctx)
	if err != nil {
		return // the connection broke: the next one compares again
	}
	for _, c := range doubtful {
		if !slices.ContainsFunc(all, func(ks keeper.ContainerState) bool { return ks.ID == c.ID }) {
			s.missing(c)
		}
	}
}

// refresh brings a container up to date with what its keeper says.
func (s *Pods) refresh(c *Container, ks keeper.ContainerState) {
	c.mu.Lock()
	// A daemon that had it started may have died before it could note that; it may
	// have ended since.
	news := c.state != Creating && c.startedAt.IsZero() && !ks.StartedAt.IsZero()
	if news {
		c.startedAt = ks.StartedAt
		if c.state == Created {
			c.state = Running
		}
	}
	c.lost = ks.State == keeper.Unreadable
	c.mu.Unlock()
	if news {
		if err := s.recordStart(c.ID, ks.StartedAt); err != nil && !errors.Is(err, os.ErrNotExist) { // being removed
			s.log.Error("note that a container was started", "container", c.ID, "err", err)
		}
	}
	if ks.Exit != nil {
		c.end(*ks.Exit)
	}
	s.announceContainer(c)
}

// missing ends a container that its keeper does not know.
func (s *Pods) missing(c *Container) { s.ended(c, s.recordedExit(c)) }

// recordedExit is how a container ended that its keeper does not know any more:
// either the exit record says it, or nobody can.
func (s *Pods) recordedExit(c *Container) keeper.Exit {
	exit, err := keeper.ReadExit(s.paths.exit(c.ID))
	if err != nil {
		return keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: time.Now(), Message: "its keeper lost it: " + err.Error()}
	}
	return exit
}

// sweep removes what belongs to nobody.
func (s *Pods) sweep(ctx context.Context) {
	s.emptyTrash()
	s.sweepKeepers(ctx)
	if err := s.cfg.Network.Sweep(ctx, s.knowsPod); err != nil {
		s.log.Error("sweep network", "err", err)
	}
	s.sweepDir(s.paths.containers(), s.knowsContainer, s.undoFiles)
	s.sweepDir(filepath.Join(s.paths.state, "containers"), s.knowsContainer, s.undoFiles)
	s.sweepDir(filepath.Join(s.paths.state, "pods"), s.knowsPod, func(id string) error {
		if len(id) < 16 {
			return s.removeStateDir(s.paths.podState(id))
		}
		return errors.Join(host.Unpin(s.paths.netNS(id)), s.removeStateDir(s.paths.podState(id)), s.removeCgroupsOf(ctx, id))
	})
}

// keeperLeaves is how long a keeper may take that is let go.
const keeperLeaves = 10 * time.Second

// sweepKeepersSoon looks after keepers that were let go, until they are gone: one
// that was killed while it cleaned up after itself has nobody else who would.
func (s *Pods) sweepKeepersSoon() {
	if !s.sweeping.CompareAndSwap(false, true) {
		return
	}
	s.work.Go(func() {
		select {
		case <-time.After(keeperLeaves):
			s.sweeping.Store(false)
			ctx, cancel := context.WithTimeout(context.Background(), maxUndo)
			defer cancel()
			s.sweepKeepers(ctx)
		case <-s.keepers.closed:
		}
	})
}

// sweepKeepers removes what is left of keepers without pods. One that still has
// containers is connected to, which removes them, and let go.
func (s *Pods) sweepKeepers(ctx context.Context) {
	left, err := s.cfg.SweepKeepers(func(name string) bool {
		return name == s.cfg.KeeperFor("") || slices.ContainsFunc(s.snapshotPods(), func(p *Pod) bool { return p.Keeper == name })
	})
	if err != nil {
		s.log.Error("sweep keepers", "err", err)
	}
	for _, name := range left.Occupied {
		k, err := s.keepers.get(ctx, name, "")
		if err == nil {
			var all []keeper.ContainerState
			if all, err = k.List(ctx); err == nil {
				s.reconcile(ctx, name, k, all)
			}
		}
		if err != nil {
			s.log.Error("keeper of nobody stays", "keeper", name, "err", err)
		}
		s.keepers.leave(name, "")
		left.Leaving = left.Leaving || err == nil
	}
	if left.Leaving {
		s.sweepKeepersSoon()
	}
}

func (s *Pods) sweepDir(dir string, known func(id string) bool, remove func(id string) error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		s.log.Error("sweep", "err", err)
		return
	}
	for _, e := range entries {
		if known(e.Name()) {
			continue
		}
		s.log.Warn("leftover is removed", "path", filepath.Join(dir, e.Name()))
		if err := remove(e.Name()); err != nil {
			s.log.Error("leftover stays", "path", filepath.Join(dir, e.Name()), "err", err)
			continue
		}
		s.swept.Add(1)
	}
}

// removeStateDir removes a directory below STATE with all that is mounted in it.
func (s *Pods) removeStateDir(dir string) error {
	if err := host.UnmountUnder(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// bootTime is when the machine was started, as far as it tells.
func bootTime() time.Time {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Now()
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "btime "); ok {
			if sec, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64); err == nil {
				return time.Unix(sec, 0)
			}
		}
	}
	return time.Now()
}

// NetworkReady is nil, or why pods cannot get a network.
func (s *Pods) NetworkReady() error { return s.cfg.Network.Ready() }
