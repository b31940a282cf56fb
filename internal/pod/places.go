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
	at := Places{Cgroup: path.Join(p.containersCgroup, containerID), Writable: filepath.Join(s.paths.container(containerID), "upper")}
	s.mu.RLock()
	c := s.containers[containerID]
	s.mu.RUnlock()
	if c != nil && c.cgroupsPath != "" {
		at.Cgroup = path.Join("/", c.cgroupsPath)
	}
	return at
}

// Cgroup returns the cgroup of the whole pod, below the root of every hierarchy:
// the client's, if it has named one.
func (s *Pods) Cgroup(p Status) string {
	parent := p.Config.GetLinux().GetCgroupParent()
	switch {
	case parent == "":
		return p.containersCgroup
	case strings.HasSuffix(p.containersCgroup, ".service"):
		return path.Dir(p.containersCgroup)
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
