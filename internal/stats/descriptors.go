package stats

import (
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	counter = runtimeapi.MetricType_COUNTER
	gauge   = runtimeapi.MetricType_GAUGE
)

// commonLabels are what every metric has. They are named as in cAdvisor, and so
// are all metrics: what was made for the one works with the other.
var commonLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

// descriptor is a metric with the labels it has besides the common ones.
type descriptor struct {
	name   string
	kind   runtimeapi.MetricType
	help   string
	labels []string
}

var descriptors = []descriptor{
	{"container_blkio_device_usage_total", counter, "Bytes moved between the container and a block device, by operation.", []string{"device", "major", "minor", "operation"}},
	{"container_cpu_cfs_periods_total", counter, "Periods in which a CPU quota was enforced.", nil},
	{"container_cpu_cfs_throttled_periods_total", counter, "Periods in which the container used up its CPU quota.", nil},
	{"container_cpu_cfs_throttled_seconds_total", counter, "Time for which the container had no CPU because of its quota, in seconds.", nil},
	{"container_cpu_system_seconds_total", counter, "CPU time used in the kernel, in seconds.", nil},
	{"container_cpu_usage_seconds_total", counter, "CPU time used, in seconds.", []string{"cpu"}},
	{"container_cpu_user_seconds_total", counter, "CPU time used in user mode, in seconds.", nil},
	{"container_file_descriptors", gauge, "File descriptors that the container's processes have open.", nil},
	{"container_fs_inodes_free", gauge, "Free inodes of the file system that the container writes to.", []string{"device"}},
	{"container_fs_inodes_total", gauge, "Inodes of the file system that the container writes to.", []string{"device"}},
	{"container_fs_limit_bytes", gauge, "Size of the file system that the container writes to.", []string{"device"}},
	{"container_fs_reads_bytes_total", counter, "Bytes read from a block device.", []string{"device"}},
	{"container_fs_reads_total", counter, "Reads from a block device.", []string{"device"}},
	{"container_fs_usage_bytes", gauge, "Bytes in the container's writable layer.", []string{"device"}},
	{"container_fs_writes_bytes_total", counter, "Bytes written to a block device.", []string{"device"}},
	{"container_fs_writes_total", counter, "Writes to a block device.", []string{"device"}},
	{"container_hugetlb_max_usage_bytes", gauge, "The most huge pages that were in use at a time, in bytes; not known on cgroup v2.", []string{"pagesize"}},
	{"container_hugetlb_usage_bytes", gauge, "Huge pages in use, in bytes.", []string{"pagesize"}},
	{"container_last_seen", gauge, "When the container was last seen, in seconds since 1970.", nil},
	{"container_memory_cache", gauge, "Page cache, in bytes.", nil},
	{"container_memory_failcnt", counter, "How often memory use hit the limit.", nil},
	{"container_memory_failures_total", counter, "Page faults, by kind.", []string{"failure_type", "scope"}},
	{"container_memory_kernel_usage", gauge, "Memory used by the kernel for the container, in bytes.", nil},
	{"container_memory_mapped_file", gauge, "Files mapped into memory, in bytes.", nil},
	{"container_memory_max_usage_bytes", gauge, "The most memory that was in use at a time, in bytes.", nil},
	{"container_memory_rss", gauge, "Anonymous memory, in bytes.", nil},
	{"container_memory_swap", gauge, "Swap in use, in bytes.", nil},
	{"container_memory_usage_bytes", gauge, "Memory in use, in bytes, including page cache.", nil},
	{"container_memory_working_set_bytes", gauge, "Memory in use, in bytes, without page cache that was not used lately.", nil},
	{"container_network_receive_bytes_total", counter, "Bytes received.", []string{"interface"}},
	{"container_network_receive_errors_total", counter, "Errors while receiving.", []string{"interface"}},
	{"container_network_receive_packets_dropped_total", counter, "Packets dropped while receiving.", []string{"interface"}},
	{"container_network_receive_packets_total", counter, "Packets received.", []string{"interface"}},
	{"container_network_transmit_bytes_total", counter, "Bytes sent.", []string{"interface"}},
	{"container_network_transmit_errors_total", counter, "Errors while sending.", []string{"interface"}},
	{"container_network_transmit_packets_dropped_total", counter, "Packets dropped while sending.", []string{"interface"}},
	{"container_network_transmit_packets_total", counter, "Packets sent.", []string{"interface"}},
	{"container_oom_events_total", counter, "Processes that the kernel killed for want of memory.", nil},
	{"container_pressure_cpu_stalled_seconds_total", counter, "Time for which no process of the container could run for want of CPU, in seconds.", nil},
	{"container_pressure_cpu_waiting_seconds_total", counter, "Time for which some process of the container waited for CPU, in seconds.", nil},
	{"container_pressure_io_stalled_seconds_total", counter, "Time for which all processes of the container waited for I/O, in seconds.", nil},
	{"container_pressure_io_waiting_seconds_total", counter, "Time for which some process of the container waited for I/O, in seconds.", nil},
	{"container_pressure_memory_stalled_seconds_total", counter, "Time for which all processes of the container waited for memory, in seconds.", nil},
	{"container_pressure_memory_waiting_seconds_total", counter, "Time for which some process of the container waited for memory, in seconds.", nil},
	{"container_processes", gauge, "Processes of the container.", nil},
	{"container_sockets", gauge, "Sockets that the container's processes have open.", nil},
	{"container_spec_cpu_period", gauge, "Period of the CPU quota, in microseconds.", nil},
	{"container_spec_cpu_quota", gauge, "CPU time allowed in each period, in microseconds; absent if there is no quota.", nil},
	{"container_spec_cpu_shares", gauge, "CPU shares.", nil},
	{"container_spec_memory_limit_bytes", gauge, "Memory limit, in bytes; 0 if there is none.", nil},
	{"container_spec_memory_reservation_limit_bytes", gauge, "Memory that is protected from reclaim, in bytes; 0 if none is.", nil},
	{"container_spec_memory_swap_limit_bytes", gauge, "Swap limit, in bytes, on cgroup v1 of memory and swap together; 0 if there is none.", nil},
	{"container_start_time_seconds", gauge, "When the container was started, in seconds since 1970.", nil},
	{"container_threads", gauge, "Threads of the container.", nil},
	{"container_threads_max", gauge, "Threads the container may have; 0 if there is no limit.", nil},
	{"container_ulimits_soft", gauge, "Soft resource limits of the container's first process.", []string{"ulimit"}},
}

// Descriptors describes all metrics there may be.
func Descriptors() []*runtimeapi.MetricDescriptor {
	all := make([]*runtimeapi.MetricDescriptor, 0, len(descriptors))
	for _, d := range descriptors {
		all = append(all, &runtimeapi.MetricDescriptor{Name: d.name, Help: d.help, LabelKeys: slices.Concat(commonLabels, d.labels)})
	}
	return all
}

// metricKinds tells counters from gauges, by name.
var metricKinds = func() map[string]runtimeapi.MetricType {
	kinds := make(map[string]runtimeapi.MetricType, len(descriptors))
	for _, d := range descriptors {
		kinds[d.name] = d.kind
	}
	return kinds
}()
