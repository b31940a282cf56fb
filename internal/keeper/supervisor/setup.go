package supervisor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper/link"
)

// errRuns says that another keeper serves in the directory.
var errRuns = errors.New("a keeper runs here already")

const (
	lockAttempts = 250
	lockPause    = 20 * time.Millisecond
)

// lockDir opens dir, which it makes if need be, and locks it for as long as the
// file is open in any process. If somebody else has it locked and answers, the
// error is errRuns; one who does not answer is coming up, or leaving and about to
// remove the directory, and is waited for.
func lockDir(dir string) (*os.File, error) {
	for range lockAttempts {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		f, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, dir) {
			return f, nil
		}
		if err != nil && answers(f) {
			f.Close()
			return nil, errRuns
		}
		f.Close()
		time.Sleep(lockPause)
	}
	return nil, fmt.Errorf("lock %s: somebody else has it and does not answer", dir)
}

// isAt tells whether path still names f.
func isAt(f *os.File, path string) bool {
	a, errA := f.Stat()
	b, errB := os.Stat(path)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

func answers(dir *os.File) bool {
	conn, err := net.Dial("unix", inDir(dir, link.SocketName))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// inDir is a path for name in dir that is short enough for a socket's address.
func inDir(dir *os.File, name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)
}

// listen makes the socket called name in dir, in place of a dead keeper's.
func listen(dir *os.File, name string) (*os.File, error) {
	path := inDir(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// hierarchies returns the roots of the cgroup hierarchies that a keeper has a
// cgroup of its own in. The cpuset of version 1 is left out: a new one there has
// no processors.
func hierarchies() ([]string, error) {
	const root = "/sys/fs/cgroup"
	if host.CgroupMode() == host.CgroupV2 {
		return []string{root}, nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "cpuset" {
			dirs = append(dirs, filepath.Join(root, e.Name()))
		}
	}
	return dirs, nil
}

func enterCgroup(path string) error {
	return moveTo(path, func(root string) error { return os.MkdirAll(filepath.Join(root, path), 0o755) })
}

// leaveCgroup moves this process to the top and removes its cgroup.
func leaveCgroup(path string) error {
	err := moveTo("/", nil)
	if errors.Is(err, unix.EBUSY) { // v2, in a cgroup namespace: below its root others have controllers
		err = joinFirst()
	}
	dirs, herr := hierarchies()
	errs := []error{err, herr}
	for _, root := range dirs {
		if err := os.Remove(filepath.Join(root, path)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// joinFirst moves this process to where process 1 is in cgroup v2.
func joinFirst() error {
	first, err := host.CgroupOf(1)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(first[""], "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("move to the cgroup of process 1: %w", err)
	}
	return nil
}

func moveTo(path string, prepare func(root string) error) error {
	dirs, err := hierarchies()
	if err != nil {
		return fmt.Errorf("move to cgroup %s: %w", path, err)
	}
	for _, root := range dirs {
		if prepare != nil {
			if err := prepare(root); err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
		}
		procs := filepath.Join(root, path, "cgroup.procs")
		if err := os.WriteFile(procs, strconv.AppendInt(nil, int64(os.Getpid()), 10), 0); err != nil {
			return fmt.Errorf("move to cgroup: %w", err)
		}
	}
	return nil
}
