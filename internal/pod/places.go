package pod

import (
	"path"
	"path/filepath"
	"strings"
)

// Places says where the resources that a container uses are accounted.
type Places struct {
	Cgroup   string // below the root of every cgroup hierarchy
	Writable string // the directory with what the container has written to its root file system
}

// Places returns where a container's resources are accounted. The pod must be
// the container's.
func (s *Pods) Places(p Status, containerID string) Places {
	parent := s.Cgroup(p)
	at := Places{Cgroup: path.Join(parent, containerID), Writable: filepath.Join(s.paths.container(containerID), "upper")}
	s.mu.RLock()
	c := s.containers[containerID]
	s.mu.RUnlock()
	if c != nil && c.cgroupsPath != "" {
		at.Cgroup = s.cgroupAt(c.cgroupsPath)
	} else if s.cfg.SystemdCgroup {
		at.Cgroup = path.Join(parent, "sampan-"+containerID+".scope")
	}
	return at
}

// cgroupAt is where a runtime makes the cgroup of a spec's cgroupsPath.
func (s *Pods) cgroupAt(cgroupsPath string) string {
	if !s.cfg.SystemdCgroup {
		return path.Join("/", cgroupsPath)
	}
	slice, rest, _ := strings.Cut(cgroupsPath, ":")
	prefix, name, _ := strings.Cut(rest, ":")
	if slice == "" {
		slice = "system.slice"
	}
	return path.Join(slicePath(slice), prefix+"-"+name+".scope")
}

// Cgroup returns the cgroup that a pod's containers are in, below the root of
// every hierarchy.
func (s *Pods) Cgroup(p Status) string {
	parent := p.Config.GetLinux().GetCgroupParent()
	switch {
	case s.cfg.SystemdCgroup && parent == "":
		return slicePath("sampan.slice")
	case s.cfg.SystemdCgroup:
		return slicePath(path.Base(parent))
	case parent == "":
		return ownCgroup(p.ID)
	}
	return path.Join("/", parent)
}

// slicePath is where systemd puts a slice: a-b.slice is in a.slice.
func slicePath(slice string) string {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "-" || name == "" {
		return "/"
	}
	at := "/"
	for i, r := range name {
		if r == '-' {
			at = path.Join(at, name[:i]+".slice")
		}
	}
	return path.Join(at, slice)
}
