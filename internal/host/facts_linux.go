package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// ProbeFacts finds out the Facts of this machine and process. Each is tried or
// read from the kernel, none is concluded from a version.
func ProbeFacts() (Facts, error) {
	caps, err := grantableCapabilities(0)
	if err != nil {
		return Facts{}, fmt.Errorf("probe capabilities: %w", err)
	}
	files, err := maxOpenFiles(slices.Contains(caps, "CAP_SYS_RESOURCE"))
	if err != nil {
		return Facts{}, fmt.Errorf("probe the limit of open files: %w", err)
	}
	score, err := minOOMScoreAdj(slices.Contains(caps, "CAP_SYS_RESOURCE"))
	if err != nil {
		return Facts{}, fmt.Errorf("probe oom_score_adj: %w", err)
	}
	mode := CgroupMode()
	return Facts{
		Capabilities:      caps,
		Cgroup:            mode,
		SwapLimit:         hasSwapLimit(mode),
		HugepageSizes:     hugepageSizes(mode),
		Seccomp:           hasSeccomp(),
		AppArmor:          HasAppArmor(),
		SELinux:           HasSELinux(),
		RecursiveReadOnly: hasMountSetattr(),
		MaxOpenFiles:      files,
		MinOOMScoreAdj:    score,
	}, nil
}

