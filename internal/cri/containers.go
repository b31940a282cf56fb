package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/spec"
)

// CreateContainer makes a container, without running it yet.
func (s *runtimeService) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	config, err := s.podConfigOf(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := spec.ValidateContainer(config, r.GetConfig()); err != nil {
		return nil, err
	}
	id, err := s.cfg.Pods.CreateContainer(ctx, r.GetPodSandboxId(), r.GetConfig())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// StartContainer runs a created container.
func (s *runtimeService) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	return &runtimeapi.StartContainerResponse{}, s.cfg.Pods.StartContainer(ctx, r.GetContainerId())
}

// StopContainer stops a container, after the grace period by force.
func (s *runtimeService) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	grace := time.Duration(r.GetTimeout()) * time.Second
	return &runtimeapi.StopContainerResponse{}, s.cfg.Pods.StopContainer(ctx, r.GetContainerId(), grace)
}

// RemoveContainer removes a container, by force if it runs.
func (s *runtimeService) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	return &runtimeapi.RemoveContainerResponse{}, s.cfg.Pods.RemoveContainer(ctx, r.GetContainerId())
}

// UpdateContainerResources changes a container's limits, all or none.
func (s *runtimeService) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	return &runtimeapi.UpdateContainerResourcesResponse{}, s.cfg.Pods.UpdateContainer(ctx, r.GetContainerId(), r.GetLinux())
}

// ReopenContainerLog makes a container write to the file that is at its log path
// now.
func (s *runtimeService) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	return &runtimeapi.ReopenContainerLogResponse{}, s.cfg.Pods.ReopenLog(ctx, r.GetContainerId())
}

// maxOutput bounds each stream of an ExecSync, in bytes. Both together, with
// what the message needs besides, must pass the client's limit.
const maxOutput = maxMessage - 4096

// ExecSync runs a command in a container and returns its output. Of what is too
// much for an answer, the end is left out.
func (s *runtimeService) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if len(r.GetCmd()) == 0 {
		return nil, fmt.Errorf("cmd: it is empty; give the program and its arguments: %w", errdefs.ErrInvalidArgument)
	}
	timeout := time.Duration(max(0, r.GetTimeout())) * time.Second
	stdout, stderr, res, err := s.cfg.Pods.ExecOutput(ctx, keeper.ExecRequest{ID: r.GetContainerId(), Args: r.GetCmd(), Timeout: timeout}, maxOutput)
	if err != nil {
		return nil, err
	}
	if res.TimedOut {
		return nil, fmt.Errorf("exec %q: timeout %v exceeded: %w", strings.Join(r.GetCmd(), " "), timeout, context.DeadlineExceeded)
	}
	stdout, stderr = fit(stdout, stderr, maxOutput)
	return &runtimeapi.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: res.ExitCode}, nil
}

// fit shortens a and b to limit bytes in all; the shorter one keeps what it can.
func fit(a, b []byte, limit int) ([]byte, []byte) {
	if len(a)+len(b) <= limit {
		return a, b
	}
	keepA := max(limit/2, limit-len(b))
	a = a[:min(len(a), keepA)]
	return a, b[:min(len(b), limit-len(a))]
}

// ContainerStatus describes one container.
func (s *runtimeService) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	st, err := s.cfg.Pods.GetContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	p, err := s.cfg.Pods.Get(st.PodID)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: containerStatus(p, st)}
	if r.GetVerbose() {
		oci, err := s.cfg.Pods.RuntimeSpec(st.ID)
		if err != nil {
			return nil, err
		}
		info, err := json.Marshal(map[string]any{
			"sandboxID": st.PodID, "pid": st.Process.Pid, "config": st.Config, "exit": st.Exit, "runtimeSpec": oci,
		})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// ListContainers lists the containers that pass the filter.
func (s *runtimeService) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.containers(r.GetFilter())}, nil
}

// StreamContainers is ListContainers for a node with more containers than one
// message can tell of.
func (s *runtimeService) StreamContainers(r *runtimeapi.StreamContainersRequest, stream grpc.ServerStreamingServer[runtimeapi.StreamContainersResponse]) error {
	return sendBatches(s.containers(r.GetFilter()), func(items []*runtimeapi.Container) error {
		return stream.Send(&runtimeapi.StreamContainersResponse{Containers: items})
	})
}

