package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Blob opens the blob called want, of the given size. Its Reads follow ctx. A
// transfer that breaks off or stalls is taken up where it stopped, at the next
// endpoint if there is one. The last Read returns io.EOF only if the whole is
// what want says; else the error is a LiarError, and the next Blob does not ask
// that endpoint again as long as there are others.
func (r *Repository) Blob(ctx context.Context, want digest.Digest, size int64) (io.ReadCloser, error) {
	if err := want.Validate(); err != nil || size < 0 {
		return nil, fmt.Errorf("blob %q of %d bytes: %w", want, size, errdefs.ErrInvalidArgument)
	}
	ctx, end := context.WithCancelCause(ctx)
	b := &blob{repo: r, ctx: ctx, end: end, want: want, size: size, verifier: want.Verifier()}
	if err := b.open(); err != nil {
		end(nil)
		return nil, fmt.Errorf("blob %s: %w", want, err)
	}
	return b, nil
}

// Transfers that break off are taken up this often if next to nothing comes in
// between, and that often in all.
const (
	maxIdleResumes = 4
	maxResumes     = 1000
)

// blob is used by one reader at a time. Only ctx and end are touched by Close.
type blob struct {
	repo     *Repository
	ctx      context.Context
	end      context.CancelCauseFunc
	want     digest.Digest
	size     int64
	verifier digest.Verifier
	offset   int64

	request *request      // that body answers
	body    io.ReadCloser // nil between two transfers
	cancel  context.CancelCauseFunc
	watch   stallWatch
	start   int64 // offset that body starts at

	idle    int   // transfers in a row that broke off and brought next to nothing
	resumes int   // transfers that broke off
	err     error // sticky
}

// open starts a transfer at the current offset.
func (b *blob) open() error {
	ctx, cancel := context.WithCancelCause(b.ctx)
	watch := stallWatch{limit: b.repo.timing.stall, cancel: cancel}
	tried := 0
	err := b.repo.each(docker.HostCapabilityPull, func(e endpoint, last bool) error {
		if tried++; tried <= b.idle && !last {
			return fmt.Errorf("%s breaks off: %w", e.Host, errdefs.ErrUnavailable)
		}
		if b.repo.isLiar(e.Host) {
			return fmt.Errorf("%s has sent a blob with a wrong digest: %w", e.Host, errdefs.ErrDataLoss)
		}
		q := b.repo.request(e, http.MethodGet, "blobs/"+b.want.String())
		if b.offset > 0 {
			q.header.Set("Range", fmt.Sprintf("bytes=%d-", b.offset))
		}
		resp, err := b.repo.send(ctx, q, last)
		if err != nil {
			return err
		}
		if err := b.position(resp, &watch); err != nil {
			resp.Body.Close()
			return q.fail(err)
		}
		b.request, b.body = q, resp.Body
		return nil
	})
	if err != nil {
		cancel(nil)
		return err
	}
	b.cancel, b.watch, b.start = cancel, watch, b.offset
	return nil
}

// position makes sure that the answer goes on where the last one stopped.
func (b *blob) position(resp *http.Response, watch *stallWatch) error {
	if b.offset == 0 {
		if resp.ContentLength >= 0 && resp.ContentLength != b.size {
			return fmt.Errorf("the answer has %d bytes, the manifest says %d: %w", resp.ContentLength, b.size, errdefs.ErrDataLoss)
		}
		return nil
	}
	if resp.StatusCode != http.StatusPartialContent {
		if _, err := io.CopyN(io.Discard, watched{resp.Body, watch}, b.offset); err != nil {
			return transportError(b.ctx, err)
		}
		return nil
	}
	var start int64
	if n, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &start); n != 1 || err != nil || start != b.offset {
		return fmt.Errorf("asked for bytes from %d, got Content-Range %q: %w", b.offset, printable(resp.Header.Get("Content-Range")), errdefs.ErrUnavailable)
	}
	return nil
}

