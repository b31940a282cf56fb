package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// OwnDisk gives the lab's files a file system of their own, as large as said: ext4 as
// mkfs makes it, with a journal, as nodes have it. To be called before New; the disk
// goes with the lab.
//
// What is measured is then not at the mercy of the file system of whoever measures:
// without a journal, ext4 looks for minutes at every inode that was freed before it
// gives a file a new one, which makes a file ten times as expensive after an
// image was removed.
func OwnDisk(t testing.TB, size int64) {
	t.Helper()
	Require(t)
	file := filepath.Join(workDir(), "disk")
	f, err := os.Create(file)
	must(t, err)
	defer f.Close()
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, size))
	program(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", file)
	device := program(t, "losetup", "--find", "--show", "--direct-io=on", file)
	must(t, unix.Mount(device, workDir(), "ext4", 0, ""))
	program(t, "losetup", "--detach", device) // when it is unmounted, which the lab's end does
}

// program runs a program that must succeed, and returns what it says.
func program(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatal(fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out))
	}
	return strings.TrimSpace(string(out))
}
