package stats

import (
	"bytes"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// metrics collects the metrics of one container or pod.
type metrics struct {
	labels []string // values of commonLabels
	list   []*runtimeapi.Metric
}

func (m *metrics) add(name string, v uint64, labels ...string) {
	m.list = append(m.list, &runtimeapi.Metric{
		Name: name, MetricType: metricKinds[name], Value: number(v), LabelValues: slices.Concat(m.labels, labels),
	})
}

// Metrics returns the metrics of a pod that is alive and of its containers that
// are. Those of the pod itself have no container's name; they include those of its
// containers.
func (c *Collector) Metrics(p Pod) *runtimeapi.PodSandboxMetrics {
	pm := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.ID}
	if !p.Alive {
		return pm
	}
	meta := p.Attributes.GetMetadata()
	m := metrics{labels: []string{"", p.Cgroup, "", "", meta.GetNamespace(), meta.GetName()}}
	m.addUsage(c.cgroups.usage(p.Cgroup))
	for _, l := range c.podLinks(p) {
		m.addLink(l)
	}
	pm.Metrics = m.list
	for _, ctr := range p.Containers {
		if !ctr.Alive {
			continue
		}
		m := metrics{labels: []string{ctr.Attributes.GetMetadata().GetName(), ctr.Cgroup, ctr.Image, ctr.ID, meta.GetNamespace(), meta.GetName()}}
		c.addContainer(&m, ctr)
		pm.ContainerMetrics = append(pm.ContainerMetrics, &runtimeapi.ContainerMetrics{ContainerId: ctr.ID, Metrics: m.list})
	}
	return pm
}

func (m *metrics) addLink(l link) {
	for direction, n := range map[string]linkCounters{"receive": l.rx, "transmit": l.tx} {
		name := "container_network_" + direction
		m.add(name+"_bytes_total", n.bytes, l.name)
		m.add(name+"_packets_total", n.packets, l.name)
		m.add(name+"_errors_total", n.errors, l.name)
		m.add(name+"_packets_dropped_total", n.dropped, l.name)
	}
}

func (c *Collector) addContainer(m *metrics, ctr Container) {
	m.add("container_last_seen", uint64(time.Now().Unix()))
	if !ctr.StartedAt.IsZero() {
		m.add("container_start_time_seconds", uint64(ctr.StartedAt.Unix()))
	}
	m.addUsage(c.cgroups.usage(ctr.Cgroup))
	r := &reader{}
	m.addFiles(c.cgroups, r, ctr.Cgroup)
	m.addCPULimits(c.cgroups, r, ctr)
	m.addHugepages(c.cgroups, r, ctr.Cgroup, c.sys)
	c.addDevices(m, r, ctr.Cgroup)
	c.addFilesystem(m, ctr)
	if pids, err := c.cgroups.processes(ctr.Cgroup); err == nil {
		m.addProcesses(c.proc, pids, ctr.Pid)
	}
}

// addUsage adds what the statistics have as well.
func (m *metrics) addUsage(u usage) {
	if u.hasCPU {
		m.add("container_cpu_usage_seconds_total", u.cpu/1e9, "total")
	}
	if u.hasMemory {
		m.add("container_memory_usage_bytes", u.memory)
		m.add("container_memory_working_set_bytes", minus(u.memory, u.inactiveFile))
		m.add("container_memory_rss", u.anonymous)
		m.add("container_memory_swap", u.swap)
	}
	for resource, psi := range map[string]*runtimeapi.PsiStats{"cpu": u.cpuPressure, "memory": u.memoryPressure, "io": u.ioPressure} {
		if psi != nil {
			m.add("container_pressure_"+resource+"_waiting_seconds_total", psi.GetSome().GetTotal()/1e9)
			m.add("container_pressure_"+resource+"_stalled_seconds_total", psi.GetFull().GetTotal()/1e9)
		}
	}
}

// source is where a metric's value is: alone in a file, or after a key.
type source struct {
	metric           string
	controller, file string
	key              string
	unit             uint64 // what to divide by
	labels           []string
}

var faultLabels = [][]string{{"pgfault", "container"}, {"pgmajfault", "container"}, {"pgfault", "hierarchy"}, {"pgmajfault", "hierarchy"}}

