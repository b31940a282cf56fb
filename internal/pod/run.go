package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// Run makes a pod that is ready for containers and returns its id. The config
// has passed spec.ValidatePod. A pod with the same namespace, name, uid and
// attempt is the answer if it is there already or being made; if its
// configuration is another, or it was stopped, the error is ErrAlreadyExists.
func (s *Pods) Run(ctx context.Context, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	runtime, err := s.resolveHandler(handler)
	if err != nil {
		return "", err
	}
	if spec.NamespacesOf(config).User {
		if err := s.admitUserNamespace(ctx, runtime); err != nil {
			return "", err
		}
	}
	id, err := s.ops.Do(ctx, runKey(config), func(ctx context.Context) (string, error) {
		if p := s.podLike(config); p != nil {
			return rerun(p)
		}
		s.readyAttach()
		return s.run(ctx, config, handler, runtime)
	})
	if err != nil {
		return "", err
	}
	// Also of one that another caller was making.
	if p, err := s.pod(id); err == nil {
		if err := p.isLike(config, handler); err != nil {
			return "", err
		}
	}
	return id, nil
}

// readyAttach has the kernel get ready, in the background, to move the processes of
// containers that are about to be made; see host.ReadyAttach. The keeper does so
// too, when it is asked to make them, which is late. In cgroup v2 they are born
// where they belong.
func (s *Pods) readyAttach() {
	if host.CgroupMode() == host.CgroupV2 || !s.readying.CompareAndSwap(false, true) {
		return
	}
	s.work.Go(func() {
		defer s.readying.Store(false)
		host.ReadyAttach()()
	})
}

func (p *Pod) isLike(config *runtimeapi.PodSandboxConfig, handler string) error {
	if st := p.Status(); !proto.Equal(st.Config.PodSandboxConfig, config) || st.Handler != handler {
		return fmt.Errorf("%v exists with another configuration; remove it or use a new attempt: %w", p, errdefs.ErrAlreadyExists)
	}
	return nil
}

// runKey is what calls that make the same pod have in common.
func runKey(config *runtimeapi.PodSandboxConfig) string {
	m := config.GetMetadata()
	return strings.Join([]string{"run", m.GetNamespace(), m.GetName(), m.GetUid(), fmt.Sprint(m.GetAttempt())}, "\x00")
}

func (s *Pods) resolveHandler(name string) (string, error) {
	if name == "" {
		name = s.cfg.DefaultHandler
	}
	if _, ok := s.cfg.Handlers[name]; !ok {
		known := make([]string, 0, len(s.cfg.Handlers))
		for h := range s.cfg.Handlers {
			known = append(known, h)
		}
		slices.Sort(known)
		return "", fmt.Errorf("runtime_handler %q: there is no such handler; this node has %s, more are added in [handlers.NAME] of the configuration: %w",
			name, strings.Join(known, ", "), errdefs.ErrInvalidArgument)
	}
	return name, nil
}

func (s *Pods) podLike(config *runtimeapi.PodSandboxConfig) *Pod {
	m := config.GetMetadata()
	for _, p := range s.snapshotPods() {
		// Names first: there may be thousands of pods.
		if p.Config.GetMetadata().GetName() == m.GetName() && proto.Equal(p.Config.GetMetadata(), m) {
			return p
		}
	}
	return nil
}

// rerun answers a Run for a pod that exists.
func rerun(p *Pod) (string, error) {
	switch {
	case !p.visible():
		return "", fmt.Errorf("%v was half made when the daemon died and is being removed; try again: %w", p, errdefs.ErrUnavailable)
	case !p.Status().Ready:
		return "", fmt.Errorf("%v exists and is not ready; remove it or use a new attempt: %w", p, errdefs.ErrAlreadyExists)
	}
	return p.ID, nil
}

func (s *Pods) run(ctx context.Context, config *runtimeapi.PodSandboxConfig, handler, runtime string) (_ string, err error) {
	id := newID()
	p := &Pod{
		podRecord: podRecord{
			ID: id, CreatedAt: time.Now(), Handler: handler, Runtime: runtime, Keeper: s.cfg.KeeperFor(id),
			Config: podConfig{config},
		},
		made:     make(chan struct{}),
		overhead: config.GetLinux().GetOverhead(), resources: config.GetLinux().GetResources(),
	}
	defer close(p.made)
	p.Cgroup, p.Unit = s.placeCgroup(id, config.GetLinux().GetCgroupParent())
	if spec.NamespacesOf(config).Network {
		p.NetNS = s.paths.netNS(id)
	}
	if p.Labels, err = s.cfg.SELinux.Pod(id, selinuxOptions(config.GetLinux().GetSecurityContext().GetSelinuxOptions())); err != nil {
		return "", fmt.Errorf("run %v: %s: %w", p, spec.SELinuxField, err)
	}
	if err := s.recordPod(p); err != nil {
		s.cfg.SELinux.Release(id)
		return "", err
	}
	s.addPod(p)
	if err := s.setUp(ctx, p); err != nil {
		err = fmt.Errorf("run %v: %w", p, err)
		undo, cancel := undoContext(ctx)
		defer cancel()
		if uerr := s.undoPod(undo, p); uerr != nil {
			// It stays, visible and not ready, until somebody removes it.
			s.fail(p, fmt.Sprintf("%v; and undoing it: %v", err, uerr))
			return "", fmt.Errorf("%w (undo: %w)", err, uerr)
		}
		return "", err
	}
	s.announcePod(p)
	return id, nil
}

