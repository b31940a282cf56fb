package spec

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

func ptr[T any](v T) *T { return &v }

func TestResources(t *testing.T) {
	type r = runtimeapi.LinuxContainerResources
	for _, tt := range []struct {
		name  string
		in    *r
		facts func(*host.Facts)
		want  specs.LinuxResources
	}{
		{name: "nothing"},
		{name: "nothing specified", in: &r{}},
		{name: "fewest shares", in: &r{CpuShares: 1}, want: specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2))}}},
		{name: "most shares", in: &r{CpuShares: 1 << 40}, want: specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(262144))}}},
		{name: "cpu", in: &r{CpuShares: 2, CpuQuota: -1, CpuPeriod: 50000, CpusetCpus: "0-3,7"},
			want: specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2)), Quota: ptr(int64(-1)), Period: ptr(uint64(50000)), Cpus: "0-3,7"}}},
		{name: "a limit of memory is one of swap", in: &r{MemoryLimitInBytes: 1 << 20},
			want: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(1 << 20))}}},
		{name: "swap", in: &r{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20},
			want: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(2 << 20))}}},
		{name: "unlimited swap", in: &r{MemorySwapLimitInBytes: -1},
			want: specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: ptr(int64(-1))}}},
		{name: "a host that does not limit swap", in: &r{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20}, facts: func(f *host.Facts) { f.SwapLimit = false },
			want: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20))}}},
		{name: "hugepages", in: &r{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 0}}},
			want: specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}}}},
		{name: "a host that does not limit hugepages", in: &r{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 0}}}, facts: func(f *host.Facts) { f.HugepageSizes = nil }},
		{name: "unified", in: &r{Unified: map[string]string{"memory.oom.group": "1"}},
			want: specs.LinuxResources{Unified: map[string]string{"memory.oom.group": "1"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			facts := testInput().Host
			if tt.facts != nil {
				tt.facts(&facts)
			}
			got, err := Resources(tt.in, facts)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestResourcesThatAreNone(t *testing.T) {
	type r = runtimeapi.LinuxContainerResources
	for _, tt := range []struct {
		in  *r
		err string
	}{
		{&r{CpuQuota: 999}, "linux.resources.cpu_quota: 999: the kernel takes no less than 1000 µs; use 0 or -1 for no limit"},
		{&r{CpuQuota: -2}, "cpu_quota: -2"},
		{&r{CpuPeriod: 999}, "cpu_period: 999"},
		{&r{CpuPeriod: 1000001}, "cpu_period: 1000001"},
		{&r{CpuPeriod: -1}, "cpu_period: -1"},
		{&r{CpuShares: -1}, "cpu_shares: -1"},
		{&r{CpusetCpus: "0-"}, `cpuset_cpus: "0-"`},
		{&r{CpusetCpus: "3-0"}, `cpuset_cpus: "3-0"`},
		{&r{CpusetCpus: "0,,1"}, `cpuset_cpus: "0,,1"`},
		{&r{CpusetMems: "a"}, `cpuset_mems: "a"`},
		{&r{MemoryLimitInBytes: -2}, "memory_limit_in_bytes: -2"},
		{&r{MemorySwapLimitInBytes: -2}, "memory_swap_limit_in_bytes: -2"},
		{&r{MemorySwapLimitInBytes: 1}, "memory_swap_limit_in_bytes: 1: swap is limited together with memory"},
		{&r{MemoryLimitInBytes: 2, MemorySwapLimitInBytes: 1}, "less than the limit of memory, 2"},
		{&r{OomScoreAdj: 1001}, "oom_score_adj: 1001"},
		{&r{OomScoreAdj: -1001}, "oom_score_adj: -1001"},
		{&r{Unified: map[string]string{"../x.y": "1"}}, `unified: "../x.y"`},
		{&r{Unified: map[string]string{"memory": "1"}}, `unified: "memory"`},
	} {
		_, err := Resources(tt.in, testInput().Host)
		wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
	}
}

func TestResourcesThisHostLacks(t *testing.T) {
	facts := testInput().Host
	_, err := Resources(&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "64KB"}}}, facts)
	wantError(t, err, errdefs.ErrFailedPrecondition, `hugepage_limits[0].page_size: "64KB": this host has no such pages; use one of 1GB, 2MB`)

	facts.Cgroup = host.CgroupHybrid
	_, err = Resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}, facts)
	wantError(t, err, errdefs.ErrFailedPrecondition, "this host has cgroup hybrid")
}

func TestOOMScoreAdj(t *testing.T) {
	for _, tt := range []struct {
		asked int64
		floor int
		want  int
	}{{0, -1000, 0}, {-998, -1000, -998}, {-998, 0, 0}, {-998, -500, -500}, {1000, 500, 1000}, {0, 500, 500}} {
		in := testInput()
		in.Container.Linux.Resources.OomScoreAdj = tt.asked
		in.Host.MinOOMScoreAdj = tt.floor
		if got := mustBuild(t, in).Process.OOMScoreAdj; got == nil || *got != tt.want {
			t.Errorf("asked for %d where the lowest is %d: %v, want %d", tt.asked, tt.floor, got, tt.want)
		}
	}
	// A container without resources must not inherit the keeper's either.
	in := testInput()
	in.Container.Linux = nil
	if got := mustBuild(t, in).Process.OOMScoreAdj; got == nil || *got != 0 {
		t.Errorf("without resources: %v, want 0", got)
	}
}

func TestMergeResources(t *testing.T) {
	type r = runtimeapi.LinuxContainerResources
	type pages = []*runtimeapi.HugepageLimit
	old := &r{CpuShares: 100, CpuQuota: 5000, MemoryLimitInBytes: 10, HugepageLimits: pages{{PageSize: "2MB", Limit: 1}, {PageSize: "1GB", Limit: 2}}, Unified: map[string]string{"a.b": "1", "c.d": "2"}}
	update := &r{CpuShares: 200, CpusetCpus: "1", HugepageLimits: pages{{PageSize: "1GB", Limit: 0}}, Unified: map[string]string{"c.d": "3"}}
	want := &r{CpuShares: 200, CpuQuota: 5000, MemoryLimitInBytes: 10, CpusetCpus: "1", HugepageLimits: pages{{PageSize: "2MB", Limit: 1}, {PageSize: "1GB", Limit: 0}}, Unified: map[string]string{"a.b": "1", "c.d": "3"}}
	if diff := cmp.Diff(want, MergeResources(old, update), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if old.CpuShares != 100 || old.Unified["c.d"] != "2" || old.HugepageLimits[1].Limit != 2 {
		t.Error("MergeResources changed the old resources")
	}
	for _, tt := range []struct{ old, update, want *r }{
		{nil, nil, &r{}},
		{nil, update, update},
		{old, nil, old},
		{old, &r{}, old},
	} {
		if diff := cmp.Diff(tt.want, MergeResources(tt.old, tt.update), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	}
}
