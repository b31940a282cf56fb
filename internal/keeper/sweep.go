package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/keeper/link"
)

// Trace is what there is of a keeper.
type Trace struct {
	Name       string
	Alive      bool
	Containers []string // ids
}

// Traces lists the keepers that have a directory in dir, dead ones too.
func Traces(dir string) ([]Trace, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for keepers: %w", err)
	}
	var traces []Trace
	for _, e := range entries {
		t := Trace{Name: e.Name()}
		lock, err := lockDead(filepath.Join(dir, t.Name))
		switch {
		case err != nil:
			return nil, fmt.Errorf("look for keeper %s: %w", t.Name, err)
		case lock == nil:
			t.Alive = true
		default:
			lock.Close()
		}
		containers, err := os.ReadDir(filepath.Join(dir, t.Name, link.ContainersDir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("look for keeper %s: %w", t.Name, err)
		}
		for _, c := range containers {
			t.Containers = append(t.Containers, c.Name())
		}
		traces = append(traces, t)
	}
	return traces, nil
}

// lockDead locks a keeper's directory; nil if a keeper has it locked. A directory
// that is gone is as good as locked.
func lockDead(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	return f, nil
}

// Bury removes what a keeper has left that died without a container: its
// directory in dir, unless it is coming up again.
func Bury(dir, name string) error {
	path := filepath.Join(dir, name)
	lock, err := lockDead(path)
	if err != nil || lock == nil {
		return err
	}
	// Who waits for the lock finds that the directory is another, or gone.
	defer lock.Close()
	containers, err := os.ReadDir(filepath.Join(path, link.ContainersDir))
	if err == nil && len(containers) > 0 {
		return nil
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove what keeper %s has left: %w", name, err)
	}
	return nil
}

// BuryCgroups removes the cgroups of keepers that are gone. The pattern is that
// of their names, with one * for the keeper's; a keeper is known if it has a
// directory in dir. One that has just removed its own, or not made it yet, is in
// its cgroup and keeps it.
func BuryCgroups(dir, pattern string) error {
	stale, err := StaleCgroups(dir, pattern)
	errs := []error{err}
	for _, path := range stale {
		if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// StaleCgroups lists the directories of such cgroups.
func StaleCgroups(dir, pattern string) ([]string, error) {
	before, after, _ := strings.Cut(pattern, "*")
	var stale []string
	for _, hierarchy := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		paths, err := filepath.Glob(filepath.Join(hierarchy, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), strings.TrimPrefix(before, "/")), after)
			if _, err := os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
				stale = append(stale, path)
			}
		}
	}
	return stale, nil
}
