// Package logs moves a container's output from FIFOs into its CRI log file, each
// byte exactly once, whenever the process that does it is killed.
//
// # The protocol
//
// Output is moved in batches. The FIFO's content is looked at with tee(2), which
// takes nothing out. Then, one batch of a container at a time:
//
//  1. The FIFO's access time is set to a value that stands for this batch.
//  2. The journal says: batch number, file and offset it goes to, length, time.
//  3. The encoded lines are written at the offset.
//  4. One read(2) takes the batch out of the FIFO, and by that sets its access
//     time to now.
//
// Steps 1, 2 and 4 are done or not done when the process is killed; step 3 can be
// cut off anywhere. Whoever opens the log next finds the batch of the journal
// either consumed, because the FIFO's access time is not that of the batch: all
// is done. Or not consumed: then the same bytes are at the FIFO's head still, are
// encoded to the same lines and written to the same place, and consumed.
//
// A killed process thus means a pause. The FIFO itself must outlive it: somebody
// else holds a descriptor of it, and the container's side is open for reading and
// writing, so that writers wait and do not fail.
//
// The package reads no configuration, knows no container's state, and never
// removes or renames a file.
package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
)

// Writer makes Logs that share memory. It is safe for use by several goroutines.
type Writer struct {
	log  *slog.Logger
	pool *pool
	// marks tells whether access times work where the FIFOs are. If not, a
	// batch whose fate is unknown is compared with the FIFO's head.
	marks bool
}

// keepScratches is how many scratches stay allocated while nothing is to do.
const keepScratches = 2

// NewWriter returns a Writer for FIFOs in dir's file system.
func NewWriter(dir string, log *slog.Logger) (*Writer, error) {
	works, err := marksWork(dir)
	if err != nil {
		return nil, fmt.Errorf("probe access times in %s: %w", dir, err)
	}
	if !works {
		log.Warn("access times do not work here: a crash may repeat output that repeats itself", "dir", dir)
	}
	p, err := newPool(keepScratches)
	if err != nil {
		return nil, err
	}
	return &Writer{log: log, pool: p, marks: works}, nil
}

// Config describes the log of one container.
type Config struct {
	ID      string // of the container, for messages
	Path    string // of the log file; "" discards the output
	Journal string // path of the journal, made if absent
	// FIFOs are the reading ends for stdout and stderr; nil if there is none. They
	// stay the caller's and must be open until the Log is closed.
	FIFOs [streams]*os.File
	// Tap, if not nil, is called with all output as soon as it is there, also
	// with what waits to become a line, or for a disk that is full. It is called
	// for each stream from one goroutine, which waits meanwhile. The bytes are
	// valid during the call. What a killed process had shown may be shown again.
	Tap func(s Stream, output []byte)
}

// Log is the log of one container. Its methods may be called from several
// goroutines.
type Log struct {
	*Writer
	cfg Config

	mu         sync.Mutex // held for steps 1 to 4
	file       *os.File   // nil if output is discarded
	journal    journal
	seq        uint64
	open       [streams]bool // see entry
	complained bool          // that the log cannot be written has been said

	pumps     []*pump
	closeOnce sync.Once
}

// Open opens the log, finishes the batch that a killed process may have left, and
// begins to move output. If the log file of a container that has a journal already
// cannot be opened, its output waits until it can.
func (w *Writer) Open(cfg Config) (*Log, error) {
	l := &Log{Writer: w, cfg: cfg}
	var last entry
	var fresh bool
	var err error
	l.journal, last, fresh, err = openJournal(cfg.Journal)
	switch {
	case errors.Is(err, errJournal):
		w.log.Error("output may be lost or repeated", "container", cfg.ID, "err", err)
	case err != nil:
		return nil, fmt.Errorf("open log of container %s: %w", cfg.ID, err)
	}
	l.seq, l.open = last.seq, last.open
	if cfg.Path != "" {
		if l.file, err = openLogFile(cfg.Path); err != nil && fresh {
			l.journal.f.Close()
			return nil, fmt.Errorf("open log of container %s: %w", cfg.ID, err)
		}
	}
	if err := l.recover(last); err != nil {
		l.complainOnce(err)
	}
	for s, f := range cfg.FIFOs {
		if f != nil {
			l.pumps = append(l.pumps, newPump(l, Stream(s), f))
		}
	}
	for _, p := range l.pumps {
		go p.run()
	}
	return l, nil
}

