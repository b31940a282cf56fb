package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process identifies a process for as long as the machine exists: a pid alone
// is reused by the kernel, a pid with its start time and boot is not.
type Process struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
	Boot  string `json:"boot"`
}

// Identify returns the identity of the process that has pid now. The error is
// ErrNotFound when there is none. A zombie still has an identity.
func Identify(pid int) (Process, error) {
	data, err := readNow("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Process{}, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	start, err := startTime(data)
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return Process{Pid: pid, Start: start, Boot: BootID()}, nil
}

// startTime takes field 22 from the content of /proc/PID/stat. Field 2, the
// name, may hold spaces and parentheses, so counting starts behind it.
func startTime(stat []byte) (uint64, error) {
	_, rest, ok := bytes.Cut(stat[max(0, bytes.LastIndexByte(stat, ')')):], []byte(" "))
	fields := bytes.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, errors.New("stat has too few fields")
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// Parent returns the parent of a process.
func Parent(pid int) (int, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(fields[1]))
}

// ProcessState returns the letter that the kernel gives the state of a process,
// e.g. 'T' if it is stopped.
func ProcessState(pid int) (byte, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	return fields[0][0], nil
}

// statFields returns what /proc says of a process behind its name, which may hold
// anything.
func statFields(pid int) ([][]byte, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return nil, fmt.Errorf("process %d: /proc/%d/stat is cut short", pid, pid)
	}
	return fields, nil
}

// Open returns a handle of the process. The error is ErrNotFound if it is gone,
// also when another process has its pid by now.
func (p Process) Open() (*Pidfd, error) {
	if p.Boot != BootID() {
		return nil, fmt.Errorf("process %d of an earlier boot: %w", p.Pid, errdefs.ErrNotFound)
	}
	fd, err := unix.PidfdOpen(p.Pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", p.Pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", p.Pid, err)
	}
	// The handle pins whoever has the pid now: look who that is afterwards.
	now, err := Identify(p.Pid)
	if err != nil || now != p {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d: %w", p.Pid, errdefs.ErrNotFound)
	}
	return newPidfd(fd), nil
}

// Alive reports whether the process exists and has not exited.
func (p Process) Alive() bool {
	h, err := p.Open()
	if err != nil {
		return false
	}
	defer h.Close()
	return !h.Exited()
}

// Pidfd is a handle of one process. Its methods may be called from several
// goroutines; after Close they fail.
type Pidfd struct {
	f *os.File
}

func newPidfd(fd int) *Pidfd { return &Pidfd{f: os.NewFile(uintptr(fd), "pidfd")} }

// Signal sends sig. The error is ErrNotFound if the process has exited.
func (h *Pidfd) Signal(sig unix.Signal) error {
	var err error
	if cerr := h.control(func(fd int) { err = unix.PidfdSendSignal(fd, sig, nil, 0) }); cerr != nil {
		return cerr
	}
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process: %w", errdefs.ErrNotFound)
	}
	return err
}

// Wait returns nil when the process has exited, or the context's error. It
// does not reap.
func (h *Pidfd) Wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { h.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := h.f.SyscallConn()
	if err != nil {
		return err
	}
	err = rc.Read(exited)
	if err != nil && ctx.Err() != nil {
		// Let others wait on the same handle again.
		h.f.SetReadDeadline(time.Time{})
		return ctx.Err()
	}
	return err
}

// Exited reports whether the process has exited; it may still be a zombie.
func (h *Pidfd) Exited() bool {
	var gone bool
	if err := h.control(func(fd int) { gone = exited(uintptr(fd)) }); err != nil {
		return true
	}
	return gone
}

func exited(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1
}

// ExitStatus returns how the process exited, also to those who are not its
// parent and after it was reaped. It is false while the process lives and on
// kernels before 6.15.
func (h *Pidfd) ExitStatus() (unix.WaitStatus, bool) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	var err error
	if cerr := h.control(func(fd int) { err = unix.IoctlPidfdInfo(fd, &info) }); cerr != nil {
		return 0, false
	}
	if err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), true
}

// Fd returns the descriptor, which stays the handle's.
func (h *Pidfd) Fd() int {
	fd := -1
	h.control(func(n int) { fd = n })
	return fd
}

// Close releases the handle.
func (h *Pidfd) Close() error { return h.f.Close() }

func (h *Pidfd) control(fn func(fd int)) error {
	rc, err := h.f.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Control(func(fd uintptr) { fn(int(fd)) })
}