// grantableCapabilities lists what is permitted and in the bounding set of a
// thread (0: of this process), in the order of the kernel's numbers.
func grantableCapabilities(tid int) ([]string, error) {
	set, err := capability.NewPid2(tid)
	if err != nil {
		return nil, err
	}
	if err := set.Load(); err != nil {
		return nil, err
	}
	var names []string
	for _, c := range capability.ListKnown() {
		if set.Get(capability.BOUNDING, c) && set.Get(capability.PERMITTED, c) {
			names = append(names, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	return names, nil
}

// maxOpenFiles returns the highest RLIMIT_NOFILE a child can be given: the
// kernel's own bound for the privileged, the hard limit for others.
func maxOpenFiles(privileged bool) (uint64, error) {
	if privileged {
		return readUint("/proc/sys/fs/nr_open")
	}
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return limit.Max, err
}

// minOOMScoreAdj returns the lowest value a child can be given. The kernel
// remembers a floor for the unprivileged but does not show it; it is at most
// the present value.
func minOOMScoreAdj(privileged bool) (int, error) {
	if privileged {
		return -1000, nil
	}
	data, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// hasSwapLimit looks for the file that limits swap. On v2 the root cgroup has
// none; where the memory controller is not yet switched on for any child, a
// kernel with swap will have it.
func hasSwapLimit(mode CgroupLayout) bool {
	switch {
	case mode != CgroupV2:
		return exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	case anyMatch("/sys/fs/cgroup/*/memory.max"):
		return anyMatch("/sys/fs/cgroup/*/memory.swap.max")
	}
	return hasController(mode, "memory") && exists("/proc/swaps")
}

// hugepageSizes lists the sizes the hugetlb controller limits, named as its
// files are: all that the kernel has.
func hugepageSizes(mode CgroupLayout) []string {
	if !hasController(mode, "hugetlb") {
		return nil
	}
	dirs, _ := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB") // the pattern is well-formed
	var sizes []string
	for _, dir := range dirs {
		number := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(dir), "hugepages-"), "kB")
		if kib, err := strconv.ParseUint(number, 10, 64); err == nil {
			sizes = append(sizes, hugepageName(kib))
		}
	}
	slices.Sort(sizes)
	return sizes
}

// hugepageName writes a size as the kernel does in names of hugetlb files.
func hugepageName(kib uint64) string {
	switch {
	case kib >= 1<<20:
		return strconv.FormatUint(kib>>20, 10) + "GB"
	case kib >= 1<<10:
		return strconv.FormatUint(kib>>10, 10) + "MB"
	}
	return strconv.FormatUint(kib, 10) + "KB"
}

func hasController(mode CgroupLayout, name string) bool {
	if mode != CgroupV2 {
		return exists("/sys/fs/cgroup/" + name)
	}
	data, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return err == nil && slices.Contains(strings.Fields(string(data)), name)
}

// hasSeccomp asks for a filter without giving one: the kernel complains of the
// address if it knows filters, of the mode if it does not.
func hasSeccomp() bool {
	_, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0, 0)
	return errno == unix.EFAULT
}

// hasMountSetattr calls mount_setattr on the empty path, which names nothing: a
// kernel that has the call says so.
func hasMountSetattr() bool {
	err := unix.MountSetattr(-1, "", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return errors.Is(err, unix.ENOENT)
}

// HasAppArmor tells whether AppArmor is enabled.
func HasAppArmor() bool { return enabled("/sys/module/apparmor/parameters/enabled") }

// HasSELinux tells whether SELinux is enabled.
func HasSELinux() bool { return isMounted("/sys/fs/selinux", unix.SELINUX_MAGIC) }

func enabled(path string) bool {
	data, err := os.ReadFile(path)
	return err == nil && len(data) > 0 && (data[0] == 'Y' || data[0] == '1')
}

func isMounted(path string, magic int64) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && int64(st.Type) == magic
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func anyMatch(pattern string) bool {
	files, _ := filepath.Glob(pattern) // the pattern is well-formed
	return len(files) > 0
}

func readUint(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// maxDevices bounds how many devices Devices returns.
const maxDevices = 1 << 16

// containersOwn are what a container has below /dev of its own, also a
// privileged one.
var containersOwn = []string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/console", "/dev/ptmx", "/dev/fd", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev"}

// AllDevices lists the devices of the host for a privileged container: all
// below /dev but those a container has of its own.
func AllDevices() ([]Device, error) {
	list, err := walkDevices("/dev", func(path string) bool { return slices.Contains(containersOwn, path) })
	if err != nil {
		return nil, fmt.Errorf("list the host's devices: %w", err)
	}
	return list, nil
}

// Devices lists the device nodes at path: what path names, symbolic links
// followed, or all below it if that is a directory. The devices keep the name
// they were asked for: path, or a path below it. Where nothing is, or nothing
// that is a device, the list is empty.
func Devices(path string) ([]Device, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find device: %w", err)
	}
	if !info.IsDir() {
		d, ok, err := deviceAt(path)
		if err != nil || !ok {
			return nil, err
		}
		return []Device{d}, nil
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("find device: %w", err)
	}
	list, err := walkDevices(real, func(string) bool { return false })
	if err != nil {
		return nil, fmt.Errorf("list devices below %s: %w", path, err)
	}
	for i := range list {
		list[i].Path = filepath.Join(path, strings.TrimPrefix(list[i].Path, real))
	}
	return list, nil
}

// walkDevices lists the device nodes below dir, symbolic links not followed.
// Devices come and go while it walks: what is gone when it is looked at was
// never there.
func walkDevices(dir string, skip func(path string) bool) ([]Device, error) {
	var list []Device
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && path != dir:
			return nil
		case err != nil:
			return err
		case skip(path) && entry.IsDir():
			return fs.SkipDir
		case skip(path) || entry.Type()&fs.ModeDevice == 0:
			return nil
		case len(list) == maxDevices:
			return fmt.Errorf("there are more than %d", maxDevices)
		}
		d, ok, err := deviceAt(path)
		if err != nil || !ok {
			return err
		}
		list = append(list, d)
		return nil
	})
	return list, err
}

// deviceAt describes the device at path; false if it is none, or gone.
func deviceAt(path string) (Device, bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); errors.Is(err, unix.ENOENT) {
		return Device{}, false, nil
	} else if err != nil {
		return Device{}, false, fmt.Errorf("find device: %w", &fs.PathError{Op: "stat", Path: path, Err: err})
	}
	d := Device{
		Path:  path,
		Major: int64(unix.Major(uint64(st.Rdev))),
		Minor: int64(unix.Minor(uint64(st.Rdev))),
		Mode:  st.Mode & 0o7777,
		UID:   st.Uid,
		GID:   st.Gid,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		d.Type = "c"
	case unix.S_IFBLK:
		d.Type = "b"
	default:
		return Device{}, false, nil
	}
	return d, true, nil
}
