package host

import (
	"fmt"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
)

// cgroupMounts are the mounts of cgroup hierarchies. They are there before this
// process is; looking for them among the mounts of all pods takes long.
var cgroupMounts = sync.OnceValues(func() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
})

// CgroupRoots returns where the hierarchy of each controller is mounted, by
// controller; "" is the unified hierarchy, which has all of them if there is no
// other.
func CgroupRoots() (map[string]string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, fmt.Errorf("find cgroup hierarchies: %w", err)
	}
	roots := make(map[string]string)
	for _, m := range mounts {
		controllers := []string{""}
		if m.FSType == "cgroup" {
			controllers = strings.Split(m.VFSOptions, ",")
		}
		for _, c := range controllers {
			if _, ok := roots[c]; !ok && c != "rw" && c != "ro" {
				roots[c] = m.Mountpoint
			}
		}
	}
	return roots, nil
}
