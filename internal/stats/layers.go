package stats

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/layer"
)

// layers knows how much is in writable layers. Whoever asks gets the last figure
// there is; if it has become old, one goroutine counts again.
type layers struct {
	filesystem *runtimeapi.FilesystemIdentifier
	log        *slog.Logger
	cancel     context.CancelFunc
	done       chan struct{}
	wake       chan struct{} // holds one word if there is work

	mu    sync.Mutex
	known map[string]*layerUsage // by container id
	queue []layerJob
}

type layerUsage struct {
	queued bool
	at     time.Time // zero if it has not been counted yet
	took   time.Duration
	layer.Usage
}

type layerJob struct{ id, dir string }

const (
	// layerAge is how old a figure may become before it is counted again. A
	// kubelet asks every ten seconds.
	layerAge = 8 * time.Second
	// layerRest is how many times as long as it took to count a layer it is
	// left alone.
	layerRest = 50
	// layerSmall is how many files are counted at once, for the first time: most
	// containers write few.
	layerSmall = 64
)

func (l *layers) start(filesystem string, log *slog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	l.filesystem, l.log, l.cancel = &runtimeapi.FilesystemIdentifier{Mountpoint: filesystem}, log, cancel
	l.done, l.wake, l.known = make(chan struct{}), make(chan struct{}, 1), make(map[string]*layerUsage)
	go l.count(ctx)
}

func (l *layers) stop() {
	l.cancel()
	<-l.done
}

// usage returns what a container has written, or nil if that is not known yet.
func (l *layers) usage(id, dir string) *runtimeapi.FilesystemUsage {
	if !l.knows(id) {
		start := time.Now()
		n, err := layer.Measure(context.Background(), dir, layerSmall)
		l.counted(id, start, n, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.known[id]
	if u == nil {
		return nil // forgotten meanwhile
	}
	if !u.queued && time.Since(u.at) > max(layerAge, layerRest*u.took) {
		u.queued = true
		l.queue = append(l.queue, layerJob{id, dir})
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	if u.at.IsZero() {
		return nil
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp: u.at.UnixNano(), FsId: l.filesystem, UsedBytes: number(u.Bytes), InodesUsed: number(u.Inodes),
	}
}

// knows reports whether the container has been counted, or is about to be; if it
// is not, it is the caller's to count.
func (l *layers) knows(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known[id] != nil {
		return true
	}
	l.known[id] = &layerUsage{queued: true}
	return false
}

// count works off the queue until ctx ends.
func (l *layers) count(ctx context.Context) {
	defer close(l.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		}
		for job, ok := l.next(); ok && ctx.Err() == nil; job, ok = l.next() {
			start := time.Now()
			n, err := layer.Measure(ctx, job.dir, 0)
			if err != nil && !errors.Is(err, context.Canceled) {
				l.log.Warn("count writable layer", "container", job.id, "err", err)
			}
			l.counted(job.id, start, n, err)
		}
	}
}

func (l *layers) next() (layerJob, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		return layerJob{}, false
	}
	job := l.queue[0]
	l.queue = l.queue[1:]
	return job, true
}

func (l *layers) counted(id string, start time.Time, n layer.Usage, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.known[id]
	if u == nil {
		return // gone meanwhile
	}
	u.queued = false
	if err == nil {
		u.at, u.took, u.Usage = start, time.Since(start), n
	}
}

func (l *layers) forget(number int, live func(id string) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.known) <= number {
		return
	}
	for id := range l.known {
		if !live(id) {
			delete(l.known, id)
		}
	}
}
