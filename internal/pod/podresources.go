package pod

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// UpdatePod notes what all of a pod may use from now on, and what running it
// takes besides. What is nil stays as it is. The client has set the pod's cgroup
// itself, so nothing else is to be done.
func (s *Pods) UpdatePod(ctx context.Context, id string, overhead, resources *runtimeapi.LinuxContainerResources) error {
	p, err := s.pod(id)
	if err != nil {
		return err
	}
	for field, r := range map[string]*runtimeapi.LinuxContainerResources{"overhead": overhead, "resources": resources} {
		if _, err := spec.Resources(r, s.cfg.Facts); err != nil {
			return fmt.Errorf("update %v: %s: %w", p, field, err)
		}
	}
	if err := s.tellUpdatePod(ctx, p, overhead, resources); err != nil {
		return fmt.Errorf("update %v: %w", p, err)
	}
	if err := s.updatePod(p, overhead, resources); err != nil {
		return fmt.Errorf("update %v: %w", p, err)
	}
	s.tellPodUpdated(ctx, p)
	return nil
}

func (s *Pods) updatePod(p *Pod, overhead, resources *runtimeapi.LinuxContainerResources) error {
	p.updating.Lock()
	defer p.updating.Unlock()
	st := p.Status()
	if !st.Ready {
		return fmt.Errorf("it is not ready: %w", errdefs.ErrFailedPrecondition)
	}
	if overhead == nil {
		overhead = st.Overhead
	}
	if resources == nil {
		resources = st.Resources
	}
	r := podResourcesRecord{linuxResources{overhead}, linuxResources{resources}}
	if err := state.Write(filepath.Join(s.paths.pod(p.ID), "resources"), podResourcesKind, r, state.Volatile); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.overhead, p.resources = overhead, resources
	return nil
}

// loadResources reads what UpdatePod has noted.
func (s *Pods) loadResources(p *Pod) {
	p.overhead, p.resources = p.Config.GetLinux().GetOverhead(), p.Config.GetLinux().GetResources()
	var r podResourcesRecord
	if err := s.read(filepath.Join(s.paths.pod(p.ID), "resources"), podResourcesKind, &r); err == nil {
		p.overhead, p.resources = r.Overhead.LinuxContainerResources, r.Resources.LinuxContainerResources
	}
}
