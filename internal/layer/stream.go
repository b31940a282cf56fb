package layer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"sampan.dev/sampan/internal/inflate"
)

// Blocks that travel between the stages of a pipeline. Four of them let both
// sides work at once without a stage running far ahead.
const (
	blockSize   = 128 << 10
	blocksAhead = 4
)

// ahead reads its source in a goroutine of its own, so that what produces the
// bytes and what consumes them run at the same time.
type ahead struct {
	full chan block
	free chan []byte
	stop chan struct{}
	done chan struct{}
	once sync.Once

	current block
	rest    []byte // of current, not yet read
}

type block struct {
	data []byte
	err  error // what the source ended with, after data
}

// readAhead starts reading src and writes what it reads to tap as well, unless
// tap is nil. The caller closes the result after making sure that src does not
// block any more.
func readAhead(src io.Reader, tap io.Writer) *ahead {
	a := &ahead{
		full: make(chan block, blocksAhead),
		free: make(chan []byte, blocksAhead),
		stop: make(chan struct{}),
		done: make(chan struct{}),
	}
	for range blocksAhead {
		a.free <- make([]byte, blockSize)
	}
	go a.fill(src, tap)
	return a
}

func (a *ahead) fill(src io.Reader, tap io.Writer) {
	defer close(a.done)
	defer close(a.full)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		n, err := readFull(src, buf)
		if tap != nil {
			tap.Write(buf[:n]) // a hash: it cannot fail
		}
		a.full <- block{data: buf[:n], err: err} // has room: there are no more blocks than that
		if err != nil {
			return
		}
	}
}

// readFull fills buf as far as src goes. A panic becomes an error: decompressors
// see hostile input, and their goroutine is nobody else's to guard.
func readFull(src io.Reader, buf []byte) (n int, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("decompressor: %v: %w", p, errdefs.ErrInvalidArgument)
		}
	}()
	for n < len(buf) && err == nil {
		var m int
		m, err = src.Read(buf[n:])
		n += m
	}
	return n, err
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.current.err != nil {
			return 0, a.current.err
		}
		if a.current.data != nil {
			a.free <- a.current.data[:cap(a.current.data)]
		}
		next, ok := <-a.full
		if !ok {
			return 0, io.ErrClosedPipe
		}
		a.current, a.rest = next, next.data
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the reading and waits for its goroutine.
func (a *ahead) Close() error {
	a.once.Do(func() { close(a.stop) })
	<-a.done
	return nil
}

// maxWindow bounds the memory that a zstd stream may ask for: zstd --long=27.
const maxWindow = 128 << 20

// Decompress returns the plain stream of r, which may be compressed with gzip or
// zstd: the first bytes tell, because media types are known to lie. A damaged
// stream is an ErrInvalidArgument, one that is cut short an ErrDataLoss; errors of
// r stay what they are.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	src := &source{r: r}
	br := bufio.NewReaderSize(src, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	plain := io.NopCloser(br)
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		plain, err = inflate.NewReader(br)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(magic):
		var d *zstd.Decoder
		if d, err = zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1)); err == nil {
			plain = d.IOReadCloser()
		}
	default:
		return plain, nil
	}
	if err != nil {
		return nil, src.blame(err)
	}
	return &decompressor{ReadCloser: plain, src: src}, nil
}

// isSkippable reports whether magic starts a zstd frame that carries no data of
// the stream, as zstd:chunked puts in front.
func isSkippable(magic []byte) bool {
	return len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18})
}

// source remembers how the compressed stream ended.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil {
		s.err = err
	}
	return n, err
}

// blame decides who is at fault for a decompressor's error.
func (s *source) blame(err error) error {
	switch {
	case s.err != nil && !errors.Is(s.err, io.EOF):
		return s.err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the compressed stream is cut short: %w", errdefs.ErrDataLoss)
	}
	return fmt.Errorf("the compressed stream is damaged: %w: %w", err, errdefs.ErrInvalidArgument)
}

type decompressor struct {
	io.ReadCloser
	src *source
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = d.src.blame(err)
	}
	return n, err
}
