package builtin

import (
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime/launch"
)

// filter is a compiled seccomp profile; none if there are no instructions.
type filter struct {
	flags   uint
	program []byte
}

// planFirst adds what a container's first process does in its root file system: the
// same as in libcontainer, in the same order.
func planFirst(p *launch.Plan, c *configs.Config, process *specs.Process, groups []cgroupMount, f filter) error {
	var readonly []string
	for _, m := range c.Mounts {
		if planMount(p, m, groups) {
			readonly = append(readonly, inside(m.Destination))
		}
	}
	ownDev := !slices.ContainsFunc(c.Mounts, func(m *configs.Mount) bool { return m.Device == "bind" && inside(m.Destination) == "dev" })
	if ownDev {
		if err := planDev(p, c.Devices); err != nil {
			return err
		}
	}
	p.Pivot(sharedOnly(c.RootPropagation))
	if ownDev {
		p.Stdnull()
	}
	if cwd := inside(process.Cwd); cwd != "." {
		p.Mkdir(cwd)
	}
	planTerminal(p, process, true)
	for _, target := range readonly {
		p.Readonly(target)
	}
	if c.Readonlyfs {
		p.Readonly(".")
	}
	if c.Hostname != "" {
		p.Hostname(c.Hostname)
	}
	if c.Domainname != "" {
		p.Domainname(c.Domainname)
	}
	for _, key := range slices.Sorted(maps.Keys(c.Sysctl)) {
		p.Sysctl(strings.ReplaceAll(key, ".", "/"), c.Sysctl[key])
	}
	for _, target := range c.ReadonlyPaths {
		p.ReadonlyPath(inside(target))
	}
	masked := make(map[string]bool)
	for _, target := range c.MaskPaths {
		if target = inside(target); !masked[target] {
			p.Mask(target)
			masked[target] = true
		}
	}
	if err := planUser(p, process, c.Umask, f); err != nil {
		return err
	}
	p.FIFO()
	p.Execute()
	return nil
}

// planRoot keeps what is mounted from now on from appearing elsewhere, if that is
// not asked for: the root itself is never shared with the host's.
func planRoot(p *launch.Plan, l *launch.Launcher, c *configs.Config) {
	all, own := c.RootPropagation, unix.MS_PRIVATE
	if all == 0 {
		all = unix.MS_SLAVE | unix.MS_REC
	}
	if c.RootPropagation&unix.MS_SLAVE != 0 {
		own = unix.MS_SLAVE
	}
	p.Root(l, c.Rootfs, all, own)
}

// sharedOnly is the propagation that the root has to be given once it is one:
// before, it would have been the host's.
func sharedOnly(propagation int) int {
	if propagation&(unix.MS_PRIVATE|unix.MS_SLAVE) != 0 {
		return 0
	}
	return propagation
}

// planUser adds the end of every plan but its last step: limits, confinement, the
// user, the program.
// A profile of AppArmor takes a procfs.
func planUser(p *launch.Plan, process *specs.Process, umask *uint32, f filter) error {
	for _, limit := range process.Rlimits {
		number, ok := rlimits[limit.Type]
		if !ok {
			return fmt.Errorf("process.rlimits: no such limit: %q", limit.Type)
		}
		p.Rlimit(limit.Type, number, limit.Soft, limit.Hard)
	}
	if process.ApparmorProfile != "" {
		p.AppArmor(process.ApparmorProfile)
	}
	if process.NoNewPrivileges {
		p.NoNewPrivileges()
	}
	if umask != nil {
		p.Umask(*umask)
	}
	p.Sync(launch.Ready)
	// A filter is for the privileged to install, unless no_new_privs is set: then
	// it comes last, so that it need not allow what is done here.
	if len(f.program) > 0 && !process.NoNewPrivileges {
		p.Seccomp(f.flags, f.program)
	}
	p.Environment(process.User.UID, lastOfEach(process.Env))
	p.User(process.User.UID, process.User.GID, process.User.AdditionalGids, capabilitySets(process.Capabilities), process.Cwd)
	p.Arguments(process.Args)
	if len(f.program) > 0 && process.NoNewPrivileges {
		p.Seccomp(f.flags, f.program)
	}
	return nil
}

