package stats

import (
	"fmt"
	"os"
	"testing"
	"time"

	"sampan.dev/sampan/internal/host"
)

// openFilesHere counts what this process has open.
func openFilesHere(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestFilesAreHeldAndClosed(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		before := openFilesHere(t)
		for range 3 {
			c.cgroups.usage("/pod/c1")
			c.cgroups.usage("/pod/none")
		}
		if n := openFilesHere(t) - before; n == 0 || n > usageFiles {
			t.Errorf("%d files are held, want those of one cgroup", n)
		}
		c.cgroups.tidy() // too early
		if len(c.cgroups.held) != 1 || c.cgroups.idle == nil {
			t.Errorf("tidied too early, or will not come again")
		}
		c.cgroups.held["/pod/c1"].used = time.Now().Add(-2 * holdTime)
		c.cgroups.tidy()
		if n := openFilesHere(t) - before; n != 0 || c.cgroups.idle != nil {
			t.Errorf("%d files are held when nobody has read them for long", n)
		}
	})
}

func TestNotAllFilesAreHeld(t *testing.T) {
	c := collector(t, recorded(t, "v2"))
	c.cgroups.most = 0
	before := openFilesHere(t)
	for range 2 {
		if u := c.cgroups.usage("/pod/c1"); !u.hasCPU || !u.hasMemory {
			t.Errorf("no figures: %v", u)
		}
	}
	if n := openFilesHere(t) - before; n != 0 {
		t.Errorf("%d files are held, want none", n)
	}
}

// A cgroup may go, and another of its name may come.
func TestCgroupComesBack(t *testing.T) {
	roots, err := host.CgroupRoots()
	if err != nil {
		t.Fatal(err)
	}
	root, ok := roots["cpuacct"]
	if !ok {
		root = roots[""] // which has at least the CPU time
	}
	name := fmt.Sprintf("/sampan-stats-test-%d", os.Getpid())
	if err := os.Mkdir(root+name, 0o755); err != nil {
		t.Skip("cannot make cgroups: ", err)
	}
	t.Cleanup(func() { os.Remove(root + name) })
	c := collector(t, roots)
	for i, want := range []bool{true, false, true} {
		var err error
		switch i {
		case 1:
			err = os.Remove(root + name)
		case 2:
			err = os.Mkdir(root+name, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		if u := c.cgroups.usage(name); u.hasCPU != want {
			t.Errorf("step %d: has figures: %v, want %v", i, u.hasCPU, want)
		}
	}
}