// Sources of the same file stand together.
var sourcesV1 = []source{
	{"container_cpu_user_seconds_total", "cpuacct", "cpuacct.usage_user", "", 1e9, nil},
	{"container_cpu_system_seconds_total", "cpuacct", "cpuacct.usage_sys", "", 1e9, nil},
	{"container_cpu_cfs_periods_total", "cpu", "cpu.stat", "nr_periods", 1, nil},
	{"container_cpu_cfs_throttled_periods_total", "cpu", "cpu.stat", "nr_throttled", 1, nil},
	{"container_cpu_cfs_throttled_seconds_total", "cpu", "cpu.stat", "throttled_time", 1e9, nil},
	{"container_memory_cache", "memory", "memory.stat", "total_cache", 1, nil},
	{"container_memory_mapped_file", "memory", "memory.stat", "total_mapped_file", 1, nil},
	{"container_memory_failures_total", "memory", "memory.stat", "pgfault", 1, faultLabels[0]},
	{"container_memory_failures_total", "memory", "memory.stat", "pgmajfault", 1, faultLabels[1]},
	{"container_memory_failures_total", "memory", "memory.stat", "total_pgfault", 1, faultLabels[2]},
	{"container_memory_failures_total", "memory", "memory.stat", "total_pgmajfault", 1, faultLabels[3]},
	{"container_memory_failcnt", "memory", "memory.failcnt", "", 1, nil},
	{"container_memory_kernel_usage", "memory", "memory.kmem.usage_in_bytes", "", 1, nil},
	{"container_memory_max_usage_bytes", "memory", "memory.max_usage_in_bytes", "", 1, nil},
	{"container_oom_events_total", "memory", "memory.oom_control", "oom_kill", 1, nil},
	{"container_spec_memory_limit_bytes", "memory", "memory.limit_in_bytes", "", 1, nil},
	{"container_spec_memory_reservation_limit_bytes", "memory", "memory.soft_limit_in_bytes", "", 1, nil},
	{"container_spec_memory_swap_limit_bytes", "memory", "memory.memsw.limit_in_bytes", "", 1, nil},
	{"container_threads", "pids", "pids.current", "", 1, nil},
	{"container_threads_max", "pids", "pids.max", "", 1, nil},
}

var sourcesV2 = []source{
	{"container_cpu_user_seconds_total", "", "cpu.stat", "user_usec", 1e6, nil},
	{"container_cpu_system_seconds_total", "", "cpu.stat", "system_usec", 1e6, nil},
	{"container_cpu_cfs_periods_total", "", "cpu.stat", "nr_periods", 1, nil},
	{"container_cpu_cfs_throttled_periods_total", "", "cpu.stat", "nr_throttled", 1, nil},
	{"container_cpu_cfs_throttled_seconds_total", "", "cpu.stat", "throttled_usec", 1e6, nil},
	{"container_memory_cache", "", "memory.stat", "file", 1, nil},
	{"container_memory_mapped_file", "", "memory.stat", "file_mapped", 1, nil},
	{"container_memory_kernel_usage", "", "memory.stat", "kernel", 1, nil},
	{"container_memory_failures_total", "", "memory.stat", "pgfault", 1, faultLabels[0]},
	{"container_memory_failures_total", "", "memory.stat", "pgmajfault", 1, faultLabels[1]},
	{"container_memory_failures_total", "", "memory.stat", "pgfault", 1, faultLabels[2]},
	{"container_memory_failures_total", "", "memory.stat", "pgmajfault", 1, faultLabels[3]},
	{"container_memory_failcnt", "", "memory.events", "max", 1, nil},
	{"container_oom_events_total", "", "memory.events", "oom_kill", 1, nil},
	{"container_memory_max_usage_bytes", "", "memory.peak", "", 1, nil},
	{"container_spec_memory_limit_bytes", "", "memory.max", "", 1, nil},
	{"container_spec_memory_reservation_limit_bytes", "", "memory.low", "", 1, nil},
	{"container_spec_memory_swap_limit_bytes", "", "memory.swap.max", "", 1, nil},
	{"container_threads", "", "pids.current", "", 1, nil},
	{"container_threads_max", "", "pids.max", "", 1, nil},
}

// addFiles adds what a file of the cgroup has as it is.
func (m *metrics) addFiles(g *cgroups, r *reader, cgroup string) {
	sources := sourcesV2
	if g.v1() {
		sources = sourcesV1
	}
	var file string
	var data []byte
	for _, s := range sources {
		if s.file != file {
			file, data = s.file, r.read(g.dir(s.controller, cgroup), s.file)
		}
		if v, ok := s.value(data); ok {
			m.add(s.metric, v/s.unit, s.labels...)
		}
	}
}

// value finds the value in a file's content. For no limit it is 0.
func (s source) value(data []byte) (uint64, bool) {
	if s.key == "" {
		v, ok := value(data)
		if limitV1(v) == unlimited {
			v = 0
		}
		return v, ok
	}
	for key, v := range pairs(data) {
		if string(key) == s.key {
			return v, true
		}
	}
	return 0, false
}

