package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// metricNames are what critest wants of a container with limits. It does so in
// versions after the one that the conformance tests run.
const metricNames = `
blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total
cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total file_descriptors fs_inodes_free
fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total fs_usage_bytes fs_writes_bytes_total
fs_writes_total hugetlb_max_usage_bytes hugetlb_usage_bytes last_seen memory_cache memory_failcnt
memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap
memory_usage_bytes memory_working_set_bytes network_receive_bytes_total network_receive_errors_total
network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total
network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total
oom_events_total pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total
pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total
pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares
spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes start_time_seconds
threads threads_max ulimits_soft`

func TestStats(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	podConfig := l.PodConfig("measured")
	podConfig.Labels = map[string]string{"app": "measured"}
	pod := l.RunPod(t, podConfig)
	config := l.ContainerConfig("busy", image, "sh", "-c", "dd if=/dev/zero of=/written bs=1k count=1000; sync; while :; do :; done")
	config.Labels = map[string]string{"work": "hard"}
	const limit = 64 << 20
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 1024, MemoryLimitInBytes: limit, MemorySwapLimitInBytes: limit,
	}
	busy := l.CreateContainer(t, pod, podConfig, config)
	l.StartContainer(t, busy)
	created := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("created", image, "true"))
	ended := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("ended", image, "true"))
	l.StartContainer(t, ended)
	l.AwaitExit(t, ended, 10*time.Second)
	time.Sleep(3 * time.Second) // of work

	t.Run("container", func(t *testing.T) { containerFigures(t, l, busy, limit) })
	t.Run("list", func(t *testing.T) { listedContainers(t, l, pod, busy, created, ended) })
	t.Run("pod", func(t *testing.T) { podFigures(t, l, pod) })
	t.Run("metrics", func(t *testing.T) { podMetrics(t, l, pod) })
	t.Run("crictl", func(t *testing.T) {
		for _, tt := range []struct{ command, text string }{
			{"stats", busy[:13]}, {"statsp", pod[:13]}, {"metricsp", "container_memory_rss"}, {"metricdescs", "container_memory_rss"},
		} {
			if out, _, err := l.Crictl(tt.command); err != nil || !strings.Contains(out, tt.text) {
				t.Errorf("crictl %s: %v, %q", tt.command, err, out)
			}
		}
	})

	if _, err := l.Runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	r, err := l.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil || r.GetStats().GetLinux().GetCpu() != nil {
		t.Errorf("a stopped pod: %v, %v; want one without figures", r, err)
	}
}

func containerFigures(t *testing.T, l *lab.Lab, id string, limit uint64) {
	r, err := l.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	st := r.GetStats()
	if st.GetAttributes().GetId() != id || st.GetAttributes().GetMetadata().GetName() != "busy" || st.GetAttributes().GetLabels()["work"] != "hard" {
		t.Errorf("attributes %v", st.GetAttributes())
	}
	within := func(what string, got *runtimeapi.UInt64Value, low, high float64) {
		t.Helper()
		if v := float64(got.GetValue()); got == nil || v < low || v > high {
			t.Errorf("%s is %v, want %v to %v", what, got, low, high)
		}
	}
	within("CPU time", st.GetCpu().GetUsageCoreNanoSeconds(), 0.1e9, 5e9)
	within("CPU rate of one that may use 0.2", st.GetCpu().GetUsageNanoCores(), 0.05e9, 0.3e9)
	within("working set", st.GetMemory().GetWorkingSetBytes(), 4096, float64(limit))
	within("available memory", st.GetMemory().GetAvailableBytes(), 1<<20, float64(limit))
	within("memory", st.GetMemory().GetUsageBytes(), 1<<20, float64(limit)) // with the pages of the file
	within("page faults", st.GetMemory().GetPageFaults(), 10, 1e6)
	within("writable layer", st.GetWritableLayer().GetUsedBytes(), 1000<<10, 1100<<10)
	within("inodes", st.GetWritableLayer().GetInodesUsed(), 2, 20)

	if _, err = l.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: "none"}); err == nil {
		t.Error("an unknown container has figures")
	}
}

func listedContainers(t *testing.T, l *lab.Lab, pod, busy, created, ended string) {
	for _, tt := range []struct {
		name   string
		filter *runtimeapi.ContainerStatsFilter
		want   []string
	}{
		{"all", nil, []string{busy, created, ended}},
		{"pod", &runtimeapi.ContainerStatsFilter{PodSandboxId: pod[:20]}, []string{busy, created, ended}},
		{"id", &runtimeapi.ContainerStatsFilter{Id: created}, []string{created}},
		{"label", &runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{"work": "hard"}}, []string{busy}},
		{"id and label", &runtimeapi.ContainerStatsFilter{Id: created, LabelSelector: map[string]string{"work": "hard"}}, nil},
	} {
		r, err := l.Runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{Filter: tt.filter})
		if err != nil {
			t.Fatal(err)
		}
		stream, err := l.Runtime.StreamContainerStats(t.Context(), &runtimeapi.StreamContainerStatsRequest{Filter: tt.filter})
		streamed := collect(t, stream, err, (*runtimeapi.StreamContainerStatsResponse).GetContainerStats)
		for kind, list := range map[string][]*runtimeapi.ContainerStats{"list": r.GetStats(), "stream": streamed} {
			var got []string
			for _, st := range list {
				id := st.GetAttributes().GetId()
				got = append(got, id)
				if alive := id != ended; alive != (st.GetCpu() != nil) || alive != (st.GetMemory() != nil) || st.GetWritableLayer() == nil {
					t.Errorf("%s: container %.8s is alive: %v; figures: %v", kind, id, alive, st)
				}
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("%s by %s: %v, want %v", kind, tt.name, got, tt.want)
			}
		}
	}
}

