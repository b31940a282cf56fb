// Package link is what the two processes of a keeper say to each other. The
// worker tells the supervisor, over a socket that keeps messages whole, which
// files to hold and which processes to watch for it; the supervisor gives every
// new worker the files back.
//
// Messages are in the kernel's hands once Send returns: what a worker said before
// it was killed is heard.
package link

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// Op says what a Message means.
type Op string

// From the worker to the supervisor.
const (
	// Hold: keep the attached file under ID and Name, and hand it to the next
	// worker, since what is in it would be gone if nobody had it.
	Hold Op = "hold"
	// Release: close the file of ID called Name, or all of ID's if Name is empty.
	Release Op = "release"
	// Watch: if Process becomes yours and exits, write how to Path, unless its
	// directory is gone. With Kill, it is of no use without this worker.
	Watch Op = "watch"
	// Forget: Process need not be watched any more.
	Forget Op = "forget"
	// Serving: the worker has taken everything over and answers calls.
	Serving Op = "serving"
	// Quit: nothing is left to keep. End when the worker has.
	Quit Op = "quit"
)

// From the supervisor to a new worker: Hold for every file, and then
const (
	// Begin: these were all. Process is the supervisor itself.
	Begin Op = "begin"
)

// Message is one message. The fields that Op does not need are empty.
type Message struct {
	Op      Op           `json:"op"`
	ID      string       `json:"id,omitempty"`
	Name    string       `json:"name,omitempty"`
	Process host.Process `json:"process,omitzero"`
	Path    string       `json:"path,omitempty"`
	Kill    bool         `json:"kill,omitempty"`
}

// maxMessage bounds one message, in bytes.
const maxMessage = 16 << 10

// Conn is one end of the link. Send may be called from several goroutines.
type Conn struct {
	conn *net.UnixConn
	raw  syscall.RawConn
}

// Pair returns the two ends of a new link; the second one is for a new process.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "link")
	ours, err := New(os.NewFile(uintptr(fds[0]), "link"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// New makes a Conn of the socket f, which it takes.
func New(f *os.File) (*Conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("link: not a unix socket")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("link: %w", err)
	}
	return &Conn{conn, raw}, nil
}

// Close closes this end.
func (c *Conn) Close() error { return c.conn.Close() }

// Send sends m with at most one file, which stays the caller's.
func (c *Conn) Send(m Message, file *os.File) error {
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("send %s: %w", m.Op, err)
	}
	if len(data) > maxMessage {
		return fmt.Errorf("send %s: %w", m.Op, unix.EMSGSIZE)
	}
	if file == nil {
		_, err = c.conn.Write(data)
	} else {
		err = withFD(file, func(fd int) error {
			_, _, err := c.conn.WriteMsgUnix(data, unix.UnixRights(fd), nil)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("send %s: %w", m.Op, err)
	}
	return nil
}

// withFD calls fn with f's descriptor and does not change its mode, as Fd would.
func withFD(f *os.File, fn func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// Recv waits for a message. The file, if one came, is the caller's. The error is
// io.EOF when the other end is closed.
func (c *Conn) Recv() (m Message, file *os.File, err error) {
	rerr := c.raw.Read(func(fd uintptr) bool {
		m, file, err = receive(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if rerr != nil {
		err = rerr
	}
	return m, file, err
}

// TryRecv is Recv that does not wait: ok is false when no message is there.
func (c *Conn) TryRecv() (m Message, file *os.File, ok bool, err error) {
	cerr := c.raw.Control(func(fd uintptr) { m, file, err = receive(int(fd)) })
	if cerr != nil {
		err = cerr
	}
	if errors.Is(err, unix.EAGAIN) {
		return m, nil, false, nil
	}
	return m, file, err == nil, err
}

// Wait calls fn now and whenever messages may have come, until fn returns true or
// the link is closed on this side.
func (c *Conn) Wait(fn func() bool) error {
	return c.raw.Read(func(uintptr) bool { return fn() })
}

func receive(fd int) (Message, *os.File, error) {
	buf := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	for errors.Is(err, unix.EINTR) {
		n, oobn, _, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	}
	if errors.Is(err, unix.ECONNRESET) || err == nil && n == 0 {
		return Message{}, nil, io.EOF
	}
	if err != nil {
		return Message{}, nil, err
	}
	file, err := attached(oob[:oobn])
	if err != nil {
		return Message{}, nil, fmt.Errorf("link: %w", err)
	}
	var m Message
	if err := json.Unmarshal(buf[:n], &m); err != nil {
		if file != nil {
			file.Close()
		}
		return Message{}, nil, fmt.Errorf("link: %w", err)
	}
	return m, file, nil
}

func attached(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) == 0 {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "held"), nil
}
