package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// maxStacked bounds how many mounts on one path Unmount takes off.
const maxStacked = 64

// Unmount takes every mount off path, at once for new users of the path and
// lazily for those who still have files open. A path that is absent or no mount
// point is no error.
func Unmount(path string) error {
	for range maxStacked {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return fmt.Errorf("unmount %s: more than %d mounts on it", path, maxStacked)
}

// MountPoints returns the mount points at or below dir, deepest first, each as
// often as something is mounted on it.
func MountPoints(dir string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != dir && !strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(dir, "/")+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("list mounts under %s: %w", dir, err)
	}
	points := make([]string, 0, len(mounts))
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	slices.SortStableFunc(points, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return points, nil
}

// UnmountUnder takes every mount at or below dir off. It goes on after an error
// and returns all of them. It tries every name that it finds in dir, which may hold
// no more than a few: the list of all mounts takes the longer the more pods there
// are, and others who mount wait for its reader. Nothing that is mounted is
// looked into, so that it may hang.
func UnmountUnder(dir string) error {
	if err := Unmount(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			errs = append(errs, UnmountUnder(path))
		} else {
			errs = append(errs, Unmount(path))
		}
	}
	return errors.Join(errs...)
}

// Propagation reports whether the mount that holds path propagates its mounts
// to peers (shared), and whether it receives mounts from a master (slave).
func Propagation(path string) (shared, slave bool, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil {
		return false, false, fmt.Errorf("propagation of %s: %w", path, err)
	}
	var holder *mountinfo.Info
	for _, m := range mounts {
		if holder == nil || len(m.Mountpoint) >= len(holder.Mountpoint) {
			holder = m
		}
	}
	if holder == nil {
		return false, false, fmt.Errorf("propagation of %s: no mount holds it", path)
	}
	return strings.Contains(holder.Optional, "shared:"), strings.Contains(holder.Optional, "master:"), nil
}