func (s *Pods) recordPod(p *Pod) error {
	dir := s.paths.pod(p.ID)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	fault.Point("pod.directory-made")
	if err := state.Write(filepath.Join(dir, "config"), podKind, p.podRecord, state.Volatile); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	return nil
}

// setUp gives the pod all that its containers share.
func (s *Pods) setUp(ctx context.Context, p *Pod) error {
	sysctls, err := spec.Sysctls(p.Config.PodSandboxConfig)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(s.paths.podState(p.ID), "ns"), 0o711); err != nil {
		return err
	}
	var unit errgroup.Group
	unit.Go(func() error { return s.makeUnit(ctx, p) })
	defer unit.Wait() //nolint:errcheck // whoever undoes this must not be overtaken by it
	ns := s.namespaces(p)
	ns.Hostname, ns.Sysctls = hostname(p.Config.PodSandboxConfig), sysctls
	if err := ns.Create(); err != nil {
		return err
	}
	fault.Point("pod.namespaces-made")
	result, err := s.attach(ctx, p)
	if err != nil {
		return err
	}
	fault.Point("pod.attached")
	ips := make([]string, 0, len(result.IPs))
	for _, ip := range result.IPs {
		ips = append(ips, ip.String())
	}
	if err := s.writeFiles(p, ips, result.DNS); err != nil {
		return err
	}
	fault.Point("pod.files-written")
	if err := s.mountShm(p); err != nil {
		return err
	}
	fault.Point("pod.shm-mounted")
	if err := unit.Wait(); err != nil {
		return err
	}
	if spec.NamespacesOf(p.Config.PodSandboxConfig).PID {
		if err := s.startInit(ctx, p); err != nil {
			return err
		}
	}
	if err := s.tellRun(ctx, p, ips); err != nil {
		return err
	}
	if err := state.Write(filepath.Join(s.paths.pod(p.ID), "ready"), readyKind, readyRecord{host.BootID(), ips}, state.Volatile); err != nil {
		return err
	}
	p.mu.Lock()
	p.phase, p.ips = ready, ips
	p.mu.Unlock()
	return nil
}

// fail makes the pod not ready for a reason that its status tells.
func (s *Pods) fail(p *Pod, problem string) {
	p.mu.Lock()
	p.phase, p.problem = max(p.phase, stopped), problem
	p.mu.Unlock()
	s.announcePod(p)
}

// namespaces returns the pod's own namespaces and where they are pinned.
func (s *Pods) namespaces(p *Pod) host.Namespaces {
	has := spec.NamespacesOf(p.Config.PodSandboxConfig)
	n := host.Namespaces{Net: p.NetNS}
	if has.IPC {
		n.IPC = s.pinned(p.ID, "ipc")
	}
	if has.UTS {
		n.UTS = s.pinned(p.ID, "uts")
	}
	if has.User {
		n.User, n.Holder = s.pinned(p.ID, "user"), s.cfg.Init
		n.UIDs, n.GIDs = spec.UserIDs(p.Config.PodSandboxConfig)
	}
	return n
}

func (s *Pods) pinned(podID, kind string) string {
	return filepath.Join(s.paths.podState(podID), "ns", kind)
}

func (s *Pods) attach(ctx context.Context, p *Pod) (network.Result, error) {
	if p.NetNS == "" {
		return network.Result{}, nil
	}
	m := p.Config.GetMetadata()
	mappings, err := portMappings(p.Config.GetPortMappings())
	if err != nil {
		return network.Result{}, err
	}
	return s.cfg.Network.Attach(ctx, network.Pod{
		ID: p.ID, Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), NetNS: p.NetNS,
		Hostname: p.Config.GetHostname(), PortMappings: mappings,
		Labels: p.Config.GetLabels(), Annotations: p.Config.GetAnnotations(), CgroupParent: p.Config.GetLinux().GetCgroupParent(),
	})
}

