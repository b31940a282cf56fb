package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/nri"
	"sampan.dev/sampan/internal/span"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// Plugins hear of pods and containers and may object to most of it; see
// nri.Plugins for the contract. Its calls may take seconds.
type Plugins interface {
	Hold(ctx context.Context) (release func(), listening bool, err error)

	RunPodSandbox(context.Context, *api.RunPodSandboxRequest) error
	UpdatePodSandbox(context.Context, *api.UpdatePodSandboxRequest) (*api.UpdatePodSandboxResponse, error)
	PostUpdatePodSandbox(context.Context, *api.PostUpdatePodSandboxRequest) error
	StopPodSandbox(context.Context, *api.StopPodSandboxRequest) error
	RemovePodSandbox(context.Context, *api.RemovePodSandboxRequest) error

	CreateContainer(context.Context, *api.CreateContainerRequest) (*api.CreateContainerResponse, error)
	PostCreateContainer(context.Context, *api.PostCreateContainerRequest) error
	StartContainer(context.Context, *api.StartContainerRequest) error
	PostStartContainer(context.Context, *api.PostStartContainerRequest) error
	UpdateContainer(context.Context, *api.UpdateContainerRequest) (*api.UpdateContainerResponse, error)
	PostUpdateContainer(context.Context, *api.PostUpdateContainerRequest) error
	StopContainer(context.Context, *api.StopContainerRequest) (*api.StopContainerResponse, error)
	RemoveContainer(context.Context, *api.RemoveContainerRequest) error
}

// heard is what all plugins have been told of a pod or container. It changes only
// while no plugin can be introduced.
type heard struct{ atomic.Int32 }

const (
	unheard     int32 = iota
	heardOf           // a plugin that is introduced now is told of it
	heardToStop       // not any more
	heardToGo
)

// tell brings what plugins have heard from one stage to another, and lets those
// who listen hear it. It does nothing at any other stage.
func (s *Pods) tell(ctx context.Context, h *heard, from, to int32, request func() error) error {
	if s.cfg.Plugins == nil || h.Load() != from {
		return nil
	}
	release, listening, err := s.cfg.Plugins.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	if h.Load() != from {
		return nil
	}
	// Also if they object: those who were asked first have heard of it.
	defer h.Store(to)
	if !listening {
		return nil
	}
	_, end := span.Start(ctx, "plugins")
	err = nri.Failed(request())
	end(err)
	return err
}

// ask makes a request of the plugins, if there are any, that changes nothing of
// what they have heard of.
func (s *Pods) ask(ctx context.Context, request func() error) error {
	if s.cfg.Plugins == nil {
		return nil
	}
	release, listening, err := s.cfg.Plugins.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	if !listening {
		return nil
	}
	_, end := span.Start(ctx, "plugins")
	err = nri.Failed(request())
	end(err)
	return err
}

// unanswered logs what plugins cannot object to any more.
func (s *Pods) unanswered(what string, object fmt.Stringer, err error) {
	if err != nil {
		s.log.Warn("plugins", "op", what, "object", object.String(), "err", err)
	}
}

func (s *Pods) tellRun(ctx context.Context, p *Pod, ips []string) error {
	return s.tell(ctx, &p.heard, unheard, heardOf, func() error {
		described := s.describePod(p)
		described.Ips = ips
		return s.cfg.Plugins.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: described})
	})
}

func (s *Pods) tellPodStopped(ctx context.Context, p *Pod) {
	s.unanswered("StopPodSandbox", p, s.tell(ctx, &p.heard, heardOf, heardToStop, func() error {
		return s.cfg.Plugins.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: s.describePod(p)})
	}))
}

func (s *Pods) tellPodRemoved(ctx context.Context, p *Pod) {
	s.unanswered("RemovePodSandbox", p, s.tell(ctx, &p.heard, heardToStop, heardToGo, func() error {
		return s.cfg.Plugins.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: s.describePod(p)})
	}))
}

// tellUpdatePod lets plugins object to a resize of the pod.
func (s *Pods) tellUpdatePod(ctx context.Context, p *Pod, overhead, resources *runtimeapi.LinuxContainerResources) error {
	return s.ask(ctx, func() error {
		_, err := s.cfg.Plugins.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{
			Pod: s.describePod(p), OverheadLinuxResources: pluginResources(overhead), LinuxResources: pluginResources(resources),
		})
		return err
	})
}

func (s *Pods) tellPodUpdated(ctx context.Context, p *Pod) {
	s.unanswered("PostUpdatePodSandbox", p, s.ask(ctx, func() error {
		return s.cfg.Plugins.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: s.describePod(p)})
	}))
}

