package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/spec"
)

// RunPodSandbox makes a pod; asked twice for the same one, it answers with it.
func (s *runtimeService) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	if err := spec.ValidatePod(r.GetConfig()); err != nil {
		return nil, err
	}
	id, err := s.cfg.Pods.Run(ctx, r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox ends a pod's containers and takes it off the network.
func (s *runtimeService) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, s.cfg.Pods.Stop(ctx, r.GetPodSandboxId())
}

// RemovePodSandbox removes a pod with all its containers, by force.
func (s *runtimeService) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	return &runtimeapi.RemovePodSandboxResponse{}, s.cfg.Pods.Remove(ctx, r.GetPodSandboxId())
}

// PodSandboxStatus describes one pod with its containers.
func (s *runtimeService) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	snapshot, err := s.cfg.Pods.Snapshot(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	st := snapshot.Pod
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status: podStatus(st), ContainersStatuses: containerStatuses(snapshot), Timestamp: snapshot.At.UnixNano(),
	}
	if r.GetVerbose() {
		info, err := json.Marshal(map[string]any{
			"netns": st.NetNS, "keeper": st.KeeperName, "handler": st.RuntimeName, "problem": st.Problem, "config": st.Config,
			"overhead": st.Overhead, "resources": st.Resources,
		})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// UpdatePodSandboxResources notes what the kubelet has resized the pod to.
func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, s.cfg.Pods.UpdatePod(ctx, r.GetPodSandboxId(), r.GetOverhead(), r.GetResources())
}

// ListPodSandbox lists the pods that pass the filter.
func (s *runtimeService) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.pods(r.GetFilter())}, nil
}

// StreamPodSandboxes is ListPodSandbox for a node with more pods than one message
// can tell of.
func (s *runtimeService) StreamPodSandboxes(r *runtimeapi.StreamPodSandboxesRequest, stream grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxesResponse]) error {
	return sendBatches(s.pods(r.GetFilter()), func(items []*runtimeapi.PodSandbox) error {
		return stream.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: items})
	})
}

func (s *runtimeService) pods(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	pods := s.cfg.Pods.List()
	items := make([]*runtimeapi.PodSandbox, 0, len(pods))
	for _, st := range pods {
		if p := podItem(st); podPasses(p, f) {
			items = append(items, p)
		}
	}
	return items
}

func podPasses(p *runtimeapi.PodSandbox, f *runtimeapi.PodSandboxFilter) bool {
	return strings.HasPrefix(p.Id, f.GetId()) &&
		(f.GetState() == nil || f.GetState().GetState() == p.State) &&
		selects(f.GetLabelSelector(), p.Labels)
}

// selects reports whether labels have all that a selector asks for.
func selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}

func podState(st pod.Status) runtimeapi.PodSandboxState {
	if st.Ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func podItem(st pod.Status) *runtimeapi.PodSandbox {
	return &runtimeapi.PodSandbox{
		Id: st.ID, Metadata: st.Config.GetMetadata(), State: podState(st), CreatedAt: st.CreatedAt.UnixNano(),
		Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(), RuntimeHandler: st.Handler,
	}
}

func podStatus(st pod.Status) *runtimeapi.PodSandboxStatus {
	p := &runtimeapi.PodSandboxStatus{
		Id: st.ID, Metadata: st.Config.GetMetadata(), State: podState(st), CreatedAt: st.CreatedAt.UnixNano(),
		Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(), RuntimeHandler: st.Handler,
		Network: &runtimeapi.PodSandboxNetworkStatus{},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: st.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
	}
	if p.Linux.Namespaces.Options == nil {
		p.Linux.Namespaces.Options = &runtimeapi.NamespaceOption{}
	}
	for i, ip := range st.IPs {
		if i == 0 {
			p.Network.Ip = ip
			continue
		}
		p.Network.AdditionalIps = append(p.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return p
}

// podConfigOf returns the configuration of the pod that a container request names.
func (s *runtimeService) podConfigOf(id string) (*runtimeapi.PodSandboxConfig, error) {
	if id == "" {
		return nil, fmt.Errorf("pod_sandbox_id: it is empty; create the pod with RunPodSandbox first: %w", errdefs.ErrInvalidArgument)
	}
	st, err := s.cfg.Pods.Get(id)
	if err != nil {
		return nil, err
	}
	return st.Config.PodSandboxConfig, nil
}
