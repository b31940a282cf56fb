package cri

import (
	"context"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/stats"
)

// ContainerStats tells what one container uses.
func (s *runtimeService) ContainerStats(_ context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	st, err := s.cfg.Pods.GetContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	p, err := s.cfg.Pods.Get(st.PodID)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStatsResponse{Stats: s.cfg.Stats.Container(s.measured(p, st))}, nil
}

// ListContainerStats tells what the containers that pass the filter use.
func (s *runtimeService) ListContainerStats(_ context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	return &runtimeapi.ListContainerStatsResponse{Stats: s.containerStats(r.GetFilter())}, nil
}

func (s *runtimeService) containerStats(f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	pods, containers := s.inventory()
	var list []*runtimeapi.ContainerStats
	for _, st := range containers {
		p, ok := pods[st.PodID]
		if ok && containerMeasured(st, f) {
			list = append(list, s.cfg.Stats.Container(s.measured(p, st)))
		}
	}
	return list
}

func containerMeasured(st pod.ContainerStatus, f *runtimeapi.ContainerStatsFilter) bool {
	return strings.HasPrefix(st.ID, f.GetId()) &&
		strings.HasPrefix(st.PodID, f.GetPodSandboxId()) &&
		selects(f.GetLabelSelector(), st.Config.GetLabels())
}

// inventory returns what there is, and lets go of figures of what is gone.
func (s *runtimeService) inventory() (map[string]pod.Status, []pod.ContainerStatus) {
	live := make(map[string]bool)
	pods := make(map[string]pod.Status)
	for _, p := range s.cfg.Pods.List() {
		pods[p.ID], live[p.ID] = p, true
	}
	containers := s.cfg.Pods.ListContainers()
	for _, st := range containers {
		live[st.ID] = true
	}
	s.cfg.Stats.Forget(len(live), func(id string) bool { return live[id] })
	return pods, containers
}

// measured says where a container's figures are.
func (s *runtimeService) measured(p pod.Status, st pod.ContainerStatus) stats.Container {
	at := s.cfg.Pods.Places(p, st.ID)
	return stats.Container{
		ID: st.ID, Cgroup: at.Cgroup, Writable: at.Writable, Alive: st.State == pod.Created || st.State == pod.Running,
		StartedAt: st.StartedAt, Pid: st.Process.Pid, Image: imageSpec(st).GetImage(), Resources: st.Resources,
		Attributes: &runtimeapi.ContainerAttributes{
			Id: st.ID, Metadata: st.Config.GetMetadata(), Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(),
		},
	}
}