func (m *metrics) addCPULimits(g *cgroups, r *reader, ctr Container) {
	shares := uint64(max(0, ctr.Resources.GetCpuShares()))
	var quota, period []byte
	if g.v1() {
		dir := g.dir("cpu", ctr.Cgroup)
		quota = slices.Clone(r.read(dir, "cpu.cfs_quota_us"))
		period = slices.Clone(r.read(dir, "cpu.cfs_period_us"))
		if v, ok := value(r.read(dir, "cpu.shares")); ok {
			shares = v
		}
	} else {
		dir := g.dir("cpu", ctr.Cgroup)
		quota, period, _ = bytes.Cut(slices.Clone(r.read(dir, "cpu.max")), []byte{' '})
		if v, ok := value(r.read(dir, "cpu.weight")); ok && shares == 0 {
			shares = 2 + (max(1, v)-1)*262142/9999 // weights 1 to 10000 stand for shares 2 to 262144
		}
	}
	m.add("container_spec_cpu_shares", shares)
	if v, ok := value(quota); ok && v != unlimited {
		m.add("container_spec_cpu_quota", v)
	}
	if v, ok := value(period); ok {
		m.add("container_spec_cpu_period", v)
	}
}

// addHugepages adds the pages of each size. Without the controller nobody counts
// them; where there are none there is nothing to count.
func (m *metrics) addHugepages(g *cgroups, r *reader, cgroup, sys string) {
	dir, current, most := g.dir("hugetlb", cgroup), ".current", ""
	if g.v1() {
		current, most = ".usage_in_bytes", ".max_usage_in_bytes"
	}
	for _, size := range hugepageSizes(sys) {
		used, ok := value(r.read(dir, "hugetlb."+size.name+current))
		if !ok && size.pages > 0 {
			continue
		}
		var peak uint64
		if most != "" {
			peak, _ = value(r.read(dir, "hugetlb."+size.name+most))
		}
		m.add("container_hugetlb_usage_bytes", used, size.name)
		m.add("container_hugetlb_max_usage_bytes", peak, size.name)
	}
}

type hugepageSize struct {
	name  string // as in the names of files: "2MB"
	pages uint64 // how many there may be
}

// hugepageSizes returns the sizes the machine knows.
func hugepageSizes(sys string) []hugepageSize {
	dir := sys + "/kernel/mm/hugepages"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // a kernel without huge pages
	}
	r := &reader{}
	var sizes []hugepageSize
	for _, e := range entries {
		kilobytes, ok := parseUint([]byte(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB")))
		if !ok {
			continue
		}
		n, unit := kilobytes, "KB"
		for _, larger := range []string{"MB", "GB"} {
			if n >= 1024 && n%1024 == 0 {
				n, unit = n/1024, larger
			}
		}
		pages, _ := value(r.read(dir+"/"+e.Name(), "nr_hugepages"))
		more, _ := value(r.read(dir+"/"+e.Name(), "nr_overcommit_hugepages"))
		sizes = append(sizes, hugepageSize{strconv.FormatUint(n, 10) + unit, pages + more})
	}
	return sizes
}

// addProcesses adds what the processes have open.
func (m *metrics) addProcesses(proc string, pids []int, first int) {
	var files, sockets uint64
	for _, pid := range pids {
		f, s := openFiles(proc, pid)
		files, sockets = files+f, sockets+s
	}
	m.add("container_processes", uint64(len(pids)))
	m.add("container_file_descriptors", files)
	m.add("container_sockets", sockets)
	var limit unix.Rlimit
	if slices.Contains(pids, first) && unix.Prlimit(first, unix.RLIMIT_NOFILE, nil, &limit) == nil && limit.Cur != math.MaxUint64 {
		m.add("container_ulimits_soft", limit.Cur, "max_open_files")
	}
}

// openFiles counts a process's open files, and the sockets among them. One that
// has gone has none.
func openFiles(proc string, pid int) (files, sockets uint64) {
	dir, err := os.Open(proc + "/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		return 0, 0
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return 0, 0
	}
	var target [16]byte // "socket:[..."; the rest does not matter
	for _, name := range names {
		n, err := unix.Readlinkat(int(dir.Fd()), name, target[:])
		if err != nil {
			continue // closed meanwhile
		}
		files++
		if bytes.HasPrefix(target[:n], []byte("socket:")) {
			sockets++
		}
	}
	return files, sockets
}
