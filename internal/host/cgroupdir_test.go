package host

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// newCgroup makes a cgroup below the test's own, in every hierarchy.
func newCgroup(t *testing.T) Cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("probe: cgroups can be made by root only")
	}
	own, err := CgroupOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	c := make(Cgroup)
	name := "sampan-test-" + strconv.Itoa(os.Getpid())
	for controller, dir := range own {
		if controller == "cpuset" { // needs its cpus set before a process may come
			continue
		}
		c[controller] = filepath.Join(dir, name)
		if err := os.Mkdir(c[controller], 0o755); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := c.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := c.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

// spawn runs a shell script in the cgroup and reaps it in the end.
func spawn(t *testing.T, c Cgroup, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", "read line; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-done })
	for _, dir := range c.dirs() {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	in.Close()
	return cmd
}

func TestCgroupKillWinsAgainstForks(t *testing.T) {
	for _, how := range []string{"cgroup.kill", "freezer"} {
		t.Run(how, func(t *testing.T) {
			c := newCgroup(t)
			if how == "freezer" {
				if c["freezer"] == "" {
					t.Skip("probe: no v1 freezer is mounted")
				}
				delete(c, "") // without the unified hierarchy there is no cgroup.kill
			}
			if dir := c["pids"]; dir != "" {
				if err := os.WriteFile(filepath.Join(dir, "pids.max"), []byte("64"), 0); err != nil {
					t.Fatal(err)
				}
			}
			spawn(t, c, "while :; do sleep 0.001 & done")
			waitFor(t, func() bool { pids, _ := c.Pids(); return len(pids) > 5 })

			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if err := c.Kill(ctx); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
			if pids, err := c.Pids(); err != nil || len(pids) > 0 {
				t.Fatalf("after Kill: pids %v, error %v", pids, err)
			}
		})
	}
}

func TestCgroupSignalReachesEveryProcess(t *testing.T) {
	c := newCgroup(t)
	spawn(t, c, "sleep 60 & sleep 60 & wait")
	waitFor(t, func() bool { pids, _ := c.Pids(); return len(pids) == 3 })
	if n, err := c.Signal(unix.SIGTERM); n != 3 || err != nil {
		t.Fatalf("reached %d, error %v; want 3", n, err)
	}
	waitFor(t, func() bool { pids, _ := c.Pids(); return len(pids) == 0 })
}

func TestCgroupRemoveTakesWhatIsBelow(t *testing.T) {
	c := newCgroup(t)
	for _, dir := range c.dirs() {
		if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for range 2 {
		if err := c.Remove(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range c.dirs() {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is still there (%v)", dir, err)
		}
	}
	if pids, err := c.Pids(); err != nil || pids != nil {
		t.Errorf("of a cgroup that is gone: pids %v, error %v", pids, err)
	}
}

func TestCgroupDir(t *testing.T) {
	mounts := []*mountinfo.Info{
		{FSType: "cgroup2", Root: "/", Mountpoint: "/sys/fs/cgroup/unified"},
		{FSType: "cgroup", Root: "/", Mountpoint: "/sys/fs/cgroup/cpu,cpuacct", VFSOptions: "rw,cpu,cpuacct"},
		{FSType: "cgroup", Root: "/docker/x", Mountpoint: "/sys/fs/cgroup/memory", VFSOptions: "rw,memory"},
	}
	for _, tc := range []struct {
		controller, path, want string
		ok                     bool
	}{
		{"", "/a", "/sys/fs/cgroup/unified/a", true},
		{"cpuacct", "/a/b", "/sys/fs/cgroup/cpu,cpuacct/a/b", true},
		{"memory", "/docker/x/a", "/sys/fs/cgroup/memory/a", true},
		{"memory", "/elsewhere", "", false},
		{"pids", "/a", "", false},
	} {
		if got, ok := cgroupDir(mounts, tc.controller, tc.path); got != tc.want || ok != tc.ok {
			t.Errorf("%s %s: %q, %v; want %q, %v", tc.controller, tc.path, got, ok, tc.want, tc.ok)
		}
	}
}

func TestCgroupDirsListsEachOnce(t *testing.T) {
	c := Cgroup{"cpu": "/x/cpu,cpuacct", "cpuacct": "/x/cpu,cpuacct", "": "/x/unified", "memory": "/x/memory", "rdma": ""}
	if got, want := c.dirs(), []string{"/x/unified", "/x/cpu,cpuacct", "/x/memory"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for range 500 {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it did not come true in 5 s")
}