// Stop ends the pod's containers and gives back what the pod holds of the
// network. It may be called any number of times; an unknown pod is stopped.
func (s *Pods) Stop(ctx context.Context, id string) error {
	p, err := s.pod(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.once(ctx, "stop", p, p.ID, func(ctx context.Context) error { return s.stopPod(ctx, p) })
}

func (s *Pods) stopPod(ctx context.Context, p *Pod) error {
	if p.isReleased() {
		return nil
	}
	if err := s.retire(p); err != nil {
		return err
	}
	if err := s.killContainers(ctx, p); err != nil {
		return err
	}
	fault.Point("pod.containers-killed")
	s.tellPodStopped(ctx, p)
	return s.release(ctx, p)
}

// retire makes the pod not ready, for good: recorded first, so that a restart
// in the middle does not make it ready again. The record changes its name, which
// works on a full disk too.
func (s *Pods) retire(p *Pod) error {
	dir := s.paths.pod(p.ID)
	if err := os.Rename(filepath.Join(dir, "ready"), filepath.Join(dir, "stopped")); ignoreAbsent(err) != nil {
		return err
	}
	fault.Point("pod.retired")
	p.mu.Lock()
	p.phase = max(p.phase, stopped)
	p.mu.Unlock()
	s.announcePod(p)
	return nil
}

func (p *Pod) isReleased() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.released
}

// killContainers ends all containers of the pod at the same time. Creations
// under way are told to give up; they are not waited for, since they undo
// themselves and may be stuck on a volume.
func (s *Pods) killContainers(ctx context.Context, p *Pod) error {
	var wg sync.WaitGroup
	all := s.containersOf(p.ID)
	errs := make([]error, len(all))
	for i, c := range all {
		if !c.visible() {
			c.giveUp()
			continue
		}
		wg.Go(func() {
			if errs[i] = s.kill(ctx, p, c); errs[i] == nil {
				s.tellContainerStopped(ctx, p, c)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// release gives back what the pod holds: its init, network, namespaces, mounts.
func (s *Pods) release(ctx context.Context, p *Pod) error {
	var errs []error
	if spec.NamespacesOf(p.Config.PodSandboxConfig).PID {
		errs = append(errs, s.stopInit(ctx, p))
		fault.Point("pod.init-stopped")
	}
	if p.NetNS != "" {
		errs = append(errs, s.cfg.Network.Detach(ctx, p.ID))
		fault.Point("pod.detached")
	}
	if p.Unit != "" {
		// It goes with its slice, which the client may end from now on.
		errs = append(errs, s.removeCgroup(ctx, p))
	}
	errs = append(errs, s.namespaces(p).Remove(), host.UnmountUnder(s.paths.podState(p.ID)))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.released = true
	return nil
}

// Remove ends the pod and everything in it, and forgets it. An unknown pod is
// removed already.
func (s *Pods) Remove(ctx context.Context, id string) error {
	p, err := s.pod(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.once(ctx, "remove", p, p.ID, func(ctx context.Context) error { return s.removePod(ctx, p) })
}

func (s *Pods) removePod(ctx context.Context, p *Pod) error {
	// A Stop under way is joined, not raced.
	if err := s.Stop(ctx, p.ID); err != nil {
		return err
	}
	p.mu.Lock()
	p.phase = removing
	p.mu.Unlock()
	var wg sync.WaitGroup
	all := s.containersOf(p.ID)
	errs := make([]error, len(all))
	for i, c := range all {
		wg.Go(func() {
			if errs[i] = c.waitCreated(ctx); errs[i] == nil {
				errs[i] = s.removeContainer(ctx, c)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.undoPod(ctx, p)
}

// undoPod removes all there is of a pod without containers, made or half made.
func (s *Pods) undoPod(ctx context.Context, p *Pod) error {
	s.tellPodStopped(ctx, p)
	if err := s.release(ctx, p); err != nil {
		return err
	}
	fault.Point("pod.released")
	if err := os.RemoveAll(s.paths.podState(p.ID)); err != nil {
		return err
	}
	fault.Point("pod.files-removed")
	if err := s.removeCgroup(ctx, p); err != nil {
		return err
	}
	s.tellPodRemoved(ctx, p)
	if err := s.discard(s.paths.pod(p.ID)); err != nil {
		return err
	}
	fault.Point("pod.discarded")
	s.dropPod(p)
	s.announcePod(p)
	if s.keepers.leave(p.Keeper, p.ID) {
		s.sweepKeepersSoon()
	}
	return nil
}

// mountShm gives the pod a /dev/shm of its own if it has its own IPC namespace.
func (s *Pods) mountShm(p *Pod) error {
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).IPC {
		return nil
	}
	dir := s.shm(p)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	uid, gid := spec.RootOf(p.Config.PodSandboxConfig)
	options := fmt.Sprintf("mode=1777,size=65536k,uid=%d,gid=%d", uid, gid)
	if p.Labels.Mount != "" {
		options += `,context="` + p.Labels.Mount + `"`
	}
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("mount /dev/shm of the pod: %w", err)
	}
	return nil
}

func (s *Pods) shm(p *Pod) string {
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).IPC {
		return "/dev/shm"
	}
	return filepath.Join(s.paths.podState(p.ID), "shm")
}
