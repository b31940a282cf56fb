// Package launch makes processes that become a container's: it starts the
// program cmd/sampan-launch, gives it a plan, and talks with it until it has
// executed the user's program. Which steps a plan has is the caller's.
//
// The program is in the keeper, and executed from memory that nobody can write
// to any more, not even a container that has its file open (CVE-2019-5736).
package launch

import (
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

//go:embed files
var files embed.FS

// Launcher starts processes. Its methods may be called at once.
type Launcher struct {
	program int // the sealed program, for reading
	null    int // /dev/null
	pids    int // this process' own PID namespace
	mounts  int // its mount namespace
	empty   int // a mount namespace in which there is nothing
}

// emptyDir is the one directory there is in a container's mount namespace before its
// root file system, as in cmd/sampan-launch/plan.h.
const emptyDir = "root"

// minProgram is the least descriptor the program may have, so that none of a
// process' own gets its number.
const minProgram = 64

// New returns a launcher that is kept as long as the process. The error is
// ErrNotImplemented if the kernel is too old for it (Linux 5.12) or refuses to
// execute it, if this process is root in a user namespace only, or if this binary
// was built without the program.
func New() (*Launcher, error) {
	program, err := files.ReadFile("files/launch")
	if err != nil {
		return nil, fmt.Errorf("sampan-launch: this binary was built without it, build with `make`: %w", errdefs.ErrNotImplemented)
	}
	if err := probe(); err != nil {
		return nil, fmt.Errorf("sampan-launch: %w: %w", err, errdefs.ErrNotImplemented)
	}
	l := &Launcher{}
	if l.program, err = seal(program); err != nil {
		return nil, fmt.Errorf("sampan-launch: %w: %w", err, errdefs.ErrNotImplemented)
	}
	if l.null, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	if l.pids, err = unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open PID namespace: %w", err)
	}
	if l.mounts, err = unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open mount namespace: %w", err)
	}
	if l.empty, err = host.EmptyMounts(emptyDir); err != nil {
		return nil, fmt.Errorf("sampan-launch: %w: %w", err, errdefs.ErrNotImplemented)
	}
	if err := l.try(); err != nil {
		return nil, fmt.Errorf("sampan-launch: %w: %w", err, errdefs.ErrNotImplemented)
	}
	return l, nil
}

// try executes the program, which some security modules refuse for what is in
// memory only. It has nothing to do, and says so.
func (l *Launcher) try() error {
	p, err := l.Start(&Plan{}, Options{})
	if err != nil {
		return err
	}
	defer p.Close()
	_, _, err = p.Next()
	_, reaped := p.Reap()
	var step *StepError
	if !errors.As(err, &step) {
		return errors.Join(fmt.Errorf("it does not run: %w", err), reaped)
	}
	return reaped
}

// probe tries what steps rely on.
func probe() error {
	mapping, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return err
	}
	var inside, outside, count uint64
	if _, err := fmt.Sscan(string(mapping), &inside, &outside, &count); err != nil || inside != 0 || outside != 0 || count != 1<<32-1 {
		return errors.New("not in the first user namespace")
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return os.NewSyscallError("openat2", err)
	}
	defer unix.Close(fd)
	// Of the calls that steps make this is the youngest.
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{}); errors.Is(err, unix.ENOSYS) {
		return os.NewSyscallError("mount_setattr", err)
	}
	return nil
}

// seal returns a descriptor of a file in memory with the program, which is as it
// is forever.
func seal(program []byte) (int, error) {
	const name = "sampan-launch"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	writable := os.NewFile(uintptr(fd), name)
	defer writable.Close()
	if _, err := writable.Write(program); err != nil {
		return -1, err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(writable.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return -1, os.NewSyscallError("seal", err)
	}
	// What is open for writing cannot be executed.
	readable, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("open", err)
	}
	defer unix.Close(readable)
	sealed, err := unix.FcntlInt(uintptr(readable), unix.F_DUPFD_CLOEXEC, minProgram)
	if err != nil {
		return -1, os.NewSyscallError("dup", err)
	}
	return sealed, nil
}

// Options of Start.
type Options struct {
	Stdin, Stdout, Stderr *os.File // nil means /dev/null
	Flags                 uintptr  // CLONE_NEW*, of namespaces the process is born in
	FIFO                  *os.File // for the step of that name
	Cgroup                *os.File // of cgroup v2, to be born in
	PIDs                  *os.File // a handle of a process or namespace, whose PID namespace to be born in
}

// Process is a process that carries out a plan: a child of this one.
type Process struct {
	Pid int

	plan    *Plan
	pidfd   int
	control int
}

// Event is what a process tells.
type Event uint32

// The events, as in cmd/sampan-launch/plan.h.
const (
	Ready    Event = iota + 1 // all but what cannot be undone is done
	Terminal                  // the master of a terminal comes with it
	failed
)

