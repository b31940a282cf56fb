package host

import (
	"errors"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hangup watches a connection whose owner may not read from it for a long time.
type Hangup struct {
	file *os.File // of a descriptor of its own for the same socket
	once sync.Once
}

// WatchHangup calls fn, from a goroutine of its own, when the other side of a
// socket has closed the connection, has gone, or has ended its sending half,
// whether or not what it sent was read. fn is not called after Close.
func WatchHangup(conn syscall.Conn, fn func()) (*Hangup, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	cerr := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, err
	}
	h := &Hangup{file: os.NewFile(uintptr(dup), "socket")}
	watch, err := h.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	go func() {
		// Returns when the poller has seen something new that ends the wait, or
		// with an error when h is closed.
		if watch.Read(hungUp) == nil {
			fn()
		}
	}()
	return h, nil
}

func hungUp(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}

// Close ends the watch. The connection is only closed when this is too.
func (h *Hangup) Close() (err error) {
	h.once.Do(func() { err = h.file.Close() })
	return err
}