// Reopen makes output go to the file at the log's path, which is made if absent.
// On error it goes where it went.
func (l *Log) Reopen() error {
	if l.cfg.Path == "" {
		return nil
	}
	f, err := openLogFile(l.cfg.Path)
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", l.cfg.ID, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
	}
	l.file = f
	return nil
}

func openLogFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o640)
}

// Drain moves all output that is in the FIFOs now and ends the last line. It is
// for a container that has exited; what still has the FIFOs open is not waited
// for. When ctx ends first, because the log cannot be written, moving goes on in
// the background until Close.
func (l *Log) Drain(ctx context.Context) error {
	for _, p := range l.pumps {
		p.drain()
	}
	for _, p := range l.pumps {
		select {
		case <-p.done:
		case <-ctx.Done():
			return fmt.Errorf("drain log of container %s: %w", l.cfg.ID, context.Cause(ctx))
		}
	}
	return nil
}

// closeTimeout bounds how long Close waits for a write that hangs.
const closeTimeout = time.Second

// Close stops moving output. What is in the FIFOs stays there.
func (l *Log) Close() { l.closeOnce.Do(l.close) }

func (l *Log) close() {
	for _, p := range l.pumps {
		p.cancel()
	}
	stopped := make(chan struct{})
	go func() {
		for _, p := range l.pumps {
			<-p.done
		}
		if l.file != nil {
			l.file.Close()
		}
		l.journal.f.Close()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(closeTimeout):
		l.log.Error("log does not close, a write to it hangs", "container", l.cfg.ID)
	}
}

