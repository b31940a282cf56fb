package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is what /proc/PID/stat tells.
type process struct {
	ppid  int
	name  string
	state string // one letter, like R
	start uint64 // in clock ticks after boot
	cpu   time.Duration
	ended time.Duration // CPU time of its children that it has waited for
}

// tick is the unit of times in /proc/PID/stat on every architecture.
const tick = 10 * time.Millisecond

func readProcesses() (map[int]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	all := map[int]process{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		if p, ok := parseStat(string(text)); ok {
			all[pid] = p
		}
	}
	return all, nil
}

// parseStat reads a line of /proc/PID/stat. The name is in parentheses and may
// have any character in it.
func parseStat(line string) (process, bool) {
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return process{}, false
	}
	f := strings.Fields(line[end+1:]) // from field 3, the state
	if len(f) < 20 {
		return process{}, false
	}
	p := process{name: line[open+1 : end], state: f[0]}
	p.ppid, _ = strconv.Atoi(f[1])
	p.start, _ = strconv.ParseUint(f[19], 10, 64)
	var ticks [4]int64 // utime, stime, cutime, cstime
	for i := range ticks {
		ticks[i], _ = strconv.ParseInt(f[11+i], 10, 64)
	}
	p.cpu, p.ended = time.Duration(ticks[0]+ticks[1])*tick, time.Duration(ticks[2]+ticks[3])*tick
	return p, true
}

// processes finds the runtime's processes; see the package comment.
func (t *target) processes(ctx context.Context) (map[int]process, error) {
	daemon, err := t.daemon()
	if err != nil {
		return nil, err
	}
	containers, err := t.containerPids(ctx)
	if err != nil {
		return nil, err
	}
	all, err := readProcesses()
	if err != nil {
		return nil, err
	}
	t.remember(all, containers)
	roots := []int{daemon}
	for pid := range t.known {
		roots = append(roots, pid)
	}
	return descendants(all, roots, containers), nil
}

// remember notes the topmost ancestors of containers: a keeper stays when the
// last container has gone.
func (t *target) remember(all map[int]process, containers []int) {
	for pid, start := range t.known {
		if all[pid].start != start {
			delete(t.known, pid)
		}
	}
	mine := map[int]bool{1: true, 0: true}
	for pid := os.Getpid(); pid > 1; pid = all[pid].ppid {
		mine[pid] = true
	}
	for _, pid := range containers {
		for p := all[pid].ppid; !mine[p] && all[p].name != "systemd"; p = all[p].ppid {
			if parent := all[p].ppid; mine[parent] || all[parent].name == "systemd" {
				t.known[p] = all[p].start
			}
		}
	}
}

// descendants returns the roots and all below them, but for those of the
// excluded.
func descendants(all map[int]process, roots, excluded []int) map[int]process {
	children := map[int][]int{}
	for pid, p := range all {
		children[p.ppid] = append(children[p.ppid], pid)
	}
	skip := map[int]bool{}
	for _, pid := range excluded {
		skip[pid] = true
	}
	found := map[int]process{}
	for len(roots) > 0 {
		pid := roots[0]
		roots = roots[1:]
		if _, ok := found[pid]; ok || skip[pid] {
			continue
		}
		if p, ok := all[pid]; ok {
			found[pid] = p
			roots = append(roots, children[pid]...)
		}
	}
	return found
}

// usage is memory of processes, in bytes.
type usage struct {
	pss, dirty, pageTables int64
	processes              int
}

// memoryOf adds up the memory of processes.
func memoryOf(processes map[int]process) (usage, error) {
	var u usage
	for pid := range processes {
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return u, err
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		u.pss += kilobytes(rollup, "Pss:")
		u.dirty += kilobytes(rollup, "Private_Dirty:")
		u.pageTables += kilobytes(status, "VmPTE:")
		u.processes++
	}
	return u, nil
}

// kilobytes finds a line like "Pss:   12 kB" and returns it in bytes.
func kilobytes(text []byte, key string) int64 {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(key)); ok {
			f := bytes.Fields(rest)
			n, _ := strconv.ParseInt(string(f[0]), 10, 64)
			return n << 10
		}
	}
	return 0
}

// cpuOf is the CPU time that the runtime's processes have used, and that of the
// daemon's children that have ended. A container's own that has ended is its
// monitor's child, and does not count.
func (t *target) cpuOf(ctx context.Context) (time.Duration, error) {
	processes, err := t.processes(ctx)
	if err != nil {
		return 0, err
	}
	daemon, err := t.daemon()
	sum := processes[daemon].ended
	for _, p := range processes {
		sum += p.cpu
	}
	return sum, err
}

// cpuClock reads the CPU time of everything in the cgroups that can be seen from
// here, the containers' own included, but for this process. On a host that is
// the whole machine: nothing else should run. In a cgroup namespace it is what is
// in there.
func cpuClock() (time.Duration, error) {
	all, err := cgroupCPU()
	if err != nil {
		return 0, err
	}
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		return 0, err
	}
	return all - time.Duration(own.Utime.Nano()+own.Stime.Nano()), nil
}

func cgroupCPU() (time.Duration, error) {
	for _, dir := range []string{"cpuacct", "cpu,cpuacct"} {
		if text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", dir, "cpuacct.usage")); err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			return time.Duration(n), err
		}
	}
	text, err := os.ReadFile("/sys/fs/cgroup/cpu.stat")
	if err != nil {
		return 0, fmt.Errorf("CPU time of the cgroups: %w", err)
	}
	var n int64
	if _, err := fmt.Sscanf(string(text), "usage_usec %d", &n); err != nil {
		return 0, fmt.Errorf("cpu.stat: %w", err)
	}
	return time.Duration(n) * time.Microsecond, nil
}
