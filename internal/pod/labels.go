package pod

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/spec"
)

func selinuxOptions(o *runtimeapi.SELinuxOption) selinux.Options {
	return selinux.Options{User: o.GetUser(), Role: o.GetRole(), Type: o.GetType(), Level: o.GetLevel()}
}

// labels returns the SELinux labels of a container. What it asks for must be in the
// policy even if it is not confined.
func (s *Pods) labels(p *Pod, c *Container) (selinux.Labels, error) {
	l, err := s.cfg.SELinux.Container(p.Labels, selinuxOptions(c.Config.GetLinux().GetSecurityContext().GetSelinuxOptions()))
	if err != nil {
		return l, fmt.Errorf("%s: %w", spec.SELinuxField, err)
	}
	if spec.Unlabelled(p.Config.PodSandboxConfig, c.Config.ContainerConfig) {
		l.Process = ""
	}
	return l, nil
}

// relabelMounts gives the sources of mounts that ask for it the label of the
// container's files. A container that SELinux does not confine can use them as they
// are. Two containers that want the same do it once; neither holds up anybody else.
func (s *Pods) relabelMounts(ctx context.Context, mounts []*runtimeapi.Mount, sources []spec.Source, l selinux.Labels) error {
	if l.Process == "" {
		return nil
	}
	for i, m := range mounts {
		if !m.GetSelinuxRelabel() || m.GetImage().GetImage() != "" {
			continue
		}
		path := sources[i].Path
		_, err := s.relabels.Do(ctx, [2]string{path, l.Mount}, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, s.cfg.SELinux.Relabel(ctx, path, l.Mount)
		})
		if err != nil {
			return fmt.Errorf("mounts[%d].selinux_relabel: %w", i, err)
		}
	}
	return nil
}