// commit does steps 1 to 4 for a batch: out, made of the first e.length bytes of
// the FIFO. On error the FIFO and the log file are as they were, and the same
// batch, or a longer one, can be committed later.
func (l *Log) commit(fd int, e entry, out, buf []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cfg.Path == "" {
		return l.take(fd, e, buf)
	}
	if l.file == nil {
		f, err := openLogFile(l.cfg.Path)
		if err != nil {
			return err
		}
		l.file = f
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(l.file.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	e.dev, e.inode, e.offset = st.Dev, st.Ino, st.Size
	e.open = l.open
	e.open[e.stream] = endsOpen(out)
	if err := l.enter(fd, &e); err != nil {
		return err
	}
	fault.Point("log.journaled")
	if _, err := l.file.WriteAt(out, e.offset); err != nil {
		return errors.Join(err, l.file.Truncate(e.offset))
	}
	fault.Point("log.written")
	l.open = e.open
	l.complained = false
	return l.take(fd, e, buf)
}

// enter does steps 1 and 2.
func (l *Log) enter(fd int, e *entry) error {
	l.seq++
	e.seq = l.seq
	if e.length > 0 {
		if err := mark(fd, e.seq); err != nil {
			return err
		}
	}
	fault.Point("log.marked")
	return l.journal.write(e)
}

// take does step 4. The FIFO gives all at once unless somebody else reads from
// it, or has put it in packet mode: then it takes several rounds, each with an
// entry of its own.
func (l *Log) take(fd int, e entry, buf []byte) error {
	for e.length > 0 {
		n, err := consume(fd, e.length, buf)
		fault.Point("log.consumed")
		if err != nil || n == 0 || n == e.length {
			return err
		}
		e.length -= n
		e.bare = true
		if err := l.enter(fd, &e); err != nil {
			return err
		}
	}
	return nil
}

// recover finishes the batch that stands in the journal.
func (l *Log) recover(e entry) error {
	fifo := l.cfg.FIFOs[e.stream]
	if fifo == nil || l.cfg.Path == "" || e.length == 0 && !e.end {
		return nil
	}
	s, err := l.pool.get()
	if err != nil {
		return err
	}
	defer l.pool.put(s)
	return control(fifo, func(fd int) error {
		waits, raw, err := l.find(s, fd, e)
		if err != nil || !waits {
			return err
		}
		if !e.bare {
			if err := l.rewrite(e, s.encodeAgain(raw, e)); err != nil {
				return err
			}
		}
		return l.take(fd, e, s.raw)
	})
}

// encodeAgain returns the lines that raw, the bytes of batch e, became.
func (s *scratch) encodeAgain(raw []byte, e entry) []byte {
	if !e.end {
		out, _ := encode(s.out[:0], raw, e.at, e.stream, partial)
		return out
	}
	if len(raw) == 0 {
		return append(appendPrefix(s.out[:0], e.at, e.stream, 'F'), '\n')
	}
	out, _ := encode(s.out[:0], raw, e.at, e.stream, full)
	return out
}

// find tells whether batch e still waits to be consumed, and returns its bytes.
func (l *Log) find(s *scratch, fd int, e entry) (waits bool, raw []byte, err error) {
	if e.length == 0 {
		return true, nil, nil // it has nothing to consume; writing it again does no harm
	}
	if l.marks {
		if waits, err = marked(fd, e.seq); err != nil || !waits {
			return false, nil, err
		}
	}
	raw, err = s.peek(fd, e.length)
	if errors.Is(err, errEmpty) || err == nil && len(raw) < e.length {
		// All who had the FIFO have closed it, and its content is gone.
		return false, nil, l.cut(e)
	}
	if err != nil || l.marks {
		return err == nil, raw, err
	}
	return !e.bare && l.same(e, s.encodeAgain(raw, e)), raw, nil
}

// same tells whether the log has the beginning of out, or all of it, where batch
// e was written.
func (l *Log) same(e entry, out []byte) bool {
	written := make([]byte, len(out))
	f, err := l.fileOf(e)
	if err != nil || f == nil {
		return false
	}
	defer f.Close()
	n, _ := f.ReadAt(written, e.offset)
	return bytes.HasPrefix(out, written[:n])
}

// cut removes the torn line that the writing of batch e may have left.
func (l *Log) cut(e entry) error {
	f, err := l.fileOf(e)
	if err != nil || f == nil {
		return err
	}
	defer f.Close()
	written := make([]byte, maxOut)
	n, err := f.ReadAt(written, e.offset)
	if n == 0 || !errors.Is(err, io.EOF) {
		return nil
	}
	return f.Truncate(e.offset + int64(bytes.LastIndexByte(written[:n], '\n')+1))
}

// rewrite writes a batch where the journal has it. If the file was renamed since,
// it is looked for beside its old name; if it is gone, the batch goes to the new
// file.
func (l *Log) rewrite(e entry, out []byte) error {
	f, err := l.fileOf(e)
	if err != nil {
		return err
	}
	if f != nil {
		defer f.Close()
		if _, err = f.WriteAt(out, e.offset); err != nil {
			return errors.Join(err, f.Truncate(e.offset))
		}
		return nil
	}
	if e.length == 0 {
		return nil
	}
	if l.file == nil {
		return fmt.Errorf("write log: %w", errdefs.ErrUnavailable)
	}
	end, err := l.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(out, end); err != nil {
		return errors.Join(err, l.file.Truncate(end))
	}
	return nil
}

// maxRotated bounds how many files fileOf looks at.
const maxRotated = 1000

// fileOf opens the file that e was written to, or returns nil if it is gone.
func (l *Log) fileOf(e entry) (*os.File, error) {
	dir, err := os.Open(filepath.Dir(l.cfg.Path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxRotated)
	for _, name := range append([]string{filepath.Base(l.cfg.Path)}, names...) {
		f, err := os.OpenFile(filepath.Join(dir.Name(), name), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // a directory, a link, gone
		}
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) == nil && st.Dev == e.dev && st.Ino == e.inode && st.Size >= e.offset && st.Mode&unix.S_IFMT == unix.S_IFREG {
			return f, nil
		}
		f.Close()
	}
	return nil, nil
}

// complainOnce says that the log cannot be written, until it can again.
func (l *Log) complainOnce(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.complained {
		l.log.Error("log cannot be written, output waits", "container", l.cfg.ID, "err", err)
	}
	l.complained = true
}

// now is a batch's time. The log has no use for the monotonic part.
func now() time.Time { return time.Now().Round(0) }