func (s *runtimeService) containers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	containers := s.cfg.Pods.ListContainers()
	items := make([]*runtimeapi.Container, 0, len(containers))
	for _, st := range containers {
		if c := containerItem(st); containerPasses(c, f) {
			items = append(items, c)
		}
	}
	return items
}

func containerPasses(c *runtimeapi.Container, f *runtimeapi.ContainerFilter) bool {
	return strings.HasPrefix(c.Id, f.GetId()) &&
		strings.HasPrefix(c.PodSandboxId, f.GetPodSandboxId()) &&
		(f.GetState() == nil || f.GetState().GetState() == c.State) &&
		selects(f.GetLabelSelector(), c.Labels)
}

var containerStates = map[pod.State]runtimeapi.ContainerState{
	pod.Created: runtimeapi.ContainerState_CONTAINER_CREATED,
	pod.Running: runtimeapi.ContainerState_CONTAINER_RUNNING,
	pod.Exited:  runtimeapi.ContainerState_CONTAINER_EXITED,
	pod.Unknown: runtimeapi.ContainerState_CONTAINER_UNKNOWN,
}

func containerItem(st pod.ContainerStatus) *runtimeapi.Container {
	return &runtimeapi.Container{
		Id: st.ID, PodSandboxId: st.PodID, Metadata: st.Config.GetMetadata(),
		Image: imageSpec(st), ImageRef: st.ImageID, ImageId: st.ImageID,
		State: containerStates[st.State], CreatedAt: st.CreatedAt.UnixNano(),
		Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(),
	}
}

func containerStatus(p pod.Status, st pod.ContainerStatus) *runtimeapi.ContainerStatus {
	c := &runtimeapi.ContainerStatus{
		Id: st.ID, Metadata: st.Config.GetMetadata(), State: containerStates[st.State],
		CreatedAt: st.CreatedAt.UnixNano(), Image: imageSpec(st), ImageRef: imageRef(st), ImageId: st.ImageID,
		Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(), Mounts: mounts(st),
		StopSignal: spec.SignalOf(st.StopSignal), User: st.User,
	}
	if dir, name := p.Config.GetLogDirectory(), st.Config.GetLogPath(); dir != "" && name != "" {
		c.LogPath = filepath.Join(dir, name)
	}
	if st.Resources != nil {
		c.Resources = &runtimeapi.ContainerResources{Linux: st.Resources}
	}
	if !st.StartedAt.IsZero() {
		c.StartedAt = st.StartedAt.UnixNano()
	}
	if st.State == pod.Exited {
		c.FinishedAt, c.ExitCode = st.Exit.FinishedAt.UnixNano(), st.Exit.Code
		c.Reason, c.Message = exitReason(st.Exit), st.Exit.Message
	}
	if st.Problem != "" {
		c.Reason, c.Message = "Unreadable", strings.TrimSpace(st.Problem+"\n"+c.Message)
	}
	return c
}

// mounts are those the client asked for; of image volumes it learns what they are.
func mounts(st pod.ContainerStatus) []*runtimeapi.Mount {
	all := st.Config.GetMounts()
	if len(st.MountImages) == 0 {
		return all
	}
	all = slices.Clone(all)
	for i, image := range st.MountImages {
		all[i] = proto.CloneOf(all[i])
		all[i].Image.ImageRef = image.ID
	}
	return all
}

// imageSpec names the image as the user did.
func imageSpec(st pod.ContainerStatus) *runtimeapi.ImageSpec {
	given := st.Config.GetImage()
	name := given.GetUserSpecifiedImage()
	if name == "" {
		name = given.GetImage()
	}
	return &runtimeapi.ImageSpec{
		Image: name, UserSpecifiedImage: given.GetUserSpecifiedImage(),
		Annotations: given.GetAnnotations(), RuntimeHandler: given.GetRuntimeHandler(),
	}
}

func imageRef(st pod.ContainerStatus) string {
	if st.ImageDigest != "" {
		return st.ImageDigest
	}
	return st.ImageID
}

// exitReason says in one word how a container ended; the kubelet knows OOMKilled,
// people know the others.
func exitReason(e keeper.Exit) string {
	switch {
	case e.OOMKilled:
		return "OOMKilled"
	case e.Code == 0:
		return "Completed"
	case e.Code == keeper.UnknownExitCode && e.Message != "":
		return "Unknown"
	}
	return "Error"
}
