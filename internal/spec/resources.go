package spec

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// Bounds of the kernel, in microseconds (kernel/sched/core.c).
const (
	minQuota             = 1000
	minPeriod, maxPeriod = 1000, 1000000
	// cgroup v1 takes what is beyond as the nearest; runtimes do so only on v2.
	minShares, maxShares = 2, 262144
)

// Resources converts the limits of a container; zero means not specified, so
// that the result limits only what r does. The same goes for an update of a
// running container, to which MergeResources gives the values to keep.
//
// Limits are given in the terms of cgroup v1, as the OCI runtime spec has them;
// runtimes convert them on v2.
func Resources(r *runtimeapi.LinuxContainerResources, facts host.Facts) (*specs.LinuxResources, error) {
	if err := validateResources(r); err != nil {
		return nil, err
	}
	out := &specs.LinuxResources{
		CPU:    cpu(r),
		Memory: memory(r, facts),
	}
	var err error
	if out.HugepageLimits, err = hugepages(r.GetHugepageLimits(), facts); err != nil {
		return nil, err
	}
	if len(r.GetUnified()) > 0 {
		if facts.Cgroup != host.CgroupV2 {
			return nil, impossible("linux.resources.unified", nil, "this host has cgroup "+facts.Cgroup.String(), "boot it with cgroup v2, or leave the field out")
		}
		out.Unified = maps.Clone(r.GetUnified())
	}
	return out, nil
}

func cpu(r *runtimeapi.LinuxContainerResources) *specs.LinuxCPU {
	c := specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if v := uint64(r.GetCpuShares()); v != 0 {
		v = min(max(v, minShares), maxShares)
		c.Shares = &v
	}
	if v := r.GetCpuQuota(); v != 0 {
		c.Quota = &v
	}
	if v := uint64(r.GetCpuPeriod()); v != 0 {
		c.Period = &v
	}
	if c == (specs.LinuxCPU{}) {
		return nil
	}
	return &c
}

// memory converts the limits of memory and of memory plus swap. A container
// with a limit of memory and none of swap gets no swap: otherwise it would get
// as much swap as it asks for.
func memory(r *runtimeapi.LinuxContainerResources, facts host.Facts) *specs.LinuxMemory {
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if swap == 0 {
		swap = limit
	}
	var m specs.LinuxMemory
	if limit != 0 {
		m.Limit = &limit
	}
	if swap != 0 && facts.SwapLimit {
		m.Swap = &swap
	}
	if m == (specs.LinuxMemory{}) {
		return nil
	}
	return &m
}

