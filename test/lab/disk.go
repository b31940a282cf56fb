package lab

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// SmallDisk mounts a file system in memory until the test ends, and returns where.
// The options are those of tmpfs, like "size=128m".
func SmallDisk(t testing.TB, options string) string {
	t.Helper()
	Require(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, options))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// FillDisk leaves so many bytes of a SmallDisk free, until free is called.
func FillDisk(t testing.TB, disk string, leave int64) (free func()) {
	t.Helper()
	f, err := os.Create(filepath.Join(disk, "ballast"))
	must(t, err)
	defer f.Close()
	// The daemon may take or free a page between the question and the answer.
	for range 100 {
		var fs unix.Statfs_t
		must(t, unix.Statfs(disk, &fs))
		err = unix.Fallocate(int(f.Fd()), 0, 0, max(1, int64(fs.Bavail)*fs.Bsize-leave))
		if err == nil {
			break
		}
	}
	must(t, err)
	return func() {
		if err := os.Remove(f.Name()); err != nil {
			t.Error(err)
		}
	}
}