// collect reads a stream to its end.
func collect[R, T any](t *testing.T, stream grpc.ServerStreamingClient[R], err error, items func(*R) []T) []T {
	t.Helper()
	var all []T
	for err == nil {
		var r *R
		if r, err = stream.Recv(); err == nil {
			if len(items(r)) == 0 {
				t.Error("a message without items")
			}
			all = append(all, items(r)...)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return all
}

func podFigures(t *testing.T, l *lab.Lab, pod string) {
	r, err := l.Runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{
		Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "measured"}},
	})
	if err != nil || len(r.GetStats()) != 1 || r.GetStats()[0].GetAttributes().GetId() != pod {
		t.Fatalf("pods with the label: %v, %v", r.GetStats(), err)
	}
	st := r.GetStats()[0].GetLinux()
	if st.GetCpu().GetUsageCoreNanoSeconds().GetValue() < 0.1e9 || st.GetMemory().GetUsageBytes().GetValue() < 1<<20 || len(st.GetContainers()) != 3 {
		t.Errorf("CPU, memory, containers: %v, %v, %d", st.GetCpu(), st.GetMemory(), len(st.GetContainers()))
	}
	if n := st.GetProcess().GetProcessCount().GetValue(); n != 2 { // one runs, one waits for its start
		t.Errorf("%d processes, want 2", n)
	}
	if eth0 := st.GetNetwork().GetDefaultInterface(); eth0.GetName() != "eth0" || eth0.GetTxBytes() == nil || len(st.GetNetwork().GetInterfaces()) != 0 {
		t.Errorf("network: %v, want eth0 alone", st.GetNetwork())
	}
	stream, err := l.Runtime.StreamPodSandboxStats(t.Context(), &runtimeapi.StreamPodSandboxStatsRequest{})
	if all := collect(t, stream, err, (*runtimeapi.StreamPodSandboxStatsResponse).GetPodSandboxStats); len(all) != 1 || all[0].GetAttributes().GetId() != pod {
		t.Errorf("stream: %v", all)
	}
}

func podMetrics(t *testing.T, l *lab.Lab, pod string) {
	d, err := l.Runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]int)
	for _, d := range d.GetDescriptors() {
		keys[d.GetName()] = len(d.GetLabelKeys())
	}
	r, err := l.Runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(r.GetPodMetrics()) != 1 || r.GetPodMetrics()[0].GetPodSandboxId() != pod {
		t.Fatalf("metrics: %v, %v; want those of the pod", r, err)
	}
	pm := r.GetPodMetrics()[0]
	all := pm.GetMetrics()
	for _, c := range pm.GetContainerMetrics() {
		all = append(all, c.GetMetrics()...)
	}
	seen := make(map[string]bool)
	for _, m := range all {
		seen[m.GetName()] = true
		if keys[m.GetName()] != len(m.GetLabelValues()) {
			t.Errorf("%s has %d labels, described are %d", m.GetName(), len(m.GetLabelValues()), keys[m.GetName()])
		}
	}
	for name := range strings.FieldsSeq(metricNames) {
		// Only what reached a disk counts there, and the disk may be none.
		optional := strings.HasPrefix(name, "blkio_") || strings.HasPrefix(name, "fs_reads") || strings.HasPrefix(name, "fs_writes")
		if name = "container_" + name; keys[name] == 0 || !seen[name] && !optional {
			t.Errorf("%s: described %v, there %v", name, keys[name] != 0, seen[name])
		}
	}
	stream, err := l.Runtime.StreamPodSandboxMetrics(t.Context(), &runtimeapi.StreamPodSandboxMetricsRequest{})
	if all := collect(t, stream, err, (*runtimeapi.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics); len(all) != 1 || all[0].GetPodSandboxId() != pod {
		t.Errorf("stream: %v", all)
	}
}

// BenchmarkStats asks for the figures of 100 running containers.
func BenchmarkStats(b *testing.B) {
	l := lab.New(b, lab.Options{})
	image := l.Pull(b, "busybox")
	for i := range 100 {
		config := l.PodConfig(fmt.Sprint("pod-", i))
		pod := l.RunPod(b, config)
		l.StartContainer(b, l.CreateContainer(b, pod, config, l.ContainerConfig("box", image, "sleep", "100000")))
	}
	for name, call := range map[string]func(context.Context) error{
		"ListContainerStats": func(ctx context.Context) error {
			_, err := l.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return err
		},
		"ListPodSandboxStats": func(ctx context.Context) error {
			_, err := l.Runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return err
		},
		"ListPodSandboxMetrics": func(ctx context.Context) error {
			_, err := l.Runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
			return err
		},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := call(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
