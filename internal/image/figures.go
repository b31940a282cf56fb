package image

import (
	"io"
	"time"

	"sampan.dev/sampan/internal/metrics"
)

// Figures count pulls; nil counts nothing.
type Figures struct {
	ended    *metrics.Counter
	duration *metrics.Histogram
	bytes    *metrics.Counter
}

// NewFigures adds the figures of pulls to a registry.
func NewFigures(r *metrics.Registry) *Figures {
	return &Figures{
		ended:    r.Counter("sampan_pulls_total", "Pulls that have ended, by result; those that joined another count once.", "result"),
		duration: r.Histogram("sampan_pull_duration_seconds", "How long pulls took that succeeded.", metrics.Seconds),
		bytes:    r.Counter("sampan_pull_bytes_total", "Bytes of layers that were received from registries."),
	}
}

func (f *Figures) pulled(took time.Duration, err error) {
	switch {
	case f == nil:
	case err != nil:
		f.ended.Add(1, "error")
	default:
		f.ended.Add(1, "ok")
		f.duration.Observe(took.Seconds())
	}
}

// counting counts what is read of a layer.
func (f *Figures) counting(r io.ReadCloser) io.ReadCloser {
	if f == nil {
		return r
	}
	return &countingReader{r, f.bytes}
}

type countingReader struct {
	io.ReadCloser
	bytes *metrics.Counter
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.bytes.Add(int64(n))
	return n, err
}
