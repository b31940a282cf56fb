package stats

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cgroups reads the files of cgroups, of either version. In a hybrid layout the
// figures are those of v1, but pressure is in the unified hierarchy.
type cgroups struct {
	roots   map[string]string // by controller
	buffers sync.Pool

	mu   sync.Mutex
	held map[string]*handle // by cgroup
	most int                // how many are held at most
	idle *time.Timer        // runs while anything is held
}

// v1 reports whether controllers have hierarchies of their own.
func (g *cgroups) v1() bool { return g.roots["memory"] != "" || g.roots["cpuacct"] != "" }

// dir returns where the controller has its files for a cgroup; the unified
// hierarchy has those of all controllers without one of their own. It is "" if
// there is no such place.
func (g *cgroups) dir(controller, cgroup string) string {
	root := g.roots[controller]
	if root == "" && (controller == "" || !g.v1()) {
		root = g.roots[""]
	}
	if root == "" {
		return ""
	}
	return root + cgroup
}

// usage is what the CRI's statistics want to know of a cgroup, with all below it.
type usage struct {
	at time.Time

	hasCPU bool
	cpu    uint64 // ns

	hasMemory           bool
	memory, memoryLimit uint64
	inactiveFile        uint64
	anonymous           uint64
	faults, majorFaults uint64

	hasSwap         bool
	swap, swapLimit uint64

	cpuPressure, memoryPressure, ioPressure *runtimeapi.PsiStats
}

// A usage is read from these files; their names differ.
const (
	fileCPU = iota
	fileMemory
	fileMemoryStat
	fileMemoryLimit
	fileSwap
	fileSwapLimit
	fileCPUPressure
	fileMemoryPressure
	fileIOPressure
	usageFiles // how many there are
)

type cgroupFile struct{ controller, name string }

var pressureFiles = [...]cgroupFile{{"", "cpu.pressure"}, {"", "memory.pressure"}, {"", "io.pressure"}}

var filesV1 = [usageFiles]cgroupFile{
	fileCPU: {"cpuacct", "cpuacct.usage"}, fileMemory: {"memory", "memory.usage_in_bytes"}, fileMemoryStat: {"memory", "memory.stat"},
	fileMemoryLimit: {"memory", "memory.limit_in_bytes"}, fileSwapLimit: {"memory", "memory.memsw.limit_in_bytes"},
	fileCPUPressure: pressureFiles[0], fileMemoryPressure: pressureFiles[1], fileIOPressure: pressureFiles[2],
}

var filesV2 = [usageFiles]cgroupFile{
	fileCPU: {"", "cpu.stat"}, fileMemory: {"", "memory.current"}, fileMemoryStat: {"", "memory.stat"},
	fileMemoryLimit: {"", "memory.max"}, fileSwap: {"", "memory.swap.current"}, fileSwapLimit: {"", "memory.swap.max"},
	fileCPUPressure: pressureFiles[0], fileMemoryPressure: pressureFiles[1], fileIOPressure: pressureFiles[2],
}

// maxUsageFile bounds how much of a file is read for a usage. The longest is
// memory.stat.
const maxUsageFile = 16 << 10

func newCgroups(roots map[string]string) *cgroups {
	return &cgroups{
		roots: roots, held: make(map[string]*handle), most: mayHold(),
		buffers: sync.Pool{New: func() any { return new([maxUsageFile]byte) }},
	}
}

// usage reads a cgroup. Of one that is not there it knows nothing.
func (g *cgroups) usage(cgroup string) usage {
	var u usage
	h := g.open(cgroup)
	h.mu.Lock()
	defer h.mu.Unlock()
	buf := g.buffers.Get().(*[maxUsageFile]byte)
	defer g.buffers.Put(buf)
	read := func(file int) []byte { return h.read(file, buf[:]) }
	if g.v1() {
		u.readV1(read)
	} else {
		u.readV2(read)
	}
	u.cpuPressure = pressure(read(fileCPUPressure))
	u.memoryPressure = pressure(read(fileMemoryPressure))
	u.ioPressure = pressure(read(fileIOPressure))
	u.at = time.Now()
	switch {
	case h.once:
		h.close()
	case !u.hasCPU && !u.hasMemory:
		g.drop(cgroup, h)
	}
	return u
}

func (u *usage) readV1(read func(file int) []byte) {
	u.cpu, u.hasCPU = value(read(fileCPU))
	u.memory, u.hasMemory = value(read(fileMemory))
	for key, v := range pairs(read(fileMemoryStat)) {
		switch string(key) {
		case "total_inactive_file":
			u.inactiveFile = v
		case "total_rss":
			u.anonymous = v
		case "total_pgfault":
			u.faults = v
		case "total_pgmajfault":
			u.majorFaults = v
		case "total_swap":
			u.swap, u.hasSwap = v, true
		}
	}
	u.memoryLimit, u.swapLimit = unlimited, unlimited
	if v, ok := value(read(fileMemoryLimit)); ok {
		u.memoryLimit = limitV1(v)
	}
	// There it limits memory and swap together.
	if v, ok := value(read(fileSwapLimit)); ok && limitV1(v) != unlimited {
		u.swapLimit = minus(v, u.memoryLimit)
	}
}