// Start starts a process. Close has to be called when it is not watched any more.
func (l *Launcher) Start(p *Plan, o Options) (*Process, error) {
	plan, err := inMemory(p.encoded)
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	defer unix.Close(plan)
	control, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("launch: socket: %w", err)
	}
	defer unix.Close(control[1])
	process := &Process{plan: p, control: control[0], pidfd: -1}
	attr := &syscall.ProcAttr{
		Files: append(l.stdio(o), uintptr(control[1]), uintptr(plan), l.orNull(o.FIFO)),
		Sys:   &syscall.SysProcAttr{Cloneflags: o.Flags, PidFD: &process.pidfd},
	}
	for _, fd := range p.files {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	// Last, so that no descriptor is moved to its number before it is executed.
	attr.Files = append(attr.Files, uintptr(l.program))
	if o.Cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(o.Cgroup.Fd())
	}
	start := func() (err error) {
		process.Pid, err = syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(l.program), []string{"sampan-launch"}, attr)
		return err
	}
	if o.PIDs != nil {
		err = l.within(int(o.PIDs.Fd()), start)
	} else {
		err = start()
	}
	runtime.KeepAlive(o)
	if err != nil {
		process.Close()
		return nil, fmt.Errorf("launch: start: %w", err)
	}
	return process, nil
}

func (l *Launcher) stdio(o Options) []uintptr {
	return append(make([]uintptr, 0, 16), l.orNull(o.Stdin), l.orNull(o.Stdout), l.orNull(o.Stderr))
}

func (l *Launcher) orNull(f *os.File) uintptr {
	if f == nil {
		return uintptr(l.null)
	}
	return f.Fd()
}

// inMemory returns a descriptor of a file with the data.
func inMemory(data []byte) (int, error) {
	fd, err := unix.MemfdCreate("plan", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil && !errors.Is(err, unix.EINTR) {
			unix.Close(fd)
			return -1, os.NewSyscallError("write", err)
		}
		data = data[max(n, 0):]
	}
	return fd, nil
}

// within has children that start makes be born in a PID namespace.
func (l *Launcher) within(pids int, start func() error) error {
	var err error
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread()
		if err = unix.Setns(pids, unix.CLONE_NEWPID); err != nil {
			err = fmt.Errorf("join PID namespace: %w", err)
			runtime.UnlockOSThread()
			return
		}
		err = start()
		if unix.Setns(l.pids, unix.CLONE_NEWPID) == nil {
			runtime.UnlockOSThread()
		} // otherwise the thread ends with the goroutine
	})
	thread.Wait()
	return err
}

// StepError is a step that has failed.
type StepError struct {
	Step string // what it was to do
	Call string // what failed in it: a system call, or the kernel's words
	Err  unix.Errno
}

func (e *StepError) Error() string {
	if e.Err == unix.ENOENT && e.Call == "$PATH" {
		return e.Step + ": executable file not found in $PATH"
	}
	return e.Step + ": " + e.Call + ": " + e.Err.Error()
}

// Unwrap returns the errno.
func (e *StepError) Unwrap() error { return e.Err }

// messageSize is that of struct message in cmd/sampan-launch/plan.h.
const messageSize = 128

// Next waits for the next event. The file is the terminal's master. The error is
// io.EOF if there is none to come: the process has closed the connection, on its
// way to the user's program, or it is dead; and a *StepError if a step has failed.
func (p *Process) Next() (Event, *os.File, error) {
	var buf [messageSize]byte
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	var err error
	for {
		n, oobn, _, _, err = unix.Recvmsg(p.control, buf[:], oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.ECONNRESET), err == nil && n == 0:
		return 0, nil, io.EOF
	case err != nil:
		return 0, nil, os.NewSyscallError("recvmsg", err)
	case n != messageSize:
		return 0, nil, fmt.Errorf("launch: a message of %d bytes: %w", n, errdefs.ErrDataLoss)
	}
	var file *os.File
	if oobn > 0 {
		if file, err = received(oob[:oobn]); err != nil {
			return 0, nil, err
		}
	}
	event := Event(binary.NativeEndian.Uint32(buf[0:]))
	if event != failed {
		return event, file, nil
	}
	e := &StepError{Err: unix.Errno(binary.NativeEndian.Uint32(buf[8:])), Call: unix.ByteSliceToString(buf[12:]), Step: "start"}
	if step := int(binary.NativeEndian.Uint32(buf[4:])); step < len(p.plan.says) {
		e.Step = p.plan.says[step]
	}
	return 0, nil, e
}

func received(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("launch: receive descriptor: %w", errors.Join(err, errdefs.ErrDataLoss))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("launch: receive descriptor: %w", errors.Join(err, errdefs.ErrDataLoss))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("launch: receive descriptor: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "/dev/pts/ptmx"), nil
}

// Continue lets a process go on that waits in Sync.
func (p *Process) Continue() error {
	_, err := unix.Write(p.control, []byte{1})
	return os.NewSyscallError("write", err)
}

// Kill kills the process, which stays to be reaped.
func (p *Process) Kill() {
	// It is a child that has not been reaped, so the handle is its.
	_ = unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
}

// Reap waits for the end of the process, and returns how it ended.
func (p *Process) Reap() (unix.WaitStatus, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(p.Pid, &status, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return status, os.NewSyscallError("wait4", err)
		}
	}
}

// Close lets go of the process. One that has not come to the user's program ends.
func (p *Process) Close() {
	unix.Close(p.control)
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
	}
}
