// Package soak keeps a node busy for as long as it is told to, and fails if
// anything grows: memory, goroutines, open files, threads, files on disk, cgroups,
// mounts.
package soak

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

const (
	workers = 3  // that make and remove pods
	samples = 12 // taken of what Sampan uses, over the whole time

	metrics = "127.0.0.1:9111" // where the daemon shows its own figures
)

// TestSoak churns pods for SAMPAN_SOAK, a duration. Eight long-lived pods are
// there all the time; an image is pulled and removed again and again.
func TestSoak(t *testing.T) {
	duration := 20 * time.Second
	if text := os.Getenv("SAMPAN_SOAK"); text != "" {
		var err error
		duration, err = time.ParseDuration(text)
		must(t, err)
	}
	l := lab.New(t, lab.Options{Config: fmt.Sprintf("[metrics]\naddress = %q\n", metrics)})
	image := l.Pull(t, "busybox")
	for i := range 8 {
		config := l.PodConfig(fmt.Sprint("steady-", i))
		l.StartContainer(t, l.CreateContainer(t, l.RunPod(t, config), config, l.ContainerConfig("c", image, "sh", "-c", "while :; do echo tick; sleep 1; done")))
	}
	var done atomic.Int64
	churn := func(ctx context.Context) {
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), uint64(time.Now().UnixNano())))
				for ctx.Err() == nil && !t.Failed() {
					port := 20000 + w*10000 + r.IntN(10000) // nobody else's
					cycle(t, l, image, fmt.Sprintf("w%d-%d", w, done.Add(1)), port, r)
				}
			})
		}
		wg.Go(func() {
			for ctx.Err() == nil && !t.Failed() {
				l.Pull(t, "quay.io/sampan/variants:oci-gzip")
				l.RemoveImage(t, "quay.io/sampan/variants:oci-gzip")
				pause(ctx, 300*time.Millisecond)
			}
		})
		wg.Wait()
	}
	// What is made once and kept is made now.
	warm, cancel := context.WithTimeout(t.Context(), duration/4)
	churn(warm)
	cancel()

	var taken []usage
	begin := time.Now()
	for range samples {
		ctx, cancel := context.WithTimeout(t.Context(), duration*3/4/samples)
		churn(ctx)
		cancel()
		taken = append(taken, measure(t, l))
		t.Logf("%6v %5d pods %v", time.Since(begin).Round(time.Second), done.Load(), taken[len(taken)-1])
	}
	checkFlat(t, taken)
}

// cycle takes a pod through its life, in one of several ways.
func cycle(t *testing.T, l *lab.Lab, image, name string, port int, r *rand.Rand) {
	config := l.PodConfig(name)
	if r.IntN(2) == 0 {
		config.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: int32(port)}}
	}
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sh", "-c", "echo begin; sleep 1000"))
	l.StartContainer(t, id)
	switch r.IntN(4) {
	case 0:
		l.ExecSync(t, id, "sh", "-c", "head -c 100000 /dev/zero")
	case 1:
		_, err := l.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod})
		must(t, err)
	case 2:
		_, err := l.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
		must(t, err)
	case 3:
		_, err := l.Runtime.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
		must(t, err)
	}
	l.RemovePod(t, pod)
	must(t, os.RemoveAll(config.GetLogDirectory())) // as the kubelet does
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// usage is what Sampan uses at one moment.
type usage struct {
	daemon, keeper process
	goroutines     int // of the daemon
	files          int // in ROOT and STATE
	mounts         int
	cgroups        int
}

type process struct{ kib, files, threads int }

func (u usage) String() string {
	return fmt.Sprintf("daemon %v %d goroutines, keeper %v, %d files, %d mounts, %d cgroups", u.daemon, u.goroutines, u.keeper, u.files, u.mounts, u.cgroups)
}

func (p process) String() string {
	return fmt.Sprintf("%d KiB %d fds %d threads", p.kib, p.files, p.threads)
}

func (p *process) add(t *testing.T, pid int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		switch {
		case fields[0] == "VmRSS:":
			n, err := strconv.Atoi(fields[1])
			must(t, err)
			p.kib += n
		case fields[0] == "Threads:":
			n, err := strconv.Atoi(fields[1])
			must(t, err)
			p.threads += n
		}
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	for _, f := range open {
		// Files of cgroups are held for half a minute, a bounded number of them.
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name()))
		if err == nil && !strings.HasPrefix(to, "/sys/fs/cgroup/") {
			p.files++
		}
	}
}

func measure(t *testing.T, l *lab.Lab) usage {
	t.Helper()
	var u usage
	u.daemon.add(t, l.Pid())
	u.goroutines = goroutines(t)
	for _, role := range []string{"supervisor", "worker"} {
		for _, pid := range l.Keepers(t, role) {
			u.keeper.add(t, pid)
		}
	}
	for _, dir := range []string{l.Root, l.State} {
		u.files += count(t, dir, func(fs.DirEntry) bool { return true })
	}
	u.cgroups = count(t, "/sys/fs/cgroup", fs.DirEntry.IsDir)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	u.mounts = strings.Count(string(mounts), "\n")
	return u
}

// goroutines are those of the daemon.
func goroutines(t *testing.T) int {
	t.Helper()
	resp, err := http.Get("http://" + metrics + "/metrics")
	must(t, err)
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			n, err := strconv.Atoi(value)
			must(t, err)
			return n
		}
	}
	t.Fatal("the daemon does not tell of its goroutines")
	return 0
}

// count counts what is below a directory, but for the files of containers and
// images.
func count(t *testing.T, dir string, of func(fs.DirEntry) bool) int {
	t.Helper()
	n := 0
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil // gone meanwhile
		case d.IsDir() && (d.Name() == "tree" || d.Name() == "rootfs"):
			return fs.SkipDir
		case of(d):
			n++
		}
		return nil
	}))
	return n
}

// checkFlat compares the last third of the samples with the first, by the median,
// because each is of a moment.
func checkFlat(t *testing.T, taken []usage) {
	t.Helper()
	for what, figure := range map[string]struct {
		of    func(usage) int
		slack int // what is no growth
	}{
		"daemon's memory, KiB":    {func(u usage) int { return u.daemon.kib }, 8 << 10},
		"keeper's memory, KiB":    {func(u usage) int { return u.keeper.kib }, 4 << 10},
		"daemon's open files":     {func(u usage) int { return u.daemon.files }, 8},
		"keeper's open files":     {func(u usage) int { return u.keeper.files }, 8},
		"daemon's threads":        {func(u usage) int { return u.daemon.threads }, 6},
		"keeper's threads":        {func(u usage) int { return u.keeper.threads }, 6},
		"daemon's goroutines":     {func(u usage) int { return u.goroutines }, 20},
		"files in ROOT and STATE": {func(u usage) int { return u.files }, 40},
		"mounts":                  {func(u usage) int { return u.mounts }, 5},
		"cgroups":                 {func(u usage) int { return u.cgroups }, 15},
	} {
		median := func(part []usage) int {
			var all []int
			for _, u := range part {
				all = append(all, figure.of(u))
			}
			slices.Sort(all)
			return all[len(all)/2]
		}
		first, last := median(taken[:len(taken)/3]), median(taken[len(taken)*2/3:])
		if last > first+first/10+figure.slack {
			t.Errorf("%s: from %d to %d", what, first, last)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