// consult lets plugins change the spec of a container before it is made.
func (s *Pods) consult(ctx context.Context, p *Pod, c *Container, oci *specs.Spec) error {
	var answer *api.CreateContainerResponse
	err := s.tell(ctx, &c.heard, unheard, heardOf, func() (err error) {
		answer, err = s.cfg.Plugins.CreateContainer(ctx, &api.CreateContainerRequest{Pod: s.describePod(p), Container: s.describe(c, oci)})
		return err
	})
	if err != nil {
		return err
	}
	if adjust := answer.GetAdjust(); adjust != nil {
		if err := s.adjust(c, oci, adjust); err != nil {
			return nri.Failed(err)
		}
	}
	s.ApplyUpdates(ctx, answer.GetUpdate())
	s.evict(answer.GetEvict())
	return nil
}

func (s *Pods) adjust(c *Container, oci *specs.Spec, adjust *api.ContainerAdjustment) error {
	cgroup := oci.Linux.CgroupsPath
	if err := nri.Adjust(oci, adjust, nri.Host{
		InjectDevices: func(oci *specs.Spec, names []string) error { return injectNamed(oci, s.cfg.CDIDirs, names) },
		SwapLimit:     s.cfg.Facts.SwapLimit,
	}); err != nil {
		return err
	}
	if err := spec.Check(oci, s.cfg.Facts); err != nil {
		return err
	}
	if oci.Linux.CgroupsPath != cgroup {
		c.cgroupsPath = oci.Linux.CgroupsPath
	}
	if adjust.GetLinux().GetResources() == nil {
		return nil
	}
	// What a later update does not mention stays as the plugins have set it.
	limits, _ := criResources(adjust.GetLinux().GetResources())
	c.mu.Lock()
	c.resources = spec.MergeResources(c.resources, limits)
	merged := c.resources
	c.mu.Unlock()
	return state.Write(filepath.Join(s.paths.container(c.ID), "resources"), resourcesKind, linuxResources{merged}, state.Volatile)
}

func (s *Pods) tellCreated(ctx context.Context, p *Pod, c *Container) {
	s.unanswered("PostCreateContainer", c, s.ask(ctx, func() error {
		return s.cfg.Plugins.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
	}))
}

// tellStart lets plugins object to a container's start.
func (s *Pods) tellStart(ctx context.Context, p *Pod, c *Container) error {
	return s.ask(ctx, func() error {
		return s.cfg.Plugins.StartContainer(ctx, &api.StartContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
	})
}

func (s *Pods) tellStarted(ctx context.Context, p *Pod, c *Container) {
	s.unanswered("PostStartContainer", c, s.ask(ctx, func() error {
		return s.cfg.Plugins.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
	}))
}

// maxStartTold bounds how long the end of a container waits for its start to be
// told first.
const maxStartTold = 10 * time.Second

// startsTelling is called before plugins hear of a start; done after that, however
// it went.
func (c *Container) startsTelling() (done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	told := make(chan struct{})
	c.startTold = told
	return func() { close(told) }
}

func (c *Container) awaitStartTold(ctx context.Context) {
	c.mu.Lock()
	told := c.startTold
	c.mu.Unlock()
	if told == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, maxStartTold)
	defer cancel()
	select {
	case <-told:
	case <-ctx.Done():
	}
}

