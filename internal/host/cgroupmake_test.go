package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// TestMakeCgroup: a process can enter a cgroup as soon as it is made, whatever of it
// and of those above it was there.
func TestMakeCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("probe: cgroups can be made by root only")
	}
	if CgroupMode() == CgroupV2 || !isDir("/sys/fs/cgroup/cpuset") {
		t.Skip("probe: there are no cpusets of cgroup v1")
	}
	own, err := CgroupOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	below := func(name string) Cgroup {
		c := make(Cgroup)
		for controller, dir := range own {
			c[controller] = filepath.Join(dir, name)
		}
		return c
	}
	top := fmt.Sprintf("sampan-make-%d", os.Getpid())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := below(top).Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	// The second finds the directories above; the third one without processors.
	for _, name := range []string{"/a/b", "/a/c", "/bare/d"} {
		if name == "/bare/d" {
			if err := os.Mkdir(below(top + "/bare")["cpuset"], 0o755); err != nil {
				t.Fatal(err)
			}
		}
		c := below(top + name)
		for range 2 {
			if err := c.Make(); err != nil {
				t.Fatal(err)
			}
		}
		enter(t, c)
		cpus, err := os.ReadFile(filepath.Join(c["cpuset"], "cpuset.cpus"))
		above, err2 := os.ReadFile(filepath.Join(own["cpuset"], "cpuset.cpus"))
		if err != nil || err2 != nil || !bytes.Equal(cpus, above) {
			t.Errorf("%s has the processors %q, not %q; errors %v, %v", name, cpus, above, err, err2)
		}
	}
}

// enter moves a process into all directories of a cgroup, and ends it.
func enter(t *testing.T, c Cgroup) {
	t.Helper()
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	for controller, dir := range c {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Errorf("enter %q: %v", controller, err)
		}
	}
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