// limitV1 takes the number of bytes in as many pages as the kernel can count for
// no limit.
func limitV1(v uint64) uint64 {
	if v >= 1<<62 {
		return unlimited
	}
	return v
}

func (u *usage) readV2(read func(file int) []byte) {
	for key, v := range pairs(read(fileCPU)) {
		if string(key) == "usage_usec" {
			u.cpu, u.hasCPU = v*1000, true
		}
	}
	u.memory, u.hasMemory = value(read(fileMemory))
	for key, v := range pairs(read(fileMemoryStat)) {
		switch string(key) {
		case "inactive_file":
			u.inactiveFile = v
		case "anon":
			u.anonymous = v
		case "pgfault":
			u.faults = v
		case "pgmajfault":
			u.majorFaults = v
		}
	}
	u.memoryLimit, u.swapLimit = unlimited, unlimited
	if v, ok := value(read(fileMemoryLimit)); ok {
		u.memoryLimit = v
	}
	u.swap, u.hasSwap = value(read(fileSwap))
	if v, ok := value(read(fileSwapLimit)); ok {
		u.swapLimit = v
	}
}

// processes returns the processes of a cgroup and all below it.
func (g *cgroups) processes(cgroup string) ([]int, error) {
	dir := g.dir("pids", cgroup)
	if dir == "" {
		dir = g.dir("memory", cgroup)
	}
	r := reader{}
	pids, err := r.processes(dir, nil, maxDepth)
	if err != nil {
		return nil, fmt.Errorf("list processes of cgroup %s: %w", cgroup, err)
	}
	return pids, nil
}

// maxDepth bounds how deep below a cgroup processes are looked for.
const maxDepth = 16

func (r *reader) processes(dir string, pids []int, depth int) ([]int, error) {
	data, err := r.readAll(dir, "cgroup.procs")
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // which a threaded cgroup says; the one above lists its processes
		return pids, err
	}
	for field := range bytes.FieldsSeq(data) {
		if pid, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, pid)
		}
	}
	// A directory has a link from each one in it, and two besides.
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Nlink <= 2 || depth == 0 {
		return pids, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return pids, nil
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if pids, err = r.processes(filepath.Join(dir, e.Name()), pids, depth-1); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return pids, err
		}
	}
	return pids, nil
}

// reader reads small files one after the other into the same memory: what it
// returned is overwritten by the next. The system calls are made directly,
// because an os.File costs as much again as the reading.
type reader struct{ buf []byte }

// read returns a file's content, or nil if it cannot be read.
func (r *reader) read(dir, name string) []byte {
	data, err := r.readAll(dir, name)
	if err != nil {
		return nil
	}
	return data
}

// maxFile bounds how much of a file is read.
const maxFile = 1 << 20

func (r *reader) readAll(dir, name string) ([]byte, error) {
	if dir == "" {
		return nil, fs.ErrNotExist
	}
	if r.buf == nil {
		r.buf = make([]byte, 8<<10)
	}
	fd, err := unix.Open(dir+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n := 0
	for n < maxFile {
		if n == len(r.buf) {
			r.buf = append(r.buf, make([]byte, len(r.buf))...)
		}
		m, err := unix.Read(fd, r.buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return r.buf[:n], nil
}

// value parses the content of a file that has one number, or "max".
func value(data []byte) (uint64, bool) {
	data = bytes.TrimSpace(data)
	if string(data) == "max" {
		return unlimited, true
	}
	return parseUint(data)
}

// parseUint is strconv.ParseUint without a string.
func parseUint(data []byte) (uint64, bool) {
	if len(data) == 0 || len(data) > 20 {
		return 0, false
	}
	var v uint64
	for _, c := range data {
		digit := uint64(c - '0')
		if digit > 9 || v > (unlimited-digit)/10 {
			return 0, false
		}
		v = v*10 + digit
	}
	return v, true
}

// pairs yields the lines of a file that consist of a key and a number.
func pairs(data []byte) func(yield func([]byte, uint64) bool) {
	return func(yield func([]byte, uint64) bool) {
		for len(data) > 0 {
			line, rest, _ := bytes.Cut(data, []byte{'\n'})
			data = rest
			key, number, found := bytes.Cut(line, []byte{' '})
			if !found {
				continue
			}
			if v, ok := parseUint(number); ok && !yield(key, v) {
				return
			}
		}
	}
}
