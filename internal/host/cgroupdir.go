package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Cgroup is one cgroup as the directories that stand for it, by controller: ""
// is the unified hierarchy, which in v2 is the only one and in a hybrid layout
// one more. The nil Cgroup has no processes.
//
// Its processes are those in any of the directories and below: a process that
// was moved into only some hierarchies, because whoever moved it died meanwhile,
// is one of them.
type Cgroup map[string]string

// CgroupOf returns the cgroup that holds the process pid, as far as its
// directories can be seen from here.
func CgroupOf(pid int) (Cgroup, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("cgroup of process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
	}
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, fmt.Errorf("cgroup of process %d: list mounts: %w", pid, err)
	}
	c := make(Cgroup)
	for line := range strings.Lines(string(data)) {
		// 4:cpu,cpuacct:/path
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		for controller := range strings.SplitSeq(fields[1], ",") {
			if dir, ok := cgroupDir(mounts, controller, fields[2]); ok {
				c[controller] = dir
			}
		}
	}
	return c, nil
}

// cgroupDir finds the directory of a path in the hierarchy of a controller.
func cgroupDir(mounts []*mountinfo.Info, controller, path string) (string, bool) {
	for _, m := range mounts {
		if controller == "" && m.FSType != "cgroup2" {
			continue
		}
		if controller != "" && (m.FSType != "cgroup" || !slices.Contains(strings.Split(m.VFSOptions, ","), controller)) {
			continue
		}
		if rel, ok := strings.CutPrefix(path, strings.TrimSuffix(m.Root, "/")); ok {
			return filepath.Join(m.Mountpoint, rel), true
		}
	}
	return "", false
}

// dirs returns the directories, each once, the unified one first.
func (c Cgroup) dirs() []string {
	var dirs []string
	for _, dir := range c {
		if dir != "" && dir != c[""] {
			dirs = append(dirs, dir)
		}
	}
	slices.Sort(dirs)
	dirs = slices.Compact(dirs)
	if c[""] != "" {
		dirs = slices.Insert(dirs, 0, c[""])
	}
	return dirs
}

