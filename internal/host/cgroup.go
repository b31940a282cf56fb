package host

import (
	"sync"

	"golang.org/x/sys/unix"
)

// CgroupLayout is how the cgroup file systems are mounted.
type CgroupLayout int

const (
	CgroupV1     CgroupLayout = iota // one hierarchy per controller
	CgroupHybrid                     // like v1, with a v2 hierarchy without controllers at unified
	CgroupV2                         // the unified hierarchy alone
)

// String returns "v1", "hybrid" or "v2".
func (l CgroupLayout) String() string { return [...]string{"v1", "hybrid", "v2"}[l] }

// CgroupMode tells the layout below /sys/fs/cgroup; it does not change while the
// machine is up.
func CgroupMode() CgroupLayout { return cgroupMode() }

var cgroupMode = sync.OnceValue(func() CgroupLayout {
	switch {
	case isCgroup2("/sys/fs/cgroup"):
		return CgroupV2
	case isCgroup2("/sys/fs/cgroup/unified"):
		return CgroupHybrid
	default:
		return CgroupV1
	}
})

func isCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}
