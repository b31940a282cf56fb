package launch

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Plan is what a process does to become a container's: steps, in order. Each
// method adds one. Paths in the container are relative to its root, clean, and
// not empty. cmd/sampan-launch carries the steps out, and says what each of them
// guarantees.
type Plan struct {
	encoded []byte
	says    []string // what each step is to errors
	files   []int    // descriptors of this process that steps refer to
}

// The codes of the steps, as in cmd/sampan-launch/plan.h.
const (
	stepSetns = iota + 1
	stepUnshare
	stepKeyring
	stepRlimit
	stepRoot
	stepMount
	stepBind
	stepPropagate
	stepNode
	stepSymlink
	stepPivot
	stepStdnull
	stepConsole
	stepReadonly
	stepReadonlyPath
	stepMask
	stepHostname
	stepDomainname
	stepSysctl
	stepMkdir
	stepProcfs
	stepNoNewPrivileges
	stepUmask
	stepSync
	stepEnvironment
	stepUser
	stepArguments
	stepSeccomp
	stepFIFO
	stepExecute
	stepAppArmor
)

// Options of Mount and Bind.
const (
	NoSymlinks = 1 << iota // the target is reached without symbolic links, and is a directory
	InsideProc             // the target may be inside a procfs
	KeepMode               // the mode of a target that exists is a parameter
)

// firstFile is the descriptor that the first file of a plan is in the process:
// behind stdio, the control socket, the plan and the FIFO.
const firstFile = 6

const headerSize = 16 + 9*8

func (p *Plan) add(code uint16, says string, args []int64, data []byte, strings ...string) {
	begin := len(p.encoded)
	p.encoded = append(p.encoded, make([]byte, headerSize)...)
	for _, s := range strings {
		p.encoded = append(append(p.encoded, s...), 0)
	}
	p.align()
	p.encoded = append(p.encoded, data...)
	p.align()
	step := p.encoded[begin:]
	binary.NativeEndian.PutUint32(step[0:], uint32(len(step)))
	binary.NativeEndian.PutUint16(step[4:], code)
	binary.NativeEndian.PutUint16(step[6:], uint16(len(strings)))
	binary.NativeEndian.PutUint32(step[8:], uint32(len(data)))
	for i, a := range args {
		binary.NativeEndian.PutUint64(step[16+8*i:], uint64(a))
	}
	p.says = append(p.says, says)
}

func (p *Plan) align() {
	for len(p.encoded)%8 != 0 {
		p.encoded = append(p.encoded, 0)
	}
}

// file returns what a descriptor of this process will be in the other.
func (p *Plan) file(fd int) int64 {
	p.files = append(p.files, fd)
	return int64(firstFile + len(p.files) - 1)
}

// Setns joins those namespaces of flags that fd refers to: a namespace, or the
// handle of a process.
func (p *Plan) Setns(says string, fd int, flags int) {
	p.add(stepSetns, says, []int64{p.file(fd), int64(flags)}, nil)
}

// Unshare leaves the namespaces of flags for new ones.
func (p *Plan) Unshare(flags int) {
	p.add(stepUnshare, "new namespaces", []int64{int64(flags)}, nil)
}

// Keyring joins the session keyring name, and adds permissions to it.
func (p *Plan) Keyring(name string, permissions uint32) {
	p.add(stepKeyring, "session keyring", []int64{int64(permissions)}, nil, name)
}

// Rlimit sets a resource limit.
func (p *Plan) Rlimit(name string, resource int, soft, hard uint64) {
	p.add(stepRlimit, "process.rlimits: "+name, []int64{int64(resource), int64(soft), int64(hard)}, nil)
}

// Root takes the root file system path into a new mount namespace, and from now on
// the host's mounts can only be bound. Propagation is given to all that comes from the
// host, with MS_REC to what is mounted below it too, and own to the root itself. The
// process is the launcher's, and has a procfs.
func (p *Plan) Root(l *Launcher, path string, propagation, own int) {
	p.add(stepRoot, "root file system "+path, []int64{int64(propagation), int64(own), p.file(l.mounts), p.file(l.empty)}, nil, path)
}

// Mount mounts a new file system. Attributes are MOUNT_ATTR_*.
func (p *Plan) Mount(kind, source, target string, attributes uint64, options int, parameters ...string) {
	says := fmt.Sprintf("mount %s at /%s", kind, target)
	p.add(stepMount, says, []int64{int64(attributes), int64(options)}, nil, append([]string{kind, source, target}, parameters...)...)
}

// Attributes of a bind mount, MOUNT_ATTR_*.
type Attributes struct {
	Set, Clear uint64 // of the mount itself
	// Default are cleared too, unless the kernel refuses that.
	Default        uint64
	AllSet, AllClr uint64 // of all that is mounted below it as well
}

// Bind mounts a file or directory of the host.
func (p *Plan) Bind(source, target string, recursive bool, a Attributes, options int) {
	p.add(stepBind, fmt.Sprintf("mount %s at /%s", source, target), []int64{
		number(recursive), int64(a.Set), int64(a.Clear), int64(a.Default), int64(a.AllSet), int64(a.AllClr), int64(options),
	}, nil, source, target)
}

