package cri

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/spec"
)

// CheckpointContainer writes a checkpoint of a container into an archive. The
// container goes on.
func (s *runtimeService) CheckpointContainer(ctx context.Context, r *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	timeout := time.Duration(max(0, r.GetTimeout())) * time.Second
	return &runtimeapi.CheckpointContainerResponse{}, s.cfg.Pods.CheckpointContainer(ctx, r.GetContainerId(), r.GetLocation(), timeout)
}

// CheckpointPod writes checkpoints of a pod's containers, all of one moment, into a
// directory. The containers go on.
func (s *runtimeService) CheckpointPod(ctx context.Context, r *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	return &runtimeapi.CheckpointPodResponse{}, s.cfg.Pods.CheckpointPod(ctx, r.GetPodSandboxId(), r.GetOutputPath(), r.GetContainerIds(), r.GetOptions())
}

// RestorePod makes a pod and its containers of a checkpoint. The containers are
// created, not started.
func (s *runtimeService) RestorePod(ctx context.Context, r *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	if err := spec.ValidatePod(r.GetConfig()); err != nil {
		return nil, err
	}
	for i, c := range r.GetContainerConfigs() {
		if err := spec.ValidateContainer(r.GetConfig(), c); err != nil {
			return nil, fmt.Errorf("container_configs[%d]: %w", i, err)
		}
	}
	id, containers, err := s.cfg.Pods.RestorePod(ctx, r.GetCheckpointPath(), r.GetConfig(), r.GetRuntimeHandler(), r.GetOptions(), r.GetContainerConfigs())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.RestorePodResponse{PodSandboxId: id}
	for _, c := range r.GetContainerConfigs() {
		name := c.GetMetadata().GetName()
		resp.RestoredContainers = append(resp.RestoredContainers, &runtimeapi.RestoredContainer{Name: name, ContainerId: containers[name]})
	}
	return resp, nil
}
