package builtin

import (
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// unfit returns the first thing in a spec that only libcontainer knows how to
// do, or "" if there is none. What it does not look at, launch does.
func unfit(s *specs.Spec) string {
	if what := unfitProcess(s.Process); what != "" {
		return what
	}
	for _, check := range []struct {
		what  string
		given bool
	}{
		{"hooks", s.Hooks != nil},
		{"solaris", s.Solaris != nil},
		{"windows", s.Windows != nil},
		{"vm", s.VM != nil},
		{"zos", s.ZOS != nil},
		{"freebsd", s.FreeBSD != nil},
		{"linux.uidMappings", len(s.Linux.UIDMappings) > 0},
		{"linux.gidMappings", len(s.Linux.GIDMappings) > 0},
		{"linux.netDevices", len(s.Linux.NetDevices) > 0},
		{"linux.mountLabel", s.Linux.MountLabel != ""},
		{"linux.intelRdt", s.Linux.IntelRdt != nil},
		{"linux.memoryPolicy", s.Linux.MemoryPolicy != nil},
		{"linux.personality", s.Linux.Personality != nil},
		{"linux.timeOffsets", len(s.Linux.TimeOffsets) > 0},
	} {
		if check.given {
			return check.what
		}
	}
	if what := unfitNamespaces(s.Linux.Namespaces); what != "" {
		return what
	}
	if what := unfitSeccomp(s.Linux.Seccomp); what != "" {
		return what
	}
	for _, m := range s.Mounts {
		if what := unfitMount(m); what != "" {
			return "mounts: " + m.Destination + ": " + what
		}
	}
	return ""
}

// unfitProcess is unfit for a process, the first or a further one.
func unfitProcess(p *specs.Process) string {
	switch {
	case p.CommandLine != "":
		return "process.commandLine"
	case p.User.Username != "":
		return "process.user.username"
	case strings.ContainsRune(p.ApparmorProfile, 0):
		return "process.apparmorProfile"
	case p.SelinuxLabel != "":
		return "process.selinuxLabel"
	case p.Scheduler != nil:
		return "process.scheduler"
	case p.IOPriority != nil:
		return "process.ioPriority"
	case p.ExecCPUAffinity != nil:
		return "process.execCPUAffinity"
	}
	for _, kv := range p.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.ContainsRune(kv, 0) {
			return "process.env"
		}
	}
	for _, arg := range append([]string{p.Cwd}, p.Args...) {
		if strings.ContainsRune(arg, 0) {
			return "process.args"
		}
	}
	return ""
}

// unfitNamespaces: there is a mount namespace of the container's own, and no
// namespace that takes more than to be joined.
func unfitNamespaces(list []specs.LinuxNamespace) string {
	var mounts bool
	for _, ns := range list {
		own := ns.Path == ""
		switch ns.Type {
		case specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace:
		case specs.MountNamespace:
			mounts = own
		case specs.NetworkNamespace:
			if own { // needs its loopback interface
				return "a new network namespace"
			}
		case specs.CgroupNamespace:
			if !own || host.CgroupMode() != host.CgroupV2 {
				return "a cgroup namespace other than a new one of cgroup v2"
			}
		default:
			return string(ns.Type) + " namespace"
		}
	}
	if !mounts {
		return "no new mount namespace"
	}
	return ""
}

// What compileSeccomp knows.
var (
	seccompArches = []specs.Arch{specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64}
	seccompKnown  = []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow}
)

func unfitSeccomp(s *specs.LinuxSeccomp) string {
	if s == nil {
		return ""
	}
	if s.ListenerPath != "" || s.ListenerMetadata != "" || s.DefaultAction == specs.ActNotify {
		return "linux.seccomp: a listener"
	}
	for _, arch := range s.Architectures {
		if !slices.Contains(seccompArches, arch) {
			return "linux.seccomp: " + string(arch)
		}
	}
	for _, flag := range s.Flags {
		if !slices.Contains(seccompKnown, flag) {
			return "linux.seccomp: " + string(flag)
		}
	}
	for _, call := range s.Syscalls {
		if call.Action == specs.ActNotify {
			return "linux.seccomp: a listener"
		}
		for _, arg := range call.Args {
			if arg.Index > 5 {
				return "linux.seccomp: a seventh argument"
			}
		}
	}
	return ""
}

// mountTypes are the kinds of file systems that a plan can mount.
var mountTypes = []string{"bind", "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup"}

// procFiles are the only places inside /proc that may be mounted on: files that
// lxcfs and its like make. Anything else would let a container have a /proc that
// lies.
var procFiles = []string{
	"proc/cpuinfo", "proc/diskstats", "proc/meminfo", "proc/stat", "proc/swaps", "proc/uptime", "proc/loadavg",
	"proc/slabinfo", "proc/sys/kernel/ns_last_pid", "proc/sys/crypto/fips_enabled",
}

func unfitMount(m specs.Mount) string {
	target := inside(m.Destination)
	switch {
	case !path.IsAbs(m.Destination):
		return "a relative destination"
	case target == ".":
		return "the root itself"
	case len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0:
		return "an id-mapped mount"
	case strings.ContainsRune(m.Source+m.Destination+m.Type, 0):
		return "a NUL byte"
	}
	kind := m.Type
	if slices.ContainsFunc(m.Options, func(o string) bool { return o == "bind" || o == "rbind" }) {
		kind = "bind"
	}
	if !slices.Contains(mountTypes, kind) {
		return "type " + kind
	}
	inProc := target == "proc" || strings.HasPrefix(target, "proc/")
	if inProc && !(kind == "proc" && target == "proc") && !(kind == "bind" && slices.Contains(procFiles, target)) {
		return "inside /proc"
	}
	if kind == "cgroup" && target != "sys/fs/cgroup" {
		return "a cgroup mount elsewhere"
	}
	return ""
}

// inside is a path in the container as plans have it.
func inside(p string) string {
	p = strings.TrimPrefix(path.Clean("/"+p), "/")
	if p == "" {
		return "."
	}
	return p
}

// plainFlags are the mount flags that plans can set.
const plainFlags = unix.MS_BIND | unix.MS_REC | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC |
	unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME | unix.MS_STRICTATIME | unix.MS_NOSYMFOLLOW | unix.MS_SILENT

// unfitConfig is unfit for what only libcontainer's own form of a spec shows.
func unfitConfig(c *configs.Config) string {
	for _, m := range c.Mounts {
		if (m.Flags|m.ClearedFlags)&^plainFlags != 0 || m.Extensions != 0 || m.IDMapping != nil {
			return "mounts: " + m.Destination + ": options"
		}
		if m.Device != "bind" && m.RecAttr != nil {
			return "mounts: " + m.Destination + ": options"
		}
		if strings.HasPrefix(m.Destination, c.Rootfs+"/") {
			return "mounts: " + m.Destination + ": a path below the root file system's own"
		}
	}
	return ""
}
