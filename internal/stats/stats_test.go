package stats

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recorded returns the roots of recorded hierarchies.
func recorded(t testing.TB, version string) map[string]string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join("testdata", version))
	if err != nil {
		t.Fatal(err)
	}
	if version == "v2" {
		return map[string]string{"": dir}
	}
	roots := make(map[string]string)
	for _, c := range []string{"cpu", "cpuacct", "memory", "blkio", "pids", "hugetlb"} {
		roots[c] = filepath.Join(dir, c)
	}
	roots[""] = filepath.Join(dir, "unified")
	return roots
}

func collector(t testing.TB, roots map[string]string) *Collector {
	t.Helper()
	c := New(Config{Cgroups: roots, Filesystem: "/fs", Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(c.Close)
	return c
}

func eachVersion(t *testing.T, test func(t *testing.T, c *Collector)) {
	for _, version := range []string{"v1", "v2"} {
		t.Run(version, func(t *testing.T) { test(t, collector(t, recorded(t, version))) })
	}
}

// What a cgroup of one version says, one of the other says in other words.
func TestContainer(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		got := c.Container(Container{ID: "c1", Alive: true, Cgroup: "/pod/c1", Attributes: &runtimeapi.ContainerAttributes{Id: "c1"}})
		psi := func(some, full uint64) *runtimeapi.PsiStats {
			return &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{Total: some}, Full: &runtimeapi.PsiData{Total: full}}
		}
		cpu := psi(1500000000, 500000000)
		cpu.Some.Avg10, cpu.Some.Avg60, cpu.Some.Avg300 = 1.5, 0.75, 0.25
		cpu.Full.Avg10, cpu.Full.Avg60, cpu.Full.Avg300 = 0.5, 0.25, 0.1
		want := &runtimeapi.ContainerStats{
			Attributes: &runtimeapi.ContainerAttributes{Id: "c1"},
			Cpu:        &runtimeapi.CpuUsage{UsageCoreNanoSeconds: number(12345678000), Psi: cpu},
			Memory: &runtimeapi.MemoryUsage{
				WorkingSetBytes: number(20971520 - 6291456), AvailableBytes: number(67108864 - (20971520 - 6291456)), UsageBytes: number(20971520),
				RssBytes: number(8388608), PageFaults: number(4242), MajorPageFaults: number(42), Psi: psi(3000000000, 2000000000),
			},
			Swap:          &runtimeapi.SwapUsage{SwapUsageBytes: number(4096), SwapAvailableBytes: number(1048576 - 4096)},
			Io:            &runtimeapi.IoUsage{Psi: psi(7000000000, 6000000000)},
			WritableLayer: &runtimeapi.FilesystemUsage{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/fs"}, UsedBytes: number(0), InodesUsed: number(0)},
		}
		for _, at := range []int64{got.GetCpu().GetTimestamp(), got.GetMemory().GetTimestamp(), got.GetSwap().GetTimestamp(), got.GetIo().GetTimestamp(), got.GetWritableLayer().GetTimestamp()} {
			if d := time.Since(time.Unix(0, at)); d < 0 || d > time.Minute {
				t.Errorf("a timestamp is %v old", d)
			}
		}
		ignore := []cmp.Option{protocmp.Transform()}
		for _, m := range []any{&runtimeapi.CpuUsage{}, &runtimeapi.MemoryUsage{}, &runtimeapi.SwapUsage{}, &runtimeapi.IoUsage{}, &runtimeapi.FilesystemUsage{}} {
			ignore = append(ignore, protocmp.IgnoreFields(m.(proto.Message), "timestamp"))
		}
		if diff := cmp.Diff(want, got, ignore...); diff != "" {
			t.Error(diff)
		}
	})
}

func TestContainerThatIsGone(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		for _, ctr := range []Container{{ID: "a", Alive: true, Cgroup: "/pod/none"}, {ID: "b", Cgroup: "/pod/c1"}} {
			if got := c.Container(ctr); got.Cpu != nil || got.Memory != nil || got.Swap != nil || got.Io != nil {
				t.Errorf("container %s has figures: %v", ctr.ID, got)
			}
		}
	})
}

func TestUnlimited(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"memory.current": "4096\n", "memory.max": "max\n", "memory.swap.current": "0\n", "memory.swap.max": "max\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := collector(t, map[string]string{"": dir})
	got := c.Container(Container{ID: "a", Alive: true, Cgroup: "/"})
	if got.Memory == nil || got.Memory.AvailableBytes != nil || got.Swap == nil || got.Swap.SwapAvailableBytes != nil {
		t.Errorf("without limits: %v, %v; want nothing available", got.Memory, got.Swap)
	}
}

