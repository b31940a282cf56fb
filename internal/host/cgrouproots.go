package host

import (
	"fmt"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// CgroupRoots returns where the hierarchy of each controller is mounted, by
// controller; "" is the unified hierarchy, which has all of them if there is no
// other.
func CgroupRoots() (map[string]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
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
