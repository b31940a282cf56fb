package stats

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// handle is a cgroup's files for a usage, held open: opening one takes several
// times as long as reading it. It does not keep the cgroup from being removed.
type handle struct {
	used time.Time // guarded by cgroups.mu

	mu   sync.Mutex
	fds  [usageFiles]int // -1 for a file that is not there
	once bool            // to be closed after one reading
}

// holdTime is how long files are held that nobody reads. Kubelets read them every
// ten seconds.
const holdTime = 30 * time.Second

// holdShare is which part of the files that the process may have open are held
// at most. Those of cgroups beyond are opened for each reading.
const holdShare = 4

// mayHold returns of how many cgroups the files may be held.
func mayHold() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return int(min(limit.Cur, 1<<20)) / holdShare / usageFiles
}

// open returns the files of a cgroup, and remembers them if there are any.
func (g *cgroups) open(cgroup string) *handle {
	if h := g.remembered(cgroup, nil); h != nil {
		return h
	}
	h := &handle{}
	files := filesV2
	if g.v1() {
		files = filesV1
	}
	found := false
	for i, f := range files {
		h.fds[i] = -1
		dir := g.dir(f.controller, cgroup)
		if f.name == "" || dir == "" {
			continue
		}
		if fd, err := unix.Open(dir+"/"+f.name, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
			h.fds[i], found = fd, true
		}
	}
	if !found {
		h.once = true
		return h
	}
	first := g.remembered(cgroup, h)
	if first != h {
		h.close()
	}
	return first
}

// remembered returns what is held of a cgroup. If that is nothing, it holds h, or
// marks it as not held.
func (g *cgroups) remembered(cgroup string, h *handle) *handle {
	g.mu.Lock()
	defer g.mu.Unlock()
	if held := g.held[cgroup]; held != nil {
		h = held
	}
	if h == nil {
		return nil
	}
	if g.held[cgroup] == nil && len(g.held) >= g.most {
		h.once = true
		return h
	}
	h.used = time.Now()
	g.held[cgroup] = h
	if g.idle == nil {
		g.idle = time.AfterFunc(holdTime, g.tidy)
	}
	return h
}

// read returns a file's content, or nil if it cannot be read. The kernel writes
// each of these files in one go.
func (h *handle) read(file int, buf []byte) []byte {
	if h.fds[file] < 0 {
		return nil
	}
	n, err := unix.Pread(h.fds[file], buf, 0)
	if err != nil {
		return nil
	}
	return buf[:n]
}

// close closes the files; the caller holds the lock.
func (h *handle) close() {
	for i, fd := range h.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
		h.fds[i] = -1
	}
}

// drop forgets the files of a cgroup that is gone: another may come in its place.
// The caller holds the handle's lock.
func (g *cgroups) drop(cgroup string, h *handle) {
	g.mu.Lock()
	if g.held[cgroup] == h {
		delete(g.held, cgroup)
	}
	g.mu.Unlock()
	h.close()
}

// tidy closes what nobody has read for a while, and comes again if anything is
// left.
func (g *cgroups) tidy() {
	g.release(time.Now().Add(-holdTime))
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.held) > 0 {
		g.idle = time.AfterFunc(holdTime, g.tidy)
	}
}

// release closes what was last read before the given time.
func (g *cgroups) release(before time.Time) {
	var closing []*handle
	g.mu.Lock()
	if g.idle != nil {
		g.idle.Stop()
		g.idle = nil
	}
	for cgroup, h := range g.held {
		if h.used.Before(before) {
			delete(g.held, cgroup)
			closing = append(closing, h)
		}
	}
	g.mu.Unlock()
	for _, h := range closing {
		h.mu.Lock()
		h.close()
		h.mu.Unlock()
	}
}
