package stats

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// BenchmarkContainers reads the figures of 100 containers in real cgroups.
func BenchmarkContainers(b *testing.B) {
	roots, err := host.CgroupRoots()
	if err != nil {
		b.Fatal(err)
	}
	name := fmt.Sprintf("/sampan-stats-benchmark-%d", os.Getpid())
	for _, controller := range []string{"", "cpuacct", "memory"} {
		root, ok := roots[controller]
		if !ok {
			continue
		}
		if err := os.Mkdir(root+name, 0o755); err != nil {
			b.Skip("cannot make cgroups: ", err)
		}
		b.Cleanup(func() { os.Remove(root + name) })
		for i := range 100 {
			dir := filepath.Join(root+name, fmt.Sprint(i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { os.Remove(dir) })
		}
	}
	c := collector(b, roots)
	dir := b.TempDir()
	all := make([]Container, 100)
	for i := range all {
		all[i] = Container{ID: fmt.Sprint(i), Alive: true, Cgroup: name + "/" + fmt.Sprint(i), Writable: dir}
	}
	start := cpuTime(b)
	for b.Loop() {
		for _, st := range Map(all, c.Container) {
			if st.Memory == nil && host.CgroupMode() != host.CgroupV2 {
				b.Fatal("no figures")
			}
		}
	}
	b.ReportMetric(float64((cpuTime(b)-start).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

// cpuTime is what this process has used, which tells more than the clock on a busy
// machine.
func cpuTime(b *testing.B) time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