// Pids returns the processes in the cgroup and below, each once. A cgroup that
// is gone has none.
func (c Cgroup) Pids() ([]int, error) {
	var pids []int
	for _, dir := range c.dirs() {
		err := walkCgroup(dir, func(dir string) error {
			more, err := procs(dir)
			pids = append(pids, more...)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("list processes of cgroup %s: %w", dir, err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

func procs(dir string) ([]int, error) {
	data, err := readNow(filepath.Join(dir, "cgroup.procs"))
	if isGone(err) || errors.Is(err, unix.EOPNOTSUPP) { // the latter in a threaded cgroup, whose processes the domain above lists
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var pids []int
	for field := range bytes.FieldsSeq(data) {
		// 0 is a process that this PID namespace cannot name.
		if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// walkCgroup calls fn with dir and every directory below, parents first. What
// disappears meanwhile is skipped.
func walkCgroup(dir string, fn func(dir string) error) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		if isGone(err) {
			return nil
		}
		return &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if err := fn(dir); err != nil {
		return err
	}
	if st.Nlink <= 2 {
		return nil // no directories below: worth knowing, as there are many files
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !isGone(err) {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := walkCgroup(filepath.Join(dir, e.Name()), fn); err != nil {
			return err
		}
	}
	return nil
}

func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// Signal sends sig to every process in the cgroup and below. One that forks
// meanwhile may have a child that gets none. It returns how many it reached.
func (c Cgroup) Signal(sig unix.Signal) (int, error) {
	pids, err := c.Pids()
	if err != nil || len(pids) == 0 {
		return 0, err
	}
	handles := make(map[int]int, len(pids))
	defer func() {
		for _, fd := range handles {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			handles[pid] = fd
		}
	}
	// A handle may be that of a stranger who got the pid in between. One whose
	// pid is in the cgroup now is not: then either the handle's process is in the
	// cgroup, or it is dead already.
	if pids, err = c.Pids(); err != nil {
		return 0, err
	}
	var reached int
	var errs []error
	for _, pid := range pids {
		fd, ok := handles[pid]
		if !ok {
			continue
		}
		switch err := unix.PidfdSendSignal(fd, sig, nil, 0); {
		case err == nil:
			reached++
		case !errors.Is(err, unix.ESRCH):
			errs = append(errs, fmt.Errorf("signal process %d: %w", pid, err))
		}
	}
	return reached, errors.Join(errs...)
}

// killPause is how long Kill and Remove wait before they look again, at first
// and at most.
const (
	killPauseMin = 200 * time.Microsecond
	killPauseMax = 20 * time.Millisecond
)

// Kill kills every process in the cgroup and below, also those that fork as
// fast as they can, and returns when none is left but zombies.
func (c Cgroup) Kill(ctx context.Context) error {
	for pause := killPauseMin; ; pause = min(2*pause, killPauseMax) {
		left, err := c.kill()
		if err != nil {
			return fmt.Errorf("kill: %w", err)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill: %d processes do not die: %w", left, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// kill signals everything once and returns how many processes there were.
func (c Cgroup) kill() (int, error) {
	if pids, err := c.Pids(); err != nil || len(pids) == 0 {
		return 0, err
	}
	if dir := c[""]; dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err == nil {
			// For those who are not in this hierarchy (yet), and those who cannot die
			// because they are frozen in another one.
			defer c.freeze("THAWED")
			return c.Signal(unix.SIGKILL)
		}
	}
	// Nobody forks while frozen; frozen processes die when thawed.
	c.freeze("FROZEN")
	defer c.freeze("THAWED")
	return c.Signal(unix.SIGKILL)
}

func (c Cgroup) freeze(state string) {
	if dir := c["freezer"]; dir != "" {
		// Without a freezer the loop in Kill has to win against forks alone.
		_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte(state), 0)
	}
}

// freezeTick is how often Freeze looks, and asks again.
const freezeTick = time.Millisecond

// Freeze stops all processes in the cgroup and below, and returns when none of
// them runs any more. On error they all go on. The error is ErrNotImplemented if
// there is no freezer.
func (c Cgroup) Freeze(ctx context.Context) error {
	for {
		frozen, err := c.tryFreeze()
		if err == nil && frozen {
			return nil
		}
		if err == nil {
			select {
			case <-ctx.Done():
				err = context.Cause(ctx)
			case <-time.After(freezeTick):
				continue
			}
		}
		return errors.Join(fmt.Errorf("freeze cgroup: %w", err), c.Thaw())
	}
}

// tryFreeze asks for all processes to be frozen, and reports whether they are.
func (c Cgroup) tryFreeze() (bool, error) {
	if dir := c["freezer"]; dir != "" {
		// Asked again each time: a process that was forked meanwhile may have
		// escaped.
		if err := os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("FROZEN"), 0); err != nil {
			return false, err
		}
		state, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
		return strings.TrimSpace(string(state)) == "FROZEN", err
	}
	if c[""] == "" {
		return false, fmt.Errorf("no freezer controller: %w", errdefs.ErrNotImplemented)
	}
	if err := os.WriteFile(filepath.Join(c[""], "cgroup.freeze"), []byte("1"), 0); err != nil {
		return false, err
	}
	events, err := os.ReadFile(filepath.Join(c[""], "cgroup.events"))
	return strings.Contains(string(events), "frozen 1"), err
}

// Thaw undoes Freeze. A cgroup that is not frozen, or gone, is no error.
func (c Cgroup) Thaw() error {
	path, value := "", ""
	switch {
	case c["freezer"] != "":
		path, value = filepath.Join(c["freezer"], "freezer.state"), "THAWED"
	case c[""] != "":
		path, value = filepath.Join(c[""], "cgroup.freeze"), "0"
	default:
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil && !isGone(err) {
		return fmt.Errorf("thaw cgroup: %w", err)
	}
	return nil
}

// Remove removes the cgroup with all below it. It must have no processes left,
// but those that are just about to vanish are waited for. A cgroup that is gone
// is no error.
func (c Cgroup) Remove(ctx context.Context) error {
	for _, dir := range c.dirs() {
		if err := removeCgroup(ctx, dir); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
	return nil
}

func removeCgroup(ctx context.Context, dir string) error {
	for pause := killPauseMin; ; pause = min(2*pause, killPauseMax) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		var below []string
		if err := walkCgroup(dir, func(d string) error { below = append(below, d); return nil }); err != nil {
			return err
		}
		for _, d := range slices.Backward(below) {
			_ = unix.Rmdir(d) // what stays shows when its parent is next
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// Vacate moves the processes of a v2 cgroup at dir into one below it, which it
// makes: only then can cgroups below dir have controllers.
func Vacate(dir, below string) error {
	if err := os.Mkdir(filepath.Join(dir, below), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("vacate cgroup: %w", err)
	}
	for range 100 {
		pids, err := procs(dir)
		if err != nil {
			return fmt.Errorf("vacate cgroup: %w", err)
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			err := os.WriteFile(filepath.Join(dir, below, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("vacate cgroup: %w", err)
			}
		}
	}
	return fmt.Errorf("vacate cgroup %s: processes come as fast as they go: %w", dir, errdefs.ErrUnavailable)
}

// OOMKills returns how many processes of the cgroup the kernel has killed for
// want of memory; in v2 those of the cgroups below count too. The error is
// ErrNotFound if the cgroup is gone and ErrNotImplemented if it has no memory
// controller.
func (c Cgroup) OOMKills() (uint64, error) {
	path := filepath.Join(c["memory"], "memory.oom_control")
	if c["memory"] == "" {
		path = filepath.Join(c[""], "memory.events")
	}
	data, err := os.ReadFile(path)
	if isGone(err) {
		if _, err := os.Stat(filepath.Dir(path)); isGone(err) {
			return 0, fmt.Errorf("count OOM kills: cgroup: %w", errdefs.ErrNotFound)
		}
		return 0, fmt.Errorf("count OOM kills: no memory controller: %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		return 0, fmt.Errorf("count OOM kills: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, fmt.Errorf("count OOM kills: %s has no such line: %w", path, errdefs.ErrNotImplemented)
}
