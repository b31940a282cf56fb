package host

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Children names children of this process to PeekExit.
type Children struct {
	idType, id int
}

// AnyChild is all of them.
func AnyChild() Children { return Children{unix.P_ALL, 0} }

// Child is the one with the pid.
func Child(pid int) Children { return Children{unix.P_PID, pid} }

// Child is the handle's process, as a child of this process.
func (h *Pidfd) Child() Children { return Children{unix.P_PIDFD, h.Fd()} }

// childInfo is the part of siginfo_t that tells of a child, from its beginning.
type childInfo struct {
	_      [2]int32
	code   int32
	_      int32
	pid    int32
	_      uint32
	status int32
	_      [100]byte
}

// The kernel writes a whole siginfo_t.
var _ = [unsafe.Sizeof(unix.Siginfo{}) - unsafe.Sizeof(childInfo{})]byte{}

// cldExited and the others are the values of childInfo.code.
const (
	cldExited = 1
	cldDumped = 3
)

// PeekExit returns a child that has exited, and how, without reaping it: the
// status is still there when this process is killed before it has made a note.
// pid is 0 when none of them has exited; the error is ECHILD when there is no
// such child.
func PeekExit(c Children) (pid int, status unix.WaitStatus, err error) {
	var info childInfo
	for {
		err = unix.Waitid(c.idType, c.id, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil || info.pid == 0 {
		return 0, 0, err
	}
	switch info.code {
	case cldExited:
		status = unix.WaitStatus(info.status&0xff) << 8
	case cldDumped:
		status = unix.WaitStatus(info.status&0x7f) | 0x80
	default:
		status = unix.WaitStatus(info.status & 0x7f)
	}
	return int(info.pid), status, nil
}

// Reap removes a child that has exited. It is no error if it is not there, or is
// not a child.
func Reap(c Children) error {
	for {
		err := unix.Waitid(c.idType, c.id, nil, unix.WEXITED|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil, errors.Is(err, unix.ECHILD):
			return nil
		default:
			return os.NewSyscallError("waitid", err)
		}
	}
}

// File returns the handle's file, which stays the handle's. Whoever holds a
// duplicate of it can make a handle of it with PidfdOf, also when the process is
// gone by then.
func (h *Pidfd) File() *os.File { return h.f }

// PidfdOf makes a handle of a pidfd, which it takes.
func PidfdOf(f *os.File) *Pidfd { return &Pidfd{f} }

// ZombieStatus returns how the process exited if it has not been reaped yet, to
// those too who are not its parent. It needs the right to trace the process.
func (p Process) ZombieStatus() (unix.WaitStatus, bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(p.Pid) + "/stat")
	if err != nil || p.Boot != BootID() {
		return 0, false
	}
	start, err := startTime(stat)
	if err != nil || start != p.Start {
		return 0, false
	}
	// Behind the name: the state is field 3, the exit code field 52.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 50 || fields[0][0] != 'Z' {
		return 0, false
	}
	code, err := strconv.ParseUint(string(fields[49]), 10, 32)
	return unix.WaitStatus(code), err == nil
}
