package pod

import (
	"context"
	"path"
	"path/filepath"

	"sampan.dev/sampan/internal/host"
)

// ownCgroups is the parent of the cgroups of pods whose client names none.
const ownCgroups = "/sampan"

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
		parent = path.Join(ownCgroups, p.ID)
	}
	return path.Join("/", parent, id)
}

// removeOwnCgroup removes the cgroup that was made for a pod without a parent
// of its own. Those of its containers are gone with them.
func (s *Pods) removeOwnCgroup(ctx context.Context, podID string) error {
	if s.cfg.SystemdCgroup {
		return nil // a scope goes with its last process
	}
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + ownCgroups + "/" + podID)
	if err != nil {
		return err
	}
	if host.CgroupMode() == host.CgroupV2 {
		dirs = []string{"/sys/fs/cgroup" + ownCgroups + "/" + podID}
	}
	cg := make(host.Cgroup)
	for _, dir := range dirs {
		cg[dir] = dir
	}
	return cg.Remove(ctx)
}
