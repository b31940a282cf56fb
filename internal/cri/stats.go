package cri

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
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

// StreamContainerStats is ListContainerStats in several messages.
func (s *runtimeService) StreamContainerStats(r *runtimeapi.StreamContainerStatsRequest, stream runtimeapi.RuntimeService_StreamContainerStatsServer) error {
	return sendBatches(s.containerStats(r.GetFilter()), func(batch []*runtimeapi.ContainerStats) error {
		return stream.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: batch})
	})
}

// PodSandboxStats tells what one pod uses, and each of its containers.
func (s *runtimeService) PodSandboxStats(_ context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	st, err := s.cfg.Pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	for _, p := range s.measuredPods(&runtimeapi.PodSandboxStatsFilter{Id: st.ID}) {
		return &runtimeapi.PodSandboxStatsResponse{Stats: s.cfg.Stats.Pod(p)}, nil
	}
	return nil, fmt.Errorf("pod %q: it was removed meanwhile: %w", st.ID, errdefs.ErrNotFound)
}

// ListPodSandboxStats tells what the pods that pass the filter use.
func (s *runtimeService) ListPodSandboxStats(_ context.Context, r *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: s.podStats(r.GetFilter())}, nil
}

// StreamPodSandboxStats is ListPodSandboxStats in several messages.
func (s *runtimeService) StreamPodSandboxStats(r *runtimeapi.StreamPodSandboxStatsRequest, stream runtimeapi.RuntimeService_StreamPodSandboxStatsServer) error {
	return sendBatches(s.podStats(r.GetFilter()), func(batch []*runtimeapi.PodSandboxStats) error {
		return stream.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: batch})
	})
}

// ListMetricDescriptors describes the metrics that pods have.
func (s *runtimeService) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return &runtimeapi.ListMetricDescriptorsResponse{Descriptors: stats.Descriptors()}, nil
}

// ListPodSandboxMetrics returns the metrics of all pods.
func (s *runtimeService) ListPodSandboxMetrics(context.Context, *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: s.podMetrics()}, nil
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in several messages.
func (s *runtimeService) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest, stream runtimeapi.RuntimeService_StreamPodSandboxMetricsServer) error {
	return sendBatches(s.podMetrics(), func(batch []*runtimeapi.PodSandboxMetrics) error {
		return stream.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: batch})
	})
}

func (s *runtimeService) podStats(f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats {
	return stats.Map(s.measuredPods(f), s.cfg.Stats.Pod)
}

func (s *runtimeService) podMetrics() []*runtimeapi.PodSandboxMetrics {
	return stats.Map(s.measuredPods(nil), s.cfg.Stats.Metrics)
}

// measuredPods says where the figures of the pods are that pass the filter, and
// of their containers.
func (s *runtimeService) measuredPods(f *runtimeapi.PodSandboxStatsFilter) []stats.Pod {
	pods, containers := s.inventory()
	of := make(map[string][]stats.Container, len(pods))
	for _, st := range containers {
		if p, ok := pods[st.PodID]; ok && podMeasured(p, f) {
			of[p.ID] = append(of[p.ID], s.measured(p, st))
		}
	}
	var list []stats.Pod
	for _, p := range pods {
		if !podMeasured(p, f) {
			continue
		}
		list = append(list, stats.Pod{
			ID: p.ID, Alive: p.Ready, CreatedAt: p.CreatedAt, Cgroup: s.cfg.Pods.Cgroup(p), NetNS: p.NetNS, Containers: of[p.ID],
			Attributes: &runtimeapi.PodSandboxAttributes{
				Id: p.ID, Metadata: p.Config.GetMetadata(), Labels: p.Config.GetLabels(), Annotations: p.Config.GetAnnotations(),
			},
		})
	}
	return list
}

func podMeasured(p pod.Status, f *runtimeapi.PodSandboxStatsFilter) bool {
	return strings.HasPrefix(p.ID, f.GetId()) && selects(f.GetLabelSelector(), p.Config.GetLabels())
}

func (s *runtimeService) containerStats(f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	pods, containers := s.inventory()
	var list []stats.Container
	for _, st := range containers {
		p, ok := pods[st.PodID]
		if ok && containerMeasured(st, f) {
			list = append(list, s.measured(p, st))
		}
	}
	return stats.Map(list, s.cfg.Stats.Container)
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