func TestCPURate(t *testing.T) {
	start := time.Now()
	sample := func(after time.Duration, used time.Duration) cpuSample {
		return cpuSample{start.Add(after), uint64(used)}
	}
	const none = -1
	tests := []struct {
		name    string
		since   time.Time
		samples []cpuSample
		want    []float64 // cores
	}{
		{"first without a beginning", time.Time{}, []cpuSample{sample(0, time.Second)}, []float64{none}},
		{"first since the beginning", start, []cpuSample{sample(2*time.Second, time.Second)}, []float64{0.5}},
		{"first after long", start.Add(-time.Hour), []cpuSample{sample(0, time.Minute)}, []float64{none}},
		{"two", time.Time{}, []cpuSample{sample(0, 0), sample(10*time.Second, 20*time.Second)}, []float64{none, 2}},
		{"twice in a row keeps the window", time.Time{},
			[]cpuSample{sample(0, 0), sample(10*time.Second, 10*time.Second), sample(10*time.Second+time.Millisecond, 10*time.Second)},
			[]float64{none, 1, 1}},
		{"a window of its own each", time.Time{},
			[]cpuSample{sample(0, 0), sample(10*time.Second, 10*time.Second), sample(20*time.Second, 10*time.Second)},
			[]float64{none, 1, 0}},
		{"counter starts anew", time.Time{}, []cpuSample{sample(0, time.Hour), sample(10*time.Second, 0)}, []float64{none, none}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := collector(t, nil)
			for i, s := range tt.samples {
				got, ok := c.cpuRate("id", tt.since, s)
				cores := float64(got) / 1e9
				if !ok {
					cores = none
				}
				if d := cores - tt.want[i]; d > 0.001 || d < -0.001 {
					t.Errorf("rate %d is %v, want %v", i, cores, tt.want[i])
				}
			}
		})
	}
}

func TestForget(t *testing.T) {
	c := collector(t, recorded(t, "v2"))
	for _, id := range []string{"a", "b"} {
		c.Container(Container{ID: id, Alive: true, Cgroup: "/pod/c1"})
	}
	c.Forget(1, func(id string) bool { return id == "b" })
	if len(c.cpu) != 1 || len(c.layers.known) != 1 || c.cpu["b"] == nil {
		t.Errorf("remembers %d CPU figures and %d layers, want b's", len(c.cpu), len(c.layers.known))
	}
}

func TestWritableLayer(t *testing.T) {
	c := collector(t, nil)
	small, large := t.TempDir(), t.TempDir()
	for i := range layerSmall + 10 {
		if err := os.Mkdir(filepath.Join(large, string(rune('a'+i))), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(small, "file"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := c.layers.usage("small", small); got.GetInodesUsed().GetValue() != 2 || got.GetUsedBytes().GetValue() == 0 {
		t.Errorf("small layer: %v, want 2 inodes and some bytes at once", got)
	}
	if got := c.layers.usage("large", large); got != nil {
		t.Errorf("large layer is known at once: %v", got)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		got := c.layers.usage("large", large)
		if got.GetInodesUsed().GetValue() == layerSmall+11 {
			break
		}
		if got != nil || time.Now().After(deadline) {
			t.Fatalf("large layer: %v, want %d inodes", got, layerSmall+11)
		}
	}
}

func TestMap(t *testing.T) {
	for _, n := range []int{0, 1, minShare, 10 * minShare} {
		list := make([]int, n)
		for i := range list {
			list[i] = i
		}
		for i, got := range Map(list, func(i int) int { return 2 * i }) {
			if got != 2*i {
				t.Fatalf("of %d, number %d is %d", n, i, got)
			}
		}
	}
}

func TestProcesses(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		got, err := c.cgroups.processes("/pod/c1")
		if diff := cmp.Diff([]int{101, 102, 103}, got); diff != "" || err != nil {
			t.Errorf("processes of a cgroup and the one below: %v %s", err, diff)
		}
	})
}

func FuzzPressure(f *testing.F) {
	f.Add([]byte("some avg10=0.00 avg60=0.12 avg300=0.05 total=116533\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"))
	f.Add([]byte("some avg10=x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pressure(data)
		for range pairs(data) {
		}
		trafficV2(data)
		parseLink(data)
		parseID(data)
	})
}
