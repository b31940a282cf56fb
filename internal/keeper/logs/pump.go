package logs

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// flushAfter is how long output without a newline waits for one.
	flushAfter = 100 * time.Millisecond
	// retryMin and retryMax bound the pauses between attempts to write a log.
	retryMin = 20 * time.Millisecond
	retryMax = time.Second
	// settleTime is a pause between small batches that follow each other closely,
	// in which a larger one gathers. It costs latency that nobody sees and saves most
	// of the work for containers that write line by line.
	settleTime  = time.Millisecond
	settleBelow = 16 << 10 // bytes that are a small batch
	// drainMax bounds, in bytes, what a drain moves while somebody still writes.
	drainMax = 4 * fifoMax
)

// pump moves one stream of one container.
type pump struct {
	log    *Log
	stream Stream
	fifo   syscall.RawConn
	file   *os.File // of fifo, for deadlines

	ctx    context.Context
	cancel context.CancelFunc // stops it at once
	once   sync.Once          // closes drains
	drains chan struct{}      // closed when the container has exited
	done   chan struct{}      // closed when run has returned

	at      time.Time // of a batch that could not be written, zero if there is none
	moved   int       // bytes of the last batch
	movedAt time.Time // when it was moved
	size    int       // capacity that the FIFO was given, 0 if not yet
	drained int       // bytes moved since drains was closed
	shown   int       // bytes at the FIFO's head that the tap has seen
}

func newPump(l *Log, s Stream, f *os.File) *pump {
	p := &pump{log: l, stream: s, file: f, drains: make(chan struct{}), done: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	context.AfterFunc(p.ctx, p.wake)
	return p
}

// drain makes run end when the FIFO is empty.
func (p *pump) drain() {
	p.once.Do(func() { close(p.drains) })
	p.wake()
}

// wake makes a wait for output return.
func (p *pump) wake() { p.file.SetReadDeadline(time.Unix(1, 0)) }

func (p *pump) draining() bool {
	select {
	case <-p.drains:
		return true
	default:
		return false
	}
}

// outcome is what an attempt to move a batch came to.
type outcome int

const (
	moved  outcome = iota // there may be more
	empty                 // nothing is in the FIFO
	held                  // there is the beginning of a line
	closed                // nothing can come any more
)

// run moves batches until the stream has ended or the pump is stopped.
func (p *pump) run() {
	defer close(p.done)
	defer p.cancel()
	conn, err := p.file.SyscallConn()
	if err != nil {
		p.log.complainOnce(err)
		return
	}
	p.fifo = conn
	pause := retryMin
	t := hold
	for p.ctx.Err() == nil {
		if p.draining() {
			t = full
		}
		o, err := p.next(t)
		if err != nil {
			p.log.complainOnce(err)
			p.rest(pause)
			pause = min(2*pause, retryMax)
			continue
		}
		pause = retryMin
		switch {
		case o == closed || t == full && (o == empty || p.drained > drainMax):
			p.finish()
			return
		case o == held:
			// The deadline passed: the line is not finished soon.
			t = partial
		default:
			t = hold
			p.settle()
		}
	}
}

// settle pauses if the last batch was small and came right after another one.
func (p *pump) settle() {
	last := p.movedAt
	p.movedAt = time.Now()
	if p.moved >= settleBelow || p.movedAt.Sub(last) > 2*settleTime {
		return
	}
	select {
	case <-p.drains:
	case <-p.ctx.Done():
	case <-time.After(settleTime):
	}
}

// next moves a batch, if need be after waiting for output. It returns held when
// the rest of a line takes too long, and nothing of interest when it was woken.
func (p *pump) next(t tail) (o outcome, err error) {
	p.file.SetReadDeadline(time.Time{})
	waits := false
	rerr := p.fifo.Read(func(fd uintptr) bool {
		if o, err = p.batch(int(fd), t); err != nil || t != hold || o == moved || o == closed {
			return true
		}
		if o == held && !waits {
			waits = true
			p.file.SetReadDeadline(time.Now().Add(flushAfter))
		}
		// Whoever sets these sets the deadline afterwards, so that it is either
		// seen here or ends the wait.
		return p.draining() || p.ctx.Err() != nil
	})
	if err == nil && rerr != nil && !errors.Is(rerr, os.ErrDeadlineExceeded) {
		err = rerr
	}
	return o, err
}

// batch moves what is in the FIFO, as much as a batch can be.
func (p *pump) batch(fd int, t tail) (outcome, error) {
	s, err := p.log.pool.get()
	if err != nil {
		return empty, err
	}
	defer p.log.pool.put(s)
	raw, err := s.peek(fd, maxBatch)
	if errors.Is(err, errEmpty) {
		return empty, nil
	}
	if err != nil {
		return empty, err
	}
	if len(raw) == 0 {
		return closed, nil
	}
	p.grow(fd, len(raw))
	p.show(raw)
	// A batch that could not be written keeps its time: what of it stands in
	// the log already, and was perhaps read, does not change.
	if p.at.IsZero() {
		p.at = now()
	}
	more := false
	if t == full {
		left, err := waiting(fd)
		if more = err != nil || left > len(raw); more {
			t = hold // the stream's last byte is not in this batch
		}
	}
	out, n := encode(s.out[:0], raw, p.at, p.stream, t)
	if n == 0 && more {
		out, n = encode(out, raw, p.at, p.stream, partial)
	}
	if n == 0 {
		return held, nil
	}
	e := entry{stream: p.stream, length: n, at: p.at, end: t == full && n == len(raw) && raw[n-1] != '\n'}
	if err := p.log.commit(fd, e, out, s.raw); err != nil {
		return empty, err
	}
	p.at, p.moved = time.Time{}, n
	p.shown = max(0, p.shown-n)
	if p.draining() {
		p.drained += n
	}
	return moved, nil
}

// show gives the tap what it has not seen of raw, the FIFO's head.
func (p *pump) show(raw []byte) {
	if p.log.cfg.Tap != nil && len(raw) > p.shown {
		p.log.cfg.Tap(p.stream, raw[p.shown:])
	}
	p.shown = max(p.shown, len(raw))
}

// finish ends the last line, if parts of it are in the log.
func (p *pump) finish() {
	for p.ctx.Err() == nil {
		p.log.mu.Lock()
		unfinished := p.log.open[p.stream]
		p.log.mu.Unlock()
		if !unfinished || p.log.cfg.Path == "" {
			return
		}
		at := now()
		out := append(appendPrefix(nil, at, p.stream, 'F'), '\n')
		if err := p.log.commit(-1, entry{stream: p.stream, at: at, end: true}, out, nil); err != nil {
			p.log.complainOnce(err)
			p.rest(retryMax)
		}
	}
}

// grow gives the FIFO of a busy container more room.
func (p *pump) grow(fd, n int) {
	if p.size != 0 || n < fifoGrow {
		return
	}
	p.size = fifoMax
	// Without it throughput is less.
	unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, p.size)
}

// rest pauses, unless the pump is stopped.
func (p *pump) rest(d time.Duration) {
	select {
	case <-p.ctx.Done():
	case <-time.After(d):
	}
}