// hugepages converts the limits of the page sizes this host limits. The
// kubelet sends all sizes of the machine with a limit of zero, also where the
// kernel has no controller to keep it; there, as with containerd and CRI-O, a
// limit means nothing.
func hugepages(list []*runtimeapi.HugepageLimit, facts host.Facts) ([]specs.LinuxHugepageLimit, error) {
	if len(facts.HugepageSizes) == 0 {
		return nil, nil
	}
	var out []specs.LinuxHugepageLimit
	for i, l := range list {
		if !slices.Contains(facts.HugepageSizes, l.GetPageSize()) {
			return nil, impossible(fmt.Sprintf("linux.resources.hugepage_limits[%d].page_size", i), l.GetPageSize(), "this host has no such pages", "use one of "+strings.Join(facts.HugepageSizes, ", "))
		}
		out = append(out, specs.LinuxHugepageLimit{Pagesize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	return out, nil
}

// MergeResources returns old with all that update specifies. It changes
// neither.
func MergeResources(old, update *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	merged := &runtimeapi.LinuxContainerResources{}
	proto.Merge(merged, old)
	// Lists and maps would be appended; here they are replaced by page size
	// and kept by key.
	hugepages := mergeHugepages(old.GetHugepageLimits(), update.GetHugepageLimits())
	proto.Merge(merged, update)
	merged.HugepageLimits = hugepages
	return merged
}

func mergeHugepages(old, update []*runtimeapi.HugepageLimit) []*runtimeapi.HugepageLimit {
	var merged []*runtimeapi.HugepageLimit
	for _, l := range append(slices.Clone(old), update...) {
		l = &runtimeapi.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()}
		i := slices.IndexFunc(merged, func(m *runtimeapi.HugepageLimit) bool { return m.PageSize == l.PageSize })
		if i >= 0 {
			merged[i] = l
			continue
		}
		merged = append(merged, l)
	}
	return merged
}

// oomScoreAdj returns the value asked for, or the nearest the host lets this
// process give away. It is always set: a container must not inherit the
// keeper's, which is out of the OOM killer's reach.
func oomScoreAdj(r *runtimeapi.LinuxContainerResources, facts host.Facts) int {
	return max(int(r.GetOomScoreAdj()), facts.MinOOMScoreAdj)
}

func validateResources(r *runtimeapi.LinuxContainerResources) error {
	const in = "linux.resources."
	period := r.GetCpuPeriod()
	switch quota := r.GetCpuQuota(); {
	case period != 0 && (period < minPeriod || period > maxPeriod):
		return invalid(in+"cpu_period", period, "the kernel takes 1000 to 1000000 µs", "use 0 for the default")
	case quota < -1 || quota > 0 && quota < minQuota:
		return invalid(in+"cpu_quota", quota, "the kernel takes no less than 1000 µs", "use 0 or -1 for no limit")
	case r.GetCpuShares() < 0:
		return invalid(in+"cpu_shares", r.GetCpuShares(), "shares cannot be negative", "use 0 for the default")
	case r.GetOomScoreAdj() < -1000 || r.GetOomScoreAdj() > 1000:
		return invalid(in+"oom_score_adj", r.GetOomScoreAdj(), "the kernel takes -1000 to 1000", "")
	}
	if err := validateMemory(r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()); err != nil {
		return err
	}
	if !isCPUList(r.GetCpusetCpus()) {
		return invalid(in+"cpuset_cpus", r.GetCpusetCpus(), "it is no list of CPUs", `write it like "0-3,6"`)
	}
	if !isCPUList(r.GetCpusetMems()) {
		return invalid(in+"cpuset_mems", r.GetCpusetMems(), "it is no list of memory nodes", `write it like "0-1"`)
	}
	for key := range r.GetUnified() {
		if strings.ContainsAny(key, "/\x00") || !strings.Contains(key, ".") {
			return invalid(in+"unified", key, "it is no name of a cgroup v2 file", `write it like "memory.high"`)
		}
	}
	return nil
}

// validateMemory checks the limits of memory and of memory plus swap: zero not
// specified, -1 unlimited.
func validateMemory(limit, swap int64) error {
	const in = "linux.resources."
	switch {
	case limit < -1:
		return invalid(in+"memory_limit_in_bytes", limit, "a limit cannot be negative", "use 0 or -1 for no limit")
	case swap < -1:
		return invalid(in+"memory_swap_limit_in_bytes", swap, "a limit cannot be negative", "use -1 for no limit")
	case swap > 0 && limit <= 0:
		return invalid(in+"memory_swap_limit_in_bytes", swap, "swap is limited together with memory, which has no limit", "set memory_limit_in_bytes")
	case swap > 0 && swap < limit:
		return invalid(in+"memory_swap_limit_in_bytes", swap, fmt.Sprintf("it counts memory and swap together, and is less than the limit of memory, %d", limit), "use at least that")
	}
	return nil
}

// isCPUList reports whether s is a list as the kernel reads it: numbers and
// ranges, separated by commas.
func isCPUList(s string) bool {
	if s == "" {
		return true
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		low, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return false
		}
		if !isRange {
			continue
		}
		if high, err := strconv.ParseUint(last, 10, 16); err != nil || high < low {
			return false
		}
	}
	return true
}
