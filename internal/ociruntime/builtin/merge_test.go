package builtin

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestMerge(t *testing.T) {
	p := func(n int64) *int64 { return &n }
	u := func(n uint64) *uint64 { return &n }
	old := func() *cgroups.Resources {
		return &cgroups.Resources{
			Memory: 100, MemorySwap: 200, CpuQuota: 5000, CpuPeriod: 10000, CpuShares: 512, CpuWeight: 20,
			CpusetCpus: "0", PidsLimit: p(10), Unified: map[string]string{"memory.high": "90", "io.weight": "7"},
		}
	}
	for _, tc := range []struct {
		name string
		r    specs.LinuxResources
		want func(*cgroups.Resources)
	}{
		{"nothing", specs.LinuxResources{}, func(*cgroups.Resources) {}},
		{"memory", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(150)}}, func(r *cgroups.Resources) { r.Memory = 150 }},
		{"no memory limit", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(-1)}}, func(r *cgroups.Resources) { r.Memory, r.MemorySwap = -1, 0 }},
		{"quota", specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(-1)}}, func(r *cgroups.Resources) { r.CpuQuota = -1 }},
		{"shares", specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: u(1024)}}, func(r *cgroups.Resources) {
			r.CpuShares, r.CpuWeight = 1024, cgroups.ConvertCPUSharesToCgroupV2Value(1024)
		}},
		{"cpuset", specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0-1"}}, func(r *cgroups.Resources) { r.CpusetCpus = "0-1" }},
		{"pids", specs.LinuxResources{Pids: &specs.LinuxPids{Limit: p(-1)}}, func(r *cgroups.Resources) { r.PidsLimit = p(-1) }},
		{"unified", specs.LinuxResources{Unified: map[string]string{"memory.high": "80"}}, func(r *cgroups.Resources) { r.Unified["memory.high"] = "80" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := old()
			got, err := merge(before, &tc.r)
			if err != nil {
				t.Fatal(err)
			}
			want := old()
			tc.want(want)
			want.SkipDevices = true
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(old(), before); diff != "" {
				t.Errorf("the old limits have changed, to which a failed update goes back:\n%s", diff)
			}
		})
	}
}
