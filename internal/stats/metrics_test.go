package stats

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// machine makes /sys and /proc as they would be on the recorded machine.
func machine(t *testing.T, c *Collector) {
	t.Helper()
	c.sys, c.proc = t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		"kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":    "8\n",
		"kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "0\n",
		"dev/block/259:0/uevent":                               "MAJOR=259\nMINOR=0\nDEVNAME=nvme0n1\nDEVTYPE=disk\n",
	} {
		file := filepath.Join(c.sys, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for pid, targets := range map[string][]string{"101": {"/dev/null", "pipe:[7]", "socket:[8]"}, "102": {"socket:[9]"}} {
		dir := filepath.Join(c.proc, pid, "fd")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for i, target := range targets {
			if err := os.Symlink(target, filepath.Join(dir, fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func recordedPod(t *testing.T) Pod {
	return Pod{
		ID: "p1", Alive: true, Cgroup: "/pod", CreatedAt: time.Now(),
		Attributes: &runtimeapi.PodSandboxAttributes{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web-0", Namespace: "shop"}},
		Containers: []Container{
			{
				ID: "c1", Alive: true, Cgroup: "/pod/c1", Image: "nginx:1", Writable: t.TempDir(), StartedAt: time.Unix(1700000000, 0),
				Attributes: &runtimeapi.ContainerAttributes{Metadata: &runtimeapi.ContainerMetadata{Name: "web"}},
				Resources:  &runtimeapi.LinuxContainerResources{CpuShares: 1024},
			},
			{ID: "c2", Cgroup: "/pod/c1"}, // has exited
		},
	}
}

// The values by name and the labels that are not common to all.
func values(t *testing.T, labels []string, list []*runtimeapi.Metric) map[string]uint64 {
	t.Helper()
	got := make(map[string]uint64)
	for _, m := range list {
		if !slices.Equal(m.LabelValues[:len(commonLabels)], labels) {
			t.Errorf("%s has labels %v", m.Name, m.LabelValues)
		}
		key := strings.Join(append([]string{m.Name}, m.LabelValues[len(commonLabels):]...), " ")
		if _, twice := got[key]; twice {
			t.Errorf("%s is there twice", key)
		}
		got[key] = m.Value.Value
	}
	return got
}

func TestMetrics(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		machine(t, c)
		p := recordedPod(t)
		pm := c.Metrics(p)
		if len(pm.ContainerMetrics) != 1 || pm.ContainerMetrics[0].ContainerId != "c1" {
			t.Fatalf("metrics of containers %v, want those of c1", pm.ContainerMetrics)
		}
		got := values(t, []string{"web", "/pod/c1", "nginx:1", "c1", "shop", "web-0"}, pm.ContainerMetrics[0].Metrics)
		if d := uint64(time.Now().Unix()) - got["container_last_seen"]; d > 60 {
			t.Errorf("seen %d s ago", d)
		}
		delete(got, "container_last_seen")
		for key := range got { // of the machine that runs the test
			if strings.HasPrefix(key, "container_fs_") && !strings.HasSuffix(key, "/dev/nvme0n1") {
				delete(got, key)
			}
		}
		want := map[string]uint64{
			"container_start_time_seconds":                                1700000000,
			"container_cpu_usage_seconds_total total":                     12,
			"container_cpu_user_seconds_total":                            10,
			"container_cpu_system_seconds_total":                          2,
			"container_cpu_cfs_periods_total":                             120,
			"container_cpu_cfs_throttled_periods_total":                   7,
			"container_cpu_cfs_throttled_seconds_total":                   2,
			"container_memory_usage_bytes":                                20971520,
			"container_memory_working_set_bytes":                          14680064,
			"container_memory_rss":                                        8388608,
			"container_memory_swap":                                       4096,
			"container_memory_cache":                                      10485760,
			"container_memory_mapped_file":                                2097152,
			"container_memory_kernel_usage":                               1048576,
			"container_memory_max_usage_bytes":                            31457280,
			"container_memory_failcnt":                                    11,
			"container_memory_failures_total pgfault hierarchy":           4242,
			"container_memory_failures_total pgmajfault hierarchy":        42,
			"container_memory_failures_total pgfault container":           4242,
			"container_memory_failures_total pgmajfault container":        42,
			"container_oom_events_total":                                  1,
			"container_pressure_cpu_waiting_seconds_total":                1,
			"container_pressure_cpu_stalled_seconds_total":                0,
			"container_pressure_memory_waiting_seconds_total":             3,
			"container_pressure_memory_stalled_seconds_total":             2,
			"container_pressure_io_waiting_seconds_total":                 7,
			"container_pressure_io_stalled_seconds_total":                 6,
			"container_spec_cpu_period":                                   100000,
			"container_spec_cpu_quota":                                    20000,
			"container_spec_cpu_shares":                                   1024,
			"container_spec_memory_limit_bytes":                           67108864,
			"container_spec_memory_reservation_limit_bytes":               0,
			"container_spec_memory_swap_limit_bytes":                      1048576,
			"container_threads":                                           5,
			"container_threads_max":                                       0,
			"container_processes":                                         3,
			"container_file_descriptors":                                  4,
			"container_sockets":                                           2,
			"container_hugetlb_usage_bytes 2MB":                           2097152,
			"container_hugetlb_max_usage_bytes 2MB":                       0,
			"container_hugetlb_usage_bytes 1GB":                           0,
			"container_hugetlb_max_usage_bytes 1GB":                       0,
			"container_fs_reads_bytes_total /dev/nvme0n1":                 1048576,
			"container_fs_reads_total /dev/nvme0n1":                       10,
			"container_fs_writes_bytes_total /dev/nvme0n1":                2097152,
			"container_fs_writes_total /dev/nvme0n1":                      20,
			"container_blkio_device_usage_total /dev/nvme0n1 259 0 Read":  1048576,
			"container_blkio_device_usage_total /dev/nvme0n1 259 0 Write": 2097152,
		}
		if c.cgroups.v1() {
			want["container_memory_failures_total pgfault container"] = 4000
			want["container_memory_failures_total pgmajfault container"] = 40
			want["container_spec_memory_swap_limit_bytes"] = 68157440
			want["container_hugetlb_max_usage_bytes 2MB"] = 4194304
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// Every metric that is described is there for a pod that has all there is, and
// every one that is there is described with its labels.
func TestDescriptors(t *testing.T) {
	labels := make(map[string]int)
	for _, d := range Descriptors() {
		if d.Help == "" || len(d.LabelKeys) < len(commonLabels) || labels[d.Name] != 0 {
			t.Errorf("descriptor %v", d)
		}
		labels[d.Name] = len(d.LabelKeys)
	}
	if len(labels) != 56 {
		t.Errorf("%d metrics are described, want 56", len(labels))
	}
	eachVersion(t, func(t *testing.T, c *Collector) {
		machine(t, c)
		p := recordedPod(t)
		p.NetNS = podNetwork(t)
		pm := c.Metrics(p)
		missing := make(map[string]bool)
		for name := range labels {
			missing[name] = true
		}
		delete(missing, "container_ulimits_soft") // needs a process
		for _, m := range append(pm.Metrics, pm.ContainerMetrics[0].Metrics...) {
			if n, ok := labels[m.Name]; !ok || n != len(m.LabelValues) {
				t.Errorf("%s has %d labels, described are %d", m.Name, len(m.LabelValues), n)
			}
			delete(missing, m.Name)
		}
		if len(missing) > 0 {
			t.Errorf("missing: %v", missing)
		}
	})
}

func TestProcessesOfThisTest(t *testing.T) {
	m := metrics{labels: make([]string, len(commonLabels))}
	m.addProcesses("/proc", []int{os.Getpid()}, os.Getpid())
	got := values(t, m.labels, m.list)
	if got["container_processes"] != 1 || got["container_file_descriptors"] < 3 || got["container_ulimits_soft max_open_files"] == 0 {
		t.Errorf("figures of this process: %v", got)
	}
}

func TestPod(t *testing.T) {
	eachVersion(t, func(t *testing.T, c *Collector) {
		p := recordedPod(t)
		p.Cgroup = "/pod/c1"
		got := c.Pod(p)
		if got.Linux.GetProcess().GetProcessCount().GetValue() != 3 || len(got.Linux.GetContainers()) != 2 || got.Linux.Network != nil ||
			got.Linux.GetMemory().GetUsageBytes().GetValue() != 20971520 || got.Linux.GetCpu().GetTimestamp() == 0 || got.Linux.GetIo().GetPsi() == nil {
			t.Errorf("pod: %v", got)
		}
		p.Alive = false
		if got := c.Pod(p); got.Linux.Cpu != nil || got.Linux.Process != nil || c.Metrics(p).ContainerMetrics != nil {
			t.Errorf("stopped pod: %v", got)
		}
	})
}