func planTerminal(p *launch.Plan, process *specs.Process, mount bool) {
	if !process.Terminal {
		return
	}
	var size specs.Box
	if process.ConsoleSize != nil {
		size = *process.ConsoleSize
	}
	p.Console(uint16(size.Height), uint16(size.Width), mount)
}

// lastOfEach returns the variables, of several with one name the last, and no
// empty HOME, in whose place the user's comes.
func lastOfEach(env []string) []string {
	last := make(map[string]int, len(env))
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		last[name] = i
	}
	out := make([]string, 0, len(env))
	for i, kv := range env {
		if name, value, _ := strings.Cut(kv, "="); last[name] == i && !(name == "HOME" && value == "") {
			out = append(out, kv)
		}
	}
	return out
}

// capabilityNumbers are the capabilities that the kernel has.
var capabilityNumbers = sync.OnceValue(func() map[string]uint {
	numbers := make(map[string]uint)
	known, err := capability.ListSupported()
	if err != nil {
		known = capability.ListKnown()
	}
	for _, c := range known {
		numbers["CAP_"+strings.ToUpper(c.String())] = uint(c)
	}
	return numbers
})

// capabilitySets makes sets of names. Those that the kernel does not have are
// left out, as everywhere.
func capabilitySets(c *specs.LinuxCapabilities) *launch.Capabilities {
	if c == nil {
		return nil
	}
	set := func(names []string) (bits uint64) {
		for _, name := range names {
			if n, ok := capabilityNumbers()[name]; ok {
				bits |= 1 << n
			}
		}
		return bits
	}
	return &launch.Capabilities{
		Bounding: set(c.Bounding), Effective: set(c.Effective), Permitted: set(c.Permitted),
		Inheritable: set(c.Inheritable), Ambient: set(c.Ambient),
	}
}

// planMount adds a mount, and reports whether it is to be read-only later: things
// are still to be made in it.
func planMount(p *launch.Plan, m *configs.Mount, groups []cgroupMount) (later bool) {
	target, attributes, options := inside(m.Destination), mountAttributes(m.Flags), 0
	switch m.Device {
	case "bind":
		planBind(p, m.Source, target, m)
		return false
	case "cgroup":
		planCgroups(p, target, m, groups)
		return false
	case "proc", "sysfs":
		options = launch.NoSymlinks
		if m.Device == "proc" {
			options |= launch.InsideProc // over another one
		}
	case "tmpfs":
		options = launch.KeepMode
	}
	if m.Device == "tmpfs" || target == "dev" {
		later = attributes&unix.MOUNT_ATTR_RDONLY != 0
		attributes &^= unix.MOUNT_ATTR_RDONLY
	}
	p.Mount(m.Device, m.Source, target, attributes, options, strings.Split(m.Data, ",")...)
	planPropagation(p, m)
	return later
}

func planPropagation(p *launch.Plan, m *configs.Mount) {
	for _, flag := range m.PropagationFlags {
		p.Propagate(flag)
	}
}

func planBind(p *launch.Plan, source, target string, m *configs.Mount) {
	var a launch.Attributes
	if m.Flags&^(unix.MS_BIND|unix.MS_REC) != 0 || m.ClearedFlags != 0 {
		// All that is not asked for is cleared, but for the updating of access
		// times, of which a mount has always one kind.
		const plain = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOSYMFOLLOW
		a.Set = mountAttributes(m.Flags)
		a.Clear = mountAttributes(m.ClearedFlags) &^ (unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME)
		a.Default = plain &^ (a.Set | a.Clear)
		if m.Flags&(unix.MS_NOATIME|unix.MS_NODIRATIME|unix.MS_RELATIME|unix.MS_STRICTATIME) != 0 {
			a.Clear |= unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME&^a.Set
		}
	}
	if m.RecAttr != nil {
		a.AllSet, a.AllClr = m.RecAttr.Attr_set, m.RecAttr.Attr_clr
	}
	options := 0
	if slices.Contains(procFiles, target) {
		options = launch.InsideProc
	}
	p.Bind(source, target, m.Flags&unix.MS_REC != 0, a, options)
	planPropagation(p, m)
}

