package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
)

// TestNoGrowth runs pods through their whole life again and again. No process of
// Sampan may have more open files at the end than it had after the first few.
func TestNoGrowth(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	cycle := func(i int) {
		t.Helper()
		config := l.PodConfig(fmt.Sprint("pod-", i))
		pod := l.RunPod(t, config)
		id := l.CreateContainer(t, pod, config, l.ContainerConfig("box", image, "sleep", "1000"))
		l.StartContainer(t, id)
		l.ExecSync(t, id, "true")
		l.RemovePod(t, pod)
	}
	for i := range 3 {
		cycle(i)
	}
	checkGrowth(t, l, "15 more pods", func() {
		for i := range 15 {
			cycle(10 + i)
		}
	})
}

// checkGrowth fails if doing something leaves the daemon or a keeper with more
// open files than before.
func checkGrowth(t *testing.T, l *lab.Lab, what string, do func()) {
	t.Helper()
	pids := append(append(l.Keepers(t, "supervisor"), l.Keepers(t, "worker")...), l.Pid())
	before := openFiles(t, pids)
	do()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		grown := ""
		for pid, n := range openFiles(t, pids) {
			if n > before[pid] {
				what, _ := exec.Command("ls", "-l", fmt.Sprintf("/proc/%d/fd", pid)).Output()
				grown += fmt.Sprintf(" process %d has %d open files, had %d:\n%s", pid, n, before[pid], what)
			}
		}
		if grown == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s:%s", what, grown)
		}
	}
}

// openFiles counts the open files of processes. Handles of processes do not count:
// some are Go's own, who closes them when it collects garbage.
func openFiles(t *testing.T, pids []int) map[int]int {
	t.Helper()
	n := map[int]int{}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if to, err := os.Readlink(filepath.Join(dir, f.Name())); err == nil && to != "anon_inode:[pidfd]" {
				n[pid]++
			}
		}
	}
	return n
}
