package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// hierarchy is one of the machine's cgroup mounts; there is one in cgroup v2.
type hierarchy struct {
	mountPoint string
	fs         string // "cgroup" or "cgroup2"
	options    string // of a v1 hierarchy: its controllers or name
}

// hierarchies reads the machine's cgroup mounts.
func hierarchies() ([]hierarchy, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []hierarchy
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f := strings.Fields(after) // file system, source, its options
		if len(f) != 3 || f[0] != "cgroup" && f[0] != "cgroup2" {
			continue
		}
		h := hierarchy{mountPoint: strings.Fields(before)[4], fs: f[0]}
		if h.fs == "cgroup" {
			h.options = v1Options(f[2])
		}
		if strings.HasPrefix(h.mountPoint, cgroupRoot) {
			all = append(all, h)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no cgroups are mounted below " + cgroupRoot)
	}
	return all, nil
}

// v1Options is what a v1 hierarchy is mounted again with.
func v1Options(super string) string {
	options := slices.DeleteFunc(strings.Split(super, ","), func(o string) bool {
		return o == "rw" || o == "ro" || o == "xattr" || o == "seclabel" || o == "clone_children" || strings.HasPrefix(o, "release_agent=")
	})
	if len(options) == 1 && strings.HasPrefix(options[0], "name=") {
		options = append(options, "none")
	}
	return strings.Join(options, ",")
}

// enterCgroups moves this process into a cgroup of the lab's own in every
// hierarchy, makes that the root of a new cgroup namespace, and mounts the
// hierarchies again as they are seen from there. The processes of the lab sit in
// the leaf /tests, since a cgroup with children may not have any. Only the calling
// thread sees it, and what is started from there; the caller stays on it.
func enterCgroups(name string) error {
	runtime.LockOSThread()
	all, err := hierarchies()
	if err != nil {
		return err
	}
	if all[0].mountPoint == cgroupRoot {
		if err := enableControllers(); err != nil {
			return err
		}
	}
	if err := join(all, name); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroups: %w", err)
	}
	if err := join(all, name+"/tests"); err != nil {
		return err
	}
	links, err := symlinks(cgroupRoot)
	if err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if all[0].mountPoint == cgroupRoot { // v2, of which there cannot be two on one place
		if err := unix.Unmount(cgroupRoot, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", cgroupRoot, err)
		}
	} else { // v1 or hybrid: a tmpfs of mount points
		if err := unix.Mount("tmpfs", cgroupRoot, "tmpfs", flags, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", cgroupRoot, err)
		}
	}
	for _, h := range all {
		if err := os.MkdirAll(h.mountPoint, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(h.fs, h.mountPoint, h.fs, flags, h.options); err != nil {
			return fmt.Errorf("mount %s (%s): %w", h.mountPoint, h.options, err)
		}
	}
	for link, target := range links {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// enableControllers has the lab's cgroup get every controller of cgroup v2. On a host with
// systemd those are there that some unit has a setting for.
func enableControllers() error {
	text, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for controller := range strings.FieldsSeq(string(text)) {
		if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+"+controller), 0o644); err != nil {
			return fmt.Errorf("enable cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

// join makes a cgroup in every hierarchy and moves this process there.
func join(all []hierarchy, name string) error {
	for _, h := range all {
		dir := filepath.Join(h.mountPoint, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// A v1 cpuset starts empty, and nothing can run in it.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
			if h.fs != "cgroup" || err != nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, file), bytes.TrimSpace(parent), 0o644); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("join %s: %w", dir, err)
		}
	}
	return nil
}

// symlinks are the links in a directory, like cpu -> cpu,cpuacct.
func symlinks(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	links := map[string]string{}
	for _, e := range entries {
		if e.Type() == fs.ModeSymlink {
			path := filepath.Join(dir, e.Name())
			if links[path], err = os.Readlink(path); err != nil {
				return nil, err
			}
		}
	}
	return links, err
}

// removeCgroups removes the lab's cgroups when its last process is gone.
func removeCgroups(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		top := filepath.Join(h.mountPoint, name)
		for range 100 {
			var dirs []string
			err = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil // gone meanwhile
			})
			for _, dir := range slices.Backward(dirs) {
				err = errors.Join(err, ignore(unix.Rmdir(dir), unix.ENOENT))
			}
			if err == nil {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", top, err)
		}
	}
	return nil
}