// mountAttributes makes MOUNT_ATTR_* of MS_*.
func mountAttributes(flags int) (attributes uint64) {
	for _, f := range []struct {
		flag      int
		attribute uint64
	}{
		{unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
		{unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
		{unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
		{unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
		{unix.MS_NOSYMFOLLOW, unix.MOUNT_ATTR_NOSYMFOLLOW},
		{unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME},
	} {
		if flags&f.flag != 0 {
			attributes |= f.attribute
		}
	}
	switch { // one of three, as mount(2) ranks them; relatime is none
	case flags&unix.MS_STRICTATIME != 0:
		attributes |= unix.MOUNT_ATTR_STRICTATIME
	case flags&unix.MS_NOATIME != 0:
		attributes |= unix.MOUNT_ATTR_NOATIME
	}
	return attributes
}

// cgroupMount is a hierarchy of cgroup v1 in a container: its own cgroup only.
type cgroupMount struct {
	name string // of the mount point: "cpu,cpuacct"
	dir  string // of the container's cgroup
}

// planCgroups mounts cgroups: in v2 the file system, which shows what is below the
// root of the cgroup namespace; in v1 each hierarchy below a tmpfs.
func planCgroups(p *launch.Plan, target string, m *configs.Mount, groups []cgroupMount) {
	if cgroups.IsCgroup2UnifiedMode() {
		p.Mount("cgroup2", m.Source, target, mountAttributes(m.Flags), 0, strings.Split(m.Data, ",")...)
		planPropagation(p, m)
		return
	}
	p.Mount("tmpfs", "tmpfs", target, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, 0, "mode=755")
	planPropagation(p, m)
	for _, g := range groups {
		bind := *m
		bind.Flags |= unix.MS_BIND | unix.MS_REC
		planBind(p, g.dir, path.Join(target, g.name), &bind)
	}
	for _, g := range groups {
		if !strings.Contains(g.name, ",") {
			continue
		}
		for controller := range strings.SplitSeq(g.name, ",") {
			p.Symlink(g.name, path.Join(target, controller), false)
		}
	}
	if m.Flags&unix.MS_RDONLY != 0 {
		p.Readonly(target)
	}
}

// cgroupMounts returns the hierarchies of cgroup v1, in order, of a cgroup's
// directories by controller.
func cgroupMounts(paths map[string]string, cgroup string) []cgroupMount {
	var mounts []cgroupMount
	for _, dir := range slices.Compact(slices.Sorted(maps.Values(paths))) {
		if dir == paths[""] {
			continue // the unified one of a hybrid layout
		}
		if hierarchy, ok := strings.CutSuffix(dir, cgroup); ok {
			mounts = append(mounts, cgroupMount{name: filepath.Base(hierarchy), dir: dir})
		}
	}
	return mounts
}

var deviceKinds = map[devices.Type]uint32{
	devices.CharDevice: unix.S_IFCHR, devices.BlockDevice: unix.S_IFBLK, devices.FifoDevice: unix.S_IFIFO,
}

// planDev fills /dev.
func planDev(p *launch.Plan, list []*devices.Device) error {
	for _, d := range list {
		if d.Path == "" || path.Clean(d.Path) == "/dev/ptmx" {
			continue
		}
		kind, ok := deviceKinds[d.Type]
		if !ok {
			return fmt.Errorf("linux.devices: %s: no such type: %q", d.Path, d.Type)
		}
		p.Node(inside(d.Path), uint32(d.FileMode)&0o7777|kind, max(d.Major, 0), max(d.Minor, 0), d.Uid, d.Gid)
	}
	p.Symlink("pts/ptmx", "dev/ptmx", true)
	p.Symlink("/proc/self/fd", "dev/fd", false)
	p.Symlink("/proc/self/fd/0", "dev/stdin", false)
	p.Symlink("/proc/self/fd/1", "dev/stdout", false)
	p.Symlink("/proc/self/fd/2", "dev/stderr", false)
	if hasKcore() {
		p.Symlink("/proc/kcore", "dev/core", false)
	}
	return nil
}

var hasKcore = sync.OnceValue(func() bool {
	_, err := os.Lstat("/proc/kcore")
	return err == nil
})