// tellUpdate lets plugins object to new limits, or change them.
func (s *Pods) tellUpdate(ctx context.Context, c *Container, update *runtimeapi.LinuxContainerResources) (*runtimeapi.LinuxContainerResources, error) {
	p, err := s.pod(c.PodID)
	if err != nil {
		return nil, err
	}
	var answer *api.UpdateContainerResponse
	err = s.ask(ctx, func() (err error) {
		answer, err = s.cfg.Plugins.UpdateContainer(ctx, &api.UpdateContainerRequest{
			Pod: s.describePod(p), Container: s.describe(c, s.specOf(c)), LinuxResources: pluginResources(update),
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	var others []*api.ContainerUpdate
	for _, u := range answer.GetUpdate() {
		if u.GetContainerId() != c.ID {
			others = append(others, u)
			continue
		}
		changed, err := criResources(u.GetLinux().GetResources())
		if err != nil {
			return nil, nri.Failed(err)
		}
		update = spec.MergeResources(update, changed)
	}
	s.ApplyUpdates(ctx, others)
	s.evict(answer.GetEvict())
	return update, nil
}

func (s *Pods) tellUpdated(ctx context.Context, c *Container) {
	s.unanswered("PostUpdateContainer", c, s.ask(ctx, func() error {
		p, err := s.pod(c.PodID)
		if err != nil {
			return err
		}
		return s.cfg.Plugins.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
	}))
}

// tellContainerStopped returns when plugins know that the container has exited,
// whoever told them.
func (s *Pods) tellContainerStopped(ctx context.Context, p *Pod, c *Container) {
	if s.cfg.Plugins == nil {
		return
	}
	err := s.once(ctx, "tell plugins of the end of", c, c.ID, func(ctx context.Context) error {
		c.awaitStartTold(ctx)
		var answer *api.StopContainerResponse
		err := s.tell(ctx, &c.heard, heardOf, heardToStop, func() (err error) {
			answer, err = s.cfg.Plugins.StopContainer(ctx, &api.StopContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
			return err
		})
		s.ApplyUpdates(ctx, answer.GetUpdate())
		return err
	})
	s.unanswered("StopContainer", c, err)
}

func (s *Pods) tellContainerRemoved(ctx context.Context, p *Pod, c *Container) {
	s.tellContainerStopped(ctx, p, c)
	s.unanswered("RemoveContainer", c, s.tell(ctx, &c.heard, heardToStop, heardToGo, func() error {
		return s.cfg.Plugins.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: s.describePod(p), Container: s.describe(c, s.specOf(c))})
	}))
}

// hearsExit lets plugins know of an exit, in the background.
func (s *Pods) hearsExit(c *Container) {
	if s.cfg.Plugins == nil || c.heard.Load() != heardOf {
		return
	}
	p, err := s.pod(c.PodID)
	if err != nil {
		return // it is being undone, which tells
	}
	s.work.Go(func() { s.tellContainerStopped(context.Background(), p, c) })
}

// ApplyUpdates changes containers' limits as plugins want it. It returns the
// updates that failed, without those whose failure the plugin has said to ignore.
func (s *Pods) ApplyUpdates(ctx context.Context, updates []*api.ContainerUpdate) (failed []*api.ContainerUpdate) {
	for _, u := range updates {
		err := s.applyUpdate(ctx, u)
		if err == nil {
			continue
		}
		s.log.Warn("update that a plugin wants", "container", u.GetContainerId(), "err", err)
		if !u.GetIgnoreFailure() {
			failed = append(failed, u)
		}
	}
	return failed
}

func (s *Pods) applyUpdate(ctx context.Context, u *api.ContainerUpdate) error {
	c, err := s.container(u.GetContainerId())
	if err != nil {
		return err
	}
	limits, err := criResources(u.GetLinux().GetResources())
	if err != nil {
		return err
	}
	return s.changeLimits(ctx, c, limits)
}

// evict ends containers that plugins want to be gone. The kubelet sees them exit.
func (s *Pods) evict(list []*api.ContainerEviction) {
	for _, e := range list {
		s.log.Warn("a plugin evicts a container", "container", e.GetContainerId(), "reason", e.GetReason())
		s.work.Go(func() {
			if err := s.StopContainer(context.Background(), e.GetContainerId(), 0); err != nil {
				s.log.Error("eviction", "container", e.GetContainerId(), "err", err)
			}
		})
	}
}

// Known returns the pods and containers that plugins have been told of and that
// have not stopped.
func (s *Pods) Known() ([]*api.PodSandbox, []*api.Container) {
	var pods []*api.PodSandbox
	for _, p := range s.snapshotPods() {
		if p.heard.Load() == heardOf {
			pods = append(pods, s.describePod(p))
		}
	}
	var containers []*api.Container
	for _, c := range s.loadedContainers() {
		if c.heard.Load() == heardOf {
			containers = append(containers, s.describe(c, s.specOf(c)))
		}
	}
	return pods, containers
}

// describePod says of a pod what plugins may know.
func (s *Pods) describePod(p *Pod) *api.PodSandbox {
	st, m := p.Status(), p.Config.GetMetadata()
	described := &api.PodSandbox{
		Id: p.ID, Name: m.GetName(), Uid: m.GetUid(), Namespace: m.GetNamespace(),
		Labels: p.Config.GetLabels(), Annotations: p.Config.GetAnnotations(), RuntimeHandler: p.Handler, Ips: st.IPs,
		Linux: &api.LinuxPodSandbox{
			CgroupParent: p.Config.GetLinux().GetCgroupParent(),
			PodOverhead:  pluginResources(st.Overhead), PodResources: pluginResources(st.Resources),
		},
	}
	pins := s.namespaces(p)
	for kind, path := range map[string]string{"network": pins.Net, "ipc": pins.IPC, "uts": pins.UTS} {
		if path != "" {
			described.Linux.Namespaces = append(described.Linux.Namespaces, &api.LinuxNamespace{Type: kind, Path: path})
		}
	}
	return described
}

// describe says of a container what plugins may know, with what its spec says, if
// that is at hand.
func (s *Pods) describe(c *Container, oci *specs.Spec) *api.Container {
	st := c.Status()
	described := &api.Container{
		Id: c.ID, PodSandboxId: c.PodID, Name: c.Config.GetMetadata().GetName(),
		Labels: c.Config.GetLabels(), State: pluginState(st.State), Pid: uint32(st.Process.Pid),
		CreatedAt: st.CreatedAt.UnixNano(), StartedAt: nanoseconds(st.StartedAt), FinishedAt: nanoseconds(st.Exit.FinishedAt),
		ExitCode: int32(st.Exit.Code), StatusMessage: st.Exit.Message,
		Image: &api.Image{Name: c.Config.GetImage().GetUserSpecifiedImage(), Digest: digestOf(st.ImageDigest), ConfigDigest: c.ImageID},
	}
	for _, d := range c.Config.GetCDIDevices() {
		described.CDIDevices = append(described.CDIDevices, &api.CDIDevice{Name: d.GetName()})
	}
	nri.Describe(described, oci)
	if described.Linux == nil {
		described.Linux = &api.LinuxContainer{}
	}
	if st.State != Creating {
		described.Linux.Resources = pluginResources(st.Resources)
	}
	if profile := c.Config.GetLinux().GetSecurityContext().GetSeccomp(); profile != nil {
		described.Linux.SeccompProfile = &api.SecurityProfile{
			ProfileType: api.SecurityProfile_ProfileType(profile.GetProfileType()), LocalhostRef: profile.GetLocalhostRef(),
		}
	}
	described.Annotations = withAnnotations(described.Annotations, c.Config.GetAnnotations())
	return described
}

// withAnnotations returns those of the spec and, where it has none of the name, the
// client's.
func withAnnotations(oci, client map[string]string) map[string]string {
	all := make(map[string]string, len(oci)+len(client))
	for _, m := range []map[string]string{client, oci} {
		for k, v := range m {
			all[k] = v
		}
	}
	return all
}

func nanoseconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// digestOf returns the digest of name@digest.
func digestOf(ref string) string {
	_, digest, _ := strings.Cut(ref, "@")
	return digest
}

func pluginState(s State) api.ContainerState {
	switch s {
	case Running:
		return api.ContainerState_CONTAINER_RUNNING
	case Exited, Removing:
		return api.ContainerState_CONTAINER_STOPPED
	}
	return api.ContainerState_CONTAINER_CREATED
}

// specOf reads the spec that the container was made with; nil if it is not there
// (yet).
func (s *Pods) specOf(c *Container) *specs.Spec {
	text, err := os.ReadFile(filepath.Join(s.paths.bundle(c.ID), "config.json"))
	if err != nil {
		return nil
	}
	oci := new(specs.Spec)
	if json.Unmarshal(text, oci) != nil {
		return nil
	}
	return oci
}

// pluginResources converts limits as the client gives them.
func pluginResources(r *runtimeapi.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{
		Cpu:     &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()},
		Memory:  &api.LinuxMemory{},
		Unified: r.GetUnified(),
	}
	// Zero is "not specified" to the client, and a value to plugins.
	if v := r.GetCpuShares(); v != 0 {
		out.Cpu.Shares = api.UInt64(v)
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuPeriod(); v != 0 {
		out.Cpu.Period = api.UInt64(v)
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	return out
}

// criResources converts limits as plugins give them. What cannot be changed later
// is an error; the rest is converted all the same.
func criResources(r *api.LinuxResources) (*runtimeapi.LinuxContainerResources, error) {
	cpu, memory := r.GetCpu(), r.GetMemory()
	out := &runtimeapi.LinuxContainerResources{
		CpuShares: int64(cpu.GetShares().GetValue()), CpuQuota: cpu.GetQuota().GetValue(), CpuPeriod: int64(cpu.GetPeriod().GetValue()),
		CpusetCpus: cpu.GetCpus(), CpusetMems: cpu.GetMems(),
		MemoryLimitInBytes: memory.GetLimit().GetValue(), MemorySwapLimitInBytes: memory.GetSwap().GetValue(),
		Unified: r.GetUnified(),
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	return out, unchangeable(r)
}

// unchangeable names the limits that can only be set when a container is made.
func unchangeable(r *api.LinuxResources) error {
	var names []string
	for name, set := range map[string]bool{
		"pids":           r.GetPids() != nil,
		"blockio_class":  r.GetBlockioClass() != nil,
		"rdt_class":      r.GetRdtClass() != nil,
		"devices":        len(r.GetDevices()) > 0,
		"cpu realtime":   r.GetCpu().GetRealtimePeriod() != nil || r.GetCpu().GetRealtimeRuntime() != nil,
		"memory details": !proto.Equal(r.GetMemory(), memoryLimits(r.GetMemory())),
	} {
		if set {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("%s: only the client's limits can be changed while a container is there: %w", strings.Join(names, ", "), errdefs.ErrNotImplemented)
}

// memoryLimits returns m with nothing but what can be changed.
func memoryLimits(m *api.LinuxMemory) *api.LinuxMemory {
	if m == nil {
		return nil
	}
	return &api.LinuxMemory{Limit: m.GetLimit(), Swap: m.GetSwap()}
}
