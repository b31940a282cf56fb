package builtin_test

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// TestSealed: what a container may see as its program before it executes the
// user's is not the file that the keeper runs from (CVE-2019-5736).
func TestSealed(t *testing.T) {
	c := conformance.NewLab(t).Create(t, newRuntime(t), []string{"true"})
	var exe, self unix.Stat_t
	var fs unix.Statfs_t
	path := fmt.Sprintf("/proc/%d/exe", c.Started.Pid)
	for _, err := range []error{unix.Stat(path, &exe), unix.Stat("/proc/self/exe", &self), unix.Statfs(path, &fs)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if exe.Dev == self.Dev {
		t.Error("it is on the same file system as the program itself")
	}
	if fs.Type != unix.OVERLAYFS_SUPER_MAGIC && fs.Type != unix.TMPFS_MAGIC {
		t.Errorf("it is on a file system of type %#x, neither overlay nor a memfd's", fs.Type)
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC && fs.Flags&unix.ST_RDONLY == 0 {
		t.Error("the overlay is writable")
	}
}