func (b *blob) Read(p []byte) (int, error) {
	for b.err == nil {
		if b.body == nil {
			if err := b.open(); err != nil {
				b.err = fmt.Errorf("blob %s, at byte %d of %d: %w", b.want, b.offset, b.size, err)
				break
			}
		}
		n, err := b.watch.read(b.body, p)
		if b.offset+int64(n) > b.size {
			b.err = b.lied(fmt.Errorf("more than the %d bytes the manifest says came", b.size))
			return 0, b.err
		}
		b.offset += int64(n)
		b.verifier.Write(p[:n])
		if err != nil {
			b.err = b.ended(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, b.err
}

// ended decides what the end of a transfer means: io.EOF for the end of the
// blob, nil to take it up again, or what went wrong.
func (b *blob) ended(err error) error {
	b.close()
	if errors.Is(err, io.EOF) && b.offset == b.size {
		if b.verifier.Verified() {
			return io.EOF
		}
		return b.lied(errors.New("the content has another digest"))
	}
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	if b.offset-b.start >= minProgress {
		b.idle = 0
	}
	b.idle++
	b.resumes++
	if b.idle < maxIdleResumes && b.resumes < maxResumes {
		return b.rest()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("the connection ended")
	}
	return b.request.fail(fmt.Errorf("stopped at byte %d of %d, %d times: %w: %w", b.offset, b.size, b.resumes, err, errdefs.ErrUnavailable))
}

// rest waits a moment before a transfer that brought nothing is taken up again.
func (b *blob) rest() error {
	if b.idle < 2 {
		return nil
	}
	select {
	case <-time.After(b.repo.timing.retry << b.idle):
		return nil
	case <-b.ctx.Done():
		return context.Cause(b.ctx)
	}
}

func (b *blob) lied(cause error) error {
	host := b.request.endpoint.Host
	b.repo.mu.Lock()
	b.repo.liars[host] = true
	b.repo.mu.Unlock()
	return &LiarError{Host: host, Err: b.request.fail(fmt.Errorf("%w: %w", cause, errdefs.ErrDataLoss))}
}

var errClosed = errors.New("blob is closed")

// Close cancels the request under way, which gives up its connection.
func (b *blob) Close() error {
	b.end(errClosed)
	return nil
}

// close ends the current transfer.
func (b *blob) close() {
	if b.body != nil {
		b.cancel(nil)
		b.body.Close()
		b.body = nil
	}
}

// isLiar reports whether host has sent a wrong blob and another has not.
func (r *Repository) isLiar(host string) bool {
	others := r.Others()
	r.mu.Lock()
	defer r.mu.Unlock()
	return others && r.liars[host]
}

// Others reports whether there is an endpoint that has not lied yet.
func (r *Repository) Others() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.endpoints {
		if !r.liars[e.Host] {
			return true
		}
	}
	return false
}

// minProgress is what must come within the stall limit: a server that sends one
// byte now and then has stalled.
const minProgress = 16 << 10

// watched is a reader under a stallWatch.
type watched struct {
	io.Reader
	watch *stallWatch
}

func (w watched) Read(p []byte) (int, error) { return w.watch.read(w.Reader, p) }

// stallWatch gives up on a transfer that makes no progress. Only the time spent
// waiting for the other side counts.
type stallWatch struct {
	limit  time.Duration
	cancel context.CancelCauseFunc

	waited time.Duration // since the last minProgress bytes
	got    int
}

func (w *stallWatch) read(r io.Reader, p []byte) (int, error) {
	start := time.Now()
	stalled := fmt.Errorf("less than %d bytes came in %v", minProgress, w.limit)
	timer := time.AfterFunc(max(w.limit-w.waited, 0), func() { w.cancel(stalled) })
	n, err := r.Read(p)
	if !timer.Stop() && err != nil && !errors.Is(err, io.EOF) {
		err = stalled
	}
	w.waited += time.Since(start)
	if w.got += n; w.got >= minProgress {
		w.waited, w.got = 0, 0
	}
	return n, err
}
