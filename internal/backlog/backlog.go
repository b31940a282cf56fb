// Package backlog is a pipe in memory, for a writer that has others to serve than
// a slow reader: what is not read yet waits in a buffer of bounded size, the
// writer has bounded patience, and then the pipe breaks.
package backlog

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// ErrBehind is what both ends get when the reader has fallen too far behind.
var ErrBehind = fmt.Errorf("it was read too slowly: %w", errdefs.ErrResourceExhausted)

// keep is the capacity that an empty buffer may have without being given back.
const keep = 64 << 10

// Patience is how long a writer waits for a reader.
type Patience struct {
	// Most is how long it waits in all. Each second gives a tenth of a second
	// back, so that a slow reader slows its writer by a tenth at most.
	Most time.Duration
	// Paced means that the writer goes at the reader's pace: it has all its
	// patience anew whenever the reader has taken something.
	Paced bool
}

// regain is the part of the passing time that a writer gets back.
const regain = 10

// Pipe is the pipe. It has one writer and one reader.
type Pipe struct {
	limit    int
	patience Patience
	left     time.Duration // of the patience; the writer's
	since    time.Time     // when left was so much
	gave     chan struct{} // holds a token when the writer has done something
	took     chan struct{} // and the reader
	closed   chan struct{}

	mu   sync.Mutex
	data bytes.Buffer // written and not read
	err  error        // set when closed
}

// New returns a pipe whose buffer holds limit bytes.
func New(limit int, patience Patience) *Pipe {
	return &Pipe{
		limit: limit, patience: patience, left: patience.Most, since: time.Now(),
		gave: make(chan struct{}, 1), took: make(chan struct{}, 1), closed: make(chan struct{}),
	}
}

// Write puts a copy of b into the pipe. When the reader is too slow for that, it
// breaks the pipe: the error is ErrBehind, to the reader too once it has read
// what was written before.
func (p *Pipe) Write(b []byte) (int, error) {
	written := 0
	for {
		n, err := p.put(b[written:])
		written += n
		if err != nil || written == len(b) {
			return written, err
		}
		p.await()
	}
}

// await waits for the reader to take something, and loses patience.
func (p *Pipe) await() {
	start := time.Now()
	p.left = min(p.left+start.Sub(p.since)/regain, p.patience.Most)
	select {
	case <-p.took:
		p.since = time.Now()
		p.left -= p.since.Sub(start)
		if p.patience.Paced {
			p.left = p.patience.Most
		}
	case <-p.closed:
	case <-time.After(p.left):
		p.Close(ErrBehind)
	}
}

// put writes what there is room for.
func (p *Pipe) put(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == io.EOF {
		return 0, io.ErrClosedPipe
	}
	if p.err != nil {
		return 0, p.err
	}
	n := min(len(b), p.limit-p.data.Len())
	if n > 0 {
		p.data.Write(b[:n])
		signal(p.gave)
	}
	return n, nil
}

// Read takes what there is, if need be after waiting for it.
func (p *Pipe) Read(b []byte) (int, error) {
	for {
		if n, err := p.take(b); n > 0 || err != nil || len(b) == 0 {
			return n, err
		}
		select {
		case <-p.gave:
		case <-p.closed:
		}
	}
}

func (p *Pipe) take(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.data.Len() == 0 {
		return 0, p.err
	}
	n, _ := p.data.Read(b) // fails only when it is empty
	if p.data.Len() == 0 && p.data.Cap() > keep {
		p.data = bytes.Buffer{}
	}
	signal(p.took)
	return n, nil
}

// Close ends the pipe. The reader gets what was written, and then err, or io.EOF
// if that is nil; the writer fails from now on. Only the first Close counts.
func (p *Pipe) Close(err error) {
	if err == nil {
		err = io.EOF
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
		close(p.closed)
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
