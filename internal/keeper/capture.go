package keeper

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ExecOutput is Exec with stdout and stderr returned instead of passed on. Of
// each, the first limit bytes are kept and the rest is read and thrown away. It
// returns when the process has ended; what its children write later is lost.
func (c *Client) ExecOutput(ctx context.Context, r ExecRequest, limit int) (stdout, stderr []byte, res ExecResult, err error) {
	out, err := newCapture(limit)
	if err != nil {
		return nil, nil, ExecResult{}, err
	}
	defer out.close()
	errs, err := newCapture(limit)
	if err != nil {
		return nil, nil, ExecResult{}, err
	}
	defer errs.close()
	r.Stdout, r.Stderr = out.w, errs.w
	res, err = c.Exec(ctx, r)
	return out.finish(), errs.finish(), res, err
}

// capture reads a pipe into memory.
type capture struct {
	r, w  *os.File
	limit int
	data  []byte
	done  chan struct{} // closed when the reading goroutine has ended
}

func newCapture(limit int) (*capture, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe", err)
	}
	// The reader's end alone does not block: the process gets the other one.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, os.NewSyscallError("fcntl", err)
	}
	c := &capture{
		r: os.NewFile(uintptr(fds[0]), "pipe"), w: os.NewFile(uintptr(fds[1]), "pipe"),
		limit: limit, done: make(chan struct{}),
	}
	go c.read()
	return c, nil
}

func (c *capture) read() {
	defer close(c.done)
	buf := make([]byte, 16<<10)
	for {
		n, err := c.r.Read(buf)
		c.data = append(c.data, buf[:min(n, c.limit-len(c.data))]...)
		if err != nil {
			return
		}
	}
}

// maxRest bounds what finish reads from a pipe that others go on filling.
const maxRest = 1 << 20

// finish returns what was written until now. All of it is in the pipe, also when
// a child of the process has the pipe open still.
func (c *capture) finish() []byte {
	c.w.Close()
	c.r.SetReadDeadline(time.Unix(1, 0))
	<-c.done
	rc, err := c.r.SyscallConn()
	if err != nil {
		return c.data
	}
	rc.Control(func(fd uintptr) {
		buf := make([]byte, 16<<10)
		for rest := 0; rest < maxRest; {
			n, err := unix.Read(int(fd), buf)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || n == 0 {
				return
			}
			rest += n
			c.data = append(c.data, buf[:min(n, c.limit-len(c.data))]...)
		}
	})
	return c.data
}

func (c *capture) close() {
	c.w.Close()
	c.r.Close()
	<-c.done
}
