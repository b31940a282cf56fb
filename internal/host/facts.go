package host

// Facts is what a machine and this process' own limits allow, as far as a
// container's specification depends on it. Facts are values: ProbeFacts takes
// them once, the caller keeps them and hands them on.
type Facts struct {
	// Capabilities are the capabilities ("CAP_CHOWN") this process can give
	// away: permitted and in its bounding set. A spec that names another one
	// is refused by OCI runtimes.
	Capabilities []string
	// Cgroup is how the cgroup file systems are mounted.
	Cgroup CgroupLayout
	// SwapLimit tells whether cgroups can limit swap.
	SwapLimit bool
	// HugepageSizes are the page sizes ("2MB") the hugetlb controller limits;
	// empty if there is no such controller.
	HugepageSizes []string
	// Seccomp tells whether the kernel takes seccomp filters.
	Seccomp bool
	// AppArmor tells whether AppArmor is enabled.
	AppArmor bool
	// SELinux tells whether SELinux is enabled.
	SELinux bool
	// RecursiveReadOnly tells whether a mount can be made read-only together
	// with all mounts below it (mount_setattr, Linux 5.12).
	RecursiveReadOnly bool
	// MaxOpenFiles is the highest RLIMIT_NOFILE this process can give away.
	MaxOpenFiles uint64
	// MinOOMScoreAdj is the lowest oom_score_adj this process can give away.
	MinOOMScoreAdj int
}

// Device is a device node.
type Device struct {
	Path         string // where it stands
	Type         string // "c" or "b"
	Major, Minor int64
	Mode         uint32 // permission bits
	UID, GID     uint32
}
