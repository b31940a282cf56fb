package logs

import (
	"errors"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OpenFIFO opens the reading end of the FIFO at path, without waiting for a
// writer.
func OpenFIFO(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// control calls fn with the file's descriptor, and leaves its mode alone.
func control(f *os.File, fn func(fd int) error) error {
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

// waiting returns how many bytes are in the FIFO.
func waiting(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCINQ) }

// marker is the access time a FIFO has while batch seq is not consumed. It is
// long past, so that reading replaces it under relatime too.
func marker(seq uint64) unix.Timespec { return unix.Timespec{Sec: int64(seq%1e9) + 1} }

// mark sets the FIFO's access time to the marker of seq.
func mark(fd int, seq uint64) error {
	times := [2]unix.Timespec{marker(seq), {Nsec: unix.UTIME_OMIT}}
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("utimensat", errno)
	}
	return nil
}

// marked tells whether the FIFO has not been read since mark.
func marked(fd int, seq uint64) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	return st.Atim == marker(seq), nil
}

// consume takes n bytes out of the FIFO in one call, which is done or not done
// when the process is killed, and returns how many there were. It overwrites
// buf, which must be in memory: a page fault could end a dying process's read
// halfway.
func consume(fd int, n int, buf []byte) (int, error) {
	piece := buf[:min(len(buf), consumePiece)]
	var vec []unix.Iovec
	for rest := n; rest > 0; rest -= len(piece) {
		v := unix.Iovec{Base: &piece[0]}
		v.SetLen(min(rest, len(piece)))
		vec = append(vec, v)
	}
	for {
		got, _, errno := unix.Syscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(vec))), uintptr(len(vec)))
		switch errno {
		case 0:
			return int(got), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, nil
		default:
			return 0, os.NewSyscallError("readv", errno)
		}
	}
}

// consumePiece is how much memory consume overwrites at most, small enough to
// stay in the processor's cache.
const consumePiece = 32 << 10

// scratch is what one batch needs: a pipe to look at the FIFO's content without
// taking it, and memory.
type scratch struct {
	r, w int
	raw  []byte
	out  []byte
}

const (
	maxBatch = 256 << 10    // bytes of output in a batch
	maxOut   = 2 * maxBatch // bytes of log a batch can become
	fifoMax  = 1 << 20      // capacity of a busy FIFO
	fifoGrow = 32 << 10     // a batch of so much, half of what a FIFO holds at first, makes it a busy one
)

func newScratch() (*scratch, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe", err)
	}
	s := &scratch{r: fds[0], w: fds[1], raw: make([]byte, maxBatch), out: make([]byte, 0, maxOut)}
	// Without it batches are smaller.
	unix.FcntlInt(uintptr(s.w), unix.F_SETPIPE_SZ, fifoMax)
	return s, nil
}

func (s *scratch) close() {
	unix.Close(s.r)
	unix.Close(s.w)
}

var errEmpty = errors.New("fifo is empty")

// peek returns up to n bytes from the FIFO's head, which stay in it. Without any
// the error is errEmpty, and io.EOF is nil bytes and no error: nobody can write
// any more.
func (s *scratch) peek(fd int, n int) ([]byte, error) {
	n = min(n, len(s.raw))
	var teed int64
	for {
		var err error
		teed, err = unix.Tee(fd, s.w, n, unix.SPLICE_F_NONBLOCK)
		if err == nil {
			break
		}
		if errors.Is(err, unix.EAGAIN) {
			return nil, errEmpty
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, os.NewSyscallError("tee", err)
		}
	}
	for got := 0; got < int(teed); {
		m, err := unix.Read(s.r, s.raw[got:teed])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("read", err)
		}
		got += m
	}
	return s.raw[:teed], nil
}

// pool lends scratches. There are as many as are in use; only a few are kept.
type pool struct{ free chan *scratch }

// newPool makes those that are kept at once: their memory is not there before it is
// used, and the number of open files does not depend on what was busy when.
func newPool(keep int) (*pool, error) {
	p := &pool{make(chan *scratch, keep)}
	for range keep {
		s, err := newScratch()
		if err != nil {
			return nil, err
		}
		p.put(s)
	}
	return p, nil
}

func (p *pool) get() (*scratch, error) {
	select {
	case s := <-p.free:
		return s, nil
	default:
		return newScratch()
	}
}

func (p *pool) put(s *scratch) {
	select {
	case p.free <- s:
	default:
		s.close()
	}
}

// marksWork probes whether reading a FIFO in dir changes its access time, which
// a file system mounted noatime does not do.
func marksWork(dir string) (bool, error) {
	path := dir + "/.probe-" + time.Now().Format("150405.000000000")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return false, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	defer os.Remove(path)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return false, os.NewSyscallError("write", err)
	}
	if err := mark(fd, 1); err != nil {
		return false, err
	}
	before, err := marked(fd, 1)
	if err != nil {
		return false, err
	}
	if _, err := consume(fd, 1, make([]byte, 1)); err != nil {
		return false, err
	}
	after, err := marked(fd, 1)
	return before && !after, err
}
