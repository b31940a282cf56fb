package pod

import (
	"context"
	"path"
	"path/filepath"

	"sampan.dev/sampan/internal/host"
)

// ownCgroup is the parent of the containers' cgroups in a pod whose client names
// none. It is at the top, so that no two pods share a directory that one of them
// would have to remove under the other.
func ownCgroup(podID string) string { return "/sampan-" + podID[:min(16, len(podID))] }

// cgroupsPath is the OCI cgroupsPath of a container: below the cgroup the kubelet
// made for the pod, in the form the cgroup driver wants.
func (s *Pods) cgroupsPath(p *Pod, id string) string {
	parent := p.Config.GetLinux().GetCgroupParent()
	if s.cfg.SystemdCgroup {
		if parent == "" {
			parent = "sampan.slice"
		}
		return path.Base(parent) + ":sampan:" + id
	}
	if parent == "" {
		parent = ownCgroup(p.ID)
	}
	return path.Join("/", parent, id)
}

// removeOwnCgroup removes the cgroup that was made for a pod without a parent of
// its own. Those of its containers are gone with them.
func (s *Pods) removeOwnCgroup(ctx context.Context, podID string) error {
	if s.cfg.SystemdCgroup {
		return nil // a scope goes with its last process
	}
	roots, err := host.CgroupRoots()
	if err != nil {
		return err
	}
	cg := make(host.Cgroup)
	for controller, root := range roots {
		cg[controller] = filepath.Join(root, ownCgroup(podID))
	}
	return cg.Remove(ctx)
}
