// Package reset removes everything that Sampan has made on a host, with no
// daemon running and whatever state things are in. It knows where the other
// packages put what they make, by name only, and must not need any of their
// records: those may be what is broken.
package reset

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// Target says what was made where.
type Target struct {
	Root  string // the daemon's ROOT
	State string // the daemon's STATE
	// RemoveNetwork takes the built-in network off the host.
	RemoveNetwork func() error
	// UnloadProfile takes the AppArmor profile from the kernel.
	UnloadProfile func() error
	NetNS         string // directory where pods' network namespaces are pinned
	Cgroup        string // what the cgroups of pods that have no parent are called, before "-" and the start of their id
	Keepers       string // pattern of the keepers' cgroups
	Marks         string // pattern of files; the directories they stand in are removed
	Plugins       string // directory of the socket for plugins; removed if nothing is in it
}

// All removes everything, going on after an error. What is absent is no error,
// so it can be called again. The kubelet's files and what CNI plugins keep for
// themselves are not touched.
func All(ctx context.Context, t Target) error {
	if err := killAll(ctx, t); err != nil {
		return err // as long as they live, they make things anew
	}
	ids, err := pods(t)
	failed := []error{
		err,
		removeNetNS(t.NetNS, ids),
		unmountBelow(t.State),
		unmountBelow(t.Root),
		t.RemoveNetwork(),
		removeCgroups(t, ids),
		t.UnloadProfile(),
	}
	marks, err := filepath.Glob(t.Marks)
	failed = append(failed, err)
	for _, mark := range marks {
		failed = append(failed, removeTree(filepath.Dir(mark)))
	}
	for _, dir := range []string{t.State, t.Root} {
		failed = append(failed, removeTree(dir))
	}
	if err := os.Remove(t.Plugins); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// killAll ends the keepers and whatever runs in containers. Keepers start each
// other anew and containers fork, so all are stopped before the first is killed.
func killAll(ctx context.Context, t Target) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		processes, err := owned(t)
		if err != nil {
			return err
		}
		if len(processes) == 0 {
			return nil
		}
		for _, signal := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
			for _, p := range processes {
				if err := kill(p, signal); err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill: %d processes do not end: %w", len(processes), ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func kill(p host.Process, signal unix.Signal) error {
	fd, err := p.Open()
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer fd.Close()
	if err := fd.Signal(signal); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill process %d: %w", p.Pid, err)
	}
	return nil
}

// owned finds the processes that are ours: their program is in ROOT/bin, or
// their root file system has its writable layer in ROOT.
func owned(t Target) ([]host.Process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var processes []host.Process
	for _, dir := range dirs {
		exe, _ := os.Readlink(filepath.Join(dir, "exe"))
		mounts, _ := os.ReadFile(filepath.Join(dir, "mountinfo"))
		if !strings.HasPrefix(exe, filepath.Join(t.Root, "bin")+"/") && !rootIsIn(t.Root, string(mounts)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, err := host.Identify(pid)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		processes = append(processes, p)
	}
	return processes, nil
}

// rootIsIn reads a process' mountinfo: is "/" an overlay of something in dir?
func rootIsIn(dir, mountinfo string) bool {
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		if len(fields) < 5 || fields[4] != "/" {
			continue
		}
		options := fields[len(fields)-1] // upperdir=DIR,lowerdir=DIR:DIR,...
		if strings.Contains(options, "="+dir+"/") || strings.Contains(options, ":"+dir+"/") {
			return true
		}
	}
	return false
}

// pods returns the ids of all pods there is a trace of. A second daemon on the
// host has others.
func pods(t Target) ([]string, error) {
	seen := map[string]bool{}
	for _, dir := range []string{filepath.Join(t.Root, "pods"), filepath.Join(t.State, "pods")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			seen[e.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

func removeNetNS(dir string, ids []string) error {
	var failed []error
	for _, id := range ids {
		failed = append(failed, host.Unpin(filepath.Join(dir, "sampan-"+id[:min(16, len(id))])))
	}
	return errors.Join(failed...)
}

// removeCgroups removes the keepers' and pods' cgroups in every hierarchy, from
// the leaves up.
func removeCgroups(t Target, ids []string) error {
	names := []string{t.Keepers}
	for _, id := range ids {
		names = append(names, t.Cgroup+"-"+id[:min(16, len(id))])
	}
	var failed []error
	for _, hierarchy := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		for _, name := range names {
			dirs, err := filepath.Glob(filepath.Join(hierarchy, name))
			if err != nil {
				return err
			}
			for _, dir := range dirs {
				failed = append(failed, removeCgroup(dir))
			}
		}
	}
	return errors.Join(failed...)
}

// removeCgroup removes a cgroup and those below it. One with processes is left:
// ours are dead, so they are those of another daemon.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for _, d := range slices.Backward(dirs) {
		if rm := unix.Rmdir(d); rm != nil && !errors.Is(rm, unix.ENOENT) && !errors.Is(rm, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", d, rm)
		}
	}
	return err
}

// unmountBelow unmounts what is mounted below dir, not on it: the directory
// itself may be a disk of its own.
func unmountBelow(dir string) error {
	points, err := pointsBelow(dir)
	if err != nil {
		return err
	}
	var failed []error
	for _, point := range points {
		failed = append(failed, host.Unmount(point))
	}
	return errors.Join(failed...)
}

func pointsBelow(dir string) ([]string, error) {
	points, err := host.MountPoints(dir)
	return slices.DeleteFunc(points, func(p string) bool { return p == dir }), err
}

// removeTree removes a directory of ours, but nothing that is mounted in it. Of
// one that is a disk of its own it leaves the mount point.
func removeTree(dir string) error {
	points, err := pointsBelow(dir)
	if err != nil {
		return err
	}
	if len(points) > 0 {
		return fmt.Errorf("remove %s: %s is still mounted: %w", dir, strings.Join(points, ", "), errdefs.ErrFailedPrecondition)
	}
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
