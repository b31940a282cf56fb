// Package console receives the masters of terminals that OCI runtimes make. A
// runtime opens the pty inside the container and sends its master over a unix
// socket: one message, one descriptor.
package console

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Pair is a connected pair of sockets: the master is sent to Child.
type Pair struct {
	Child  *os.File
	parent int
}

// NewPair returns a pair. Both ends are close-on-exec.
func NewPair() (*Pair, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return &Pair{Child: os.NewFile(uintptr(fds[0]), "console-socket"), parent: fds[1]}, nil
}

// Receive returns the master that was sent. It does not wait for one.
func (p *Pair) Receive() (*os.File, error) { return Receive(p.parent) }

// Close closes both ends.
func (p *Pair) Close() {
	p.Child.Close()
	unix.Close(p.parent)
}

// Receive takes a terminal's master from the message that is waiting at a
// connected socket.
func Receive(socket int) (*os.File, error) {
	name, oob := make([]byte, 256), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := unix.Recvmsg(socket, name, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	fds, err := descriptors(oob[:oobn])
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	if len(fds) != 1 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("receive console: %d descriptors instead of one", len(fds))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("receive console: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), string(name[:n])), nil
}

func descriptors(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, errors.New("no descriptor")
	}
	return unix.ParseUnixRights(&messages[0])
}
