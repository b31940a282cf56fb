package console

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Listener is a unix socket in the file system, for runtimes that are commands.
type Listener struct {
	path   string
	dir    *os.File
	socket int
}

// Listen makes the socket name in dir.
func Listen(dir, name string) (_ *Listener, err error) {
	l := &Listener{path: filepath.Join(dir, name), socket: -1}
	defer func() {
		if err != nil {
			l.Close()
			err = fmt.Errorf("console socket %s: %w", l.path, err)
		}
	}()
	if l.dir, err = os.Open(dir); err != nil {
		return nil, err
	}
	l.socket, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err = unix.Bind(l.socket, &unix.SockaddrUnix{Name: l.Path()}); err != nil {
		return nil, err
	}
	return l, unix.Listen(l.socket, 1)
}

// Path returns a path of the socket for other processes, until Close. It is
// short: a socket's address has room for no more than 107 bytes.
func (l *Listener) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), l.dir.Fd(), filepath.Base(l.path))
}

// Receive returns the master that was sent. It does not wait for one.
func (l *Listener) Receive() (*os.File, error) {
	conn, _, err := unix.Accept4(l.socket, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive console: the runtime sent none: %w", err)
	}
	defer unix.Close(conn)
	return Receive(conn)
}

// Close closes and removes the socket.
func (l *Listener) Close() error {
	if l.socket >= 0 {
		unix.Close(l.socket)
	}
	if l.dir != nil {
		l.dir.Close()
	}
	if err := os.Remove(l.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