func number(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// Propagate sets the propagation (MS_SHARED and the like) of what was mounted last.
func (p *Plan) Propagate(propagation int) {
	p.add(stepPropagate, "propagation of a mount", []int64{int64(propagation &^ unix.MS_REC), number(propagation&unix.MS_REC != 0)}, nil)
}

// Node makes a device node, or a FIFO, unless something is there.
func (p *Plan) Node(path string, mode uint32, major, minor int64, uid, gid uint32) {
	p.add(stepNode, "device /"+path, []int64{int64(mode), major, minor, int64(uid), int64(gid)}, nil, path)
}

// Symlink makes a symbolic link, unless something is there that is not to be
// replaced.
func (p *Plan) Symlink(target, path string, replace bool) {
	p.add(stepSymlink, "symbolic link /"+path, []int64{number(replace)}, nil, target, path)
}

// Pivot makes the root file system the root, and lets go of the old one.
func (p *Plan) Pivot(propagation int) {
	p.add(stepPivot, "change of root", []int64{int64(propagation)}, nil)
}

// Stdnull gives a process whose stdio is the host's /dev/null its own.
func (p *Plan) Stdnull() { p.add(stepStdnull, "/dev/null", nil, nil) }

// Console makes a terminal the stdio, and sends its master. mount says that it is
// to be /dev/console too.
func (p *Plan) Console(rows, columns uint16, mount bool) {
	p.add(stepConsole, "terminal", []int64{int64(rows), int64(columns), number(mount)}, nil)
}

// Readonly makes the mount at path read-only.
func (p *Plan) Readonly(path string) {
	p.add(stepReadonly, "read-only /"+path, nil, nil, path)
}

// ReadonlyPath makes path read-only, if it is there.
func (p *Plan) ReadonlyPath(path string) {
	p.add(stepReadonlyPath, "linux.readonlyPaths: /"+path, nil, nil, path)
}

// Mask hides path, if it is there.
func (p *Plan) Mask(path string) {
	p.add(stepMask, "linux.maskedPaths: /"+path, nil, nil, path)
}

// Hostname sets the name in the UTS namespace.
func (p *Plan) Hostname(name string) { p.add(stepHostname, "hostname "+name, nil, nil, name) }

// Domainname sets the NIS domain name in the UTS namespace.
func (p *Plan) Domainname(name string) { p.add(stepDomainname, "domainname "+name, nil, nil, name) }

// Sysctl writes to a file below /proc/sys, whose path is given.
func (p *Plan) Sysctl(path, value string) {
	p.add(stepSysctl, fmt.Sprintf("sysctl %s = %q", path, value), nil, nil, "sys/"+path, value)
}

// Mkdir makes a directory with all above it.
func (p *Plan) Mkdir(path string) { p.add(stepMkdir, "directory /"+path, nil, nil, path) }

// AppArmor has the program be confined by a profile. It comes behind Procfs.
func (p *Plan) AppArmor(profile string) {
	p.add(stepAppArmor, "process.apparmorProfile: "+profile, nil, nil, profile)
}

// Procfs makes what FIFO and AppArmor need, while the process may.
func (p *Plan) Procfs() { p.add(stepProcfs, "procfs", nil, nil) }

// NoNewPrivileges sets no_new_privs.
func (p *Plan) NoNewPrivileges() { p.add(stepNoNewPrivileges, "no_new_privs", nil, nil) }

// Umask sets the umask.
func (p *Plan) Umask(mask uint32) { p.add(stepUmask, "umask", []int64{int64(mask)}, nil) }

// Sync sends an event and waits for Process.Continue.
func (p *Plan) Sync(e Event) { p.add(stepSync, "keeper", []int64{int64(e)}, nil) }

// Capabilities are sets of capabilities, a bit for each.
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

// User becomes the user, in a working directory. Without capabilities the kernel's
// rules decide which it has.
func (p *Plan) User(uid, gid uint32, groups []uint32, c *Capabilities, directory string) {
	args := []int64{int64(uid), int64(gid), number(c != nil)}
	if c != nil {
		for _, set := range []uint64{c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient} {
			args = append(args, int64(set))
		}
	}
	var data []byte
	for _, g := range groups {
		data = binary.NativeEndian.AppendUint32(data, g)
	}
	p.add(stepUser, fmt.Sprintf("user %d:%d, working directory %q", uid, gid, directory), args, data, directory)
}

// Environment sets the variables, and HOME of the user if it is not among them.
func (p *Plan) Environment(uid uint32, variables []string) {
	p.add(stepEnvironment, "environment", []int64{int64(uid)}, nil, variables...)
}

// Arguments sets the arguments and finds the program, the first of them.
func (p *Plan) Arguments(args []string) {
	p.add(stepArguments, fmt.Sprintf("exec: %q", args[0]), nil, nil, args...)
}

// Seccomp installs a filter: instructions as the kernel has them.
func (p *Plan) Seccomp(flags uint, filter []byte) {
	p.add(stepSeccomp, "seccomp filter", []int64{int64(flags)}, filter)
}

// FIFO closes the connection, and waits until somebody opens the other end of
// the FIFO that the process was started with.
func (p *Plan) FIFO() { p.add(stepFIFO, "exec fifo", nil, nil) }

// Execute executes the program, the end of every plan. If the connection is
// still there it is closed by that.
func (p *Plan) Execute() { p.add(stepExecute, "exec", nil, nil) }
