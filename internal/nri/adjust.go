package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Host is what adjusting a spec needs of the host.
type Host struct {
	// InjectDevices adds CDI devices to a spec.
	InjectDevices func(oci *specs.Spec, names []string) error
	// SwapLimit says that swap can be limited. A plugin that limits memory means
	// swap too.
	SwapLimit bool
}

// Adjust does to the spec of a container what plugins want, which have agreed by
// now.
func Adjust(oci *specs.Spec, wish *api.ContainerAdjustment, host Host) error {
	noClasses := func(kind string) error {
		return fmt.Errorf("%s: this host has no such classes configured: %w", kind, errdefs.ErrNotImplemented)
	}
	g := generate.SpecGenerator(generator{oci},
		generate.WithCDIDeviceInjector(host.InjectDevices),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) { return nil, noClasses("blockio class " + class) }),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) { return nil, noClasses("RDT class " + class) }),
		generate.WithResourceChecker(func(r *specs.LinuxResources) error {
			if r.Memory != nil && !host.SwapLimit {
				r.Memory.Swap = nil
			}
			return nil
		}),
	)
	if err := g.Adjust(wish); err != nil {
		return err
	}
	oci.Process.Rlimits = lastOfEach(oci.Process.Rlimits)
	return nil
}

// lastOfEach leaves one limit of each type: the library adds a plugin's to those
// that are there.
func lastOfEach(limits []specs.POSIXRlimit) []specs.POSIXRlimit {
	var last []specs.POSIXRlimit
	for _, l := range limits {
		last = append(without(last, func(o specs.POSIXRlimit) bool { return o.Type == l.Type }), l)
	}
	return last
}

// generator is what the library edits a spec with. Its methods are named by the
// library; each changes one thing, and none the arrays that the spec came with,
// which others may share. The spec is one of a Linux container.
type generator struct{ oci *specs.Spec }

var _ generate.UnderlyingGenerator = generator{}

func (g generator) Spec() *specs.Spec { return g.oci }

func (g generator) AddAnnotation(key, value string) { set(&g.oci.Annotations, key, value) }
func (g generator) RemoveAnnotation(key string)     { delete(g.oci.Annotations, key) }

func set(m *map[string]string, key, value string) {
	if *m == nil {
		*m = make(map[string]string)
	}
	(*m)[key] = value
}

// without returns list without those that match, in an array of its own.
func without[T any](list []T, match func(T) bool) []T {
	return slices.DeleteFunc(slices.Clone(list), match)
}

func (g generator) SetProcessArgs(args []string)  { g.oci.Process.Args = args }
func (g generator) SetProcessOOMScoreAdj(adj int) { g.oci.Process.OOMScoreAdj = &adj }
func (g generator) ClearProcessEnv()              { g.oci.Process.Env = nil }

func (g generator) AddProcessEnv(name, value string) {
	env := without(g.oci.Process.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
	g.oci.Process.Env = append(env, name+"="+value)
}

func (g generator) hooks() *specs.Hooks {
	if g.oci.Hooks == nil {
		g.oci.Hooks = &specs.Hooks{}
	}
	return g.oci.Hooks
}

func (g generator) AddPreStartHook(h specs.Hook) {
	//lint:ignore SA1019 plugins may still want it
	g.hooks().Prestart = append(g.hooks().Prestart, h)
}
func (g generator) AddPostStartHook(h specs.Hook) {
	g.hooks().Poststart = append(g.hooks().Poststart, h)
}
func (g generator) AddPostStopHook(h specs.Hook) { g.hooks().Poststop = append(g.hooks().Poststop, h) }

func (g generator) Mounts() []specs.Mount  { return slices.Clone(g.oci.Mounts) }
func (g generator) ClearMounts()           { g.oci.Mounts = nil }
func (g generator) AddMount(m specs.Mount) { g.oci.Mounts = append(slices.Clip(g.oci.Mounts), m) }
func (g generator) RemoveMount(dest string) {
	g.oci.Mounts = without(g.oci.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

func (g generator) AddDevice(d specs.LinuxDevice) {
	g.RemoveDevice(d.Path)
	g.oci.Linux.Devices = append(g.oci.Linux.Devices, d)
}

func (g generator) RemoveDevice(path string) {
	g.oci.Linux.Devices = without(g.oci.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

func (g generator) AddOrReplaceLinuxNamespace(kind, path string) error {
	if err := g.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	g.oci.Linux.Namespaces = append(g.oci.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(kind), Path: path})
	return nil
}

func (g generator) RemoveLinuxNamespace(kind string) error {
	switch t := specs.LinuxNamespaceType(kind); t {
	case specs.PIDNamespace, specs.NetworkNamespace, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace,
		specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace:
		g.oci.Linux.Namespaces = without(g.oci.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
		return nil
	}
	return fmt.Errorf("namespace %q: there is none of this type: %w", kind, errdefs.ErrInvalidArgument)
}

func (g generator) AddLinuxSysctl(key, value string) { set(&g.oci.Linux.Sysctl, key, value) }
func (g generator) RemoveLinuxSysctl(key string)     { delete(g.oci.Linux.Sysctl, key) }

func (g generator) SetLinuxCgroupsPath(path string) { g.oci.Linux.CgroupsPath = path }

func (g generator) SetLinuxRootPropagation(p string) error {
	g.oci.Linux.RootfsPropagation = p
	return nil
}

func (g generator) resources() *specs.LinuxResources {
	if g.oci.Linux.Resources == nil {
		g.oci.Linux.Resources = &specs.LinuxResources{}
	}
	return g.oci.Linux.Resources
}

func (g generator) cpu() *specs.LinuxCPU {
	r := g.resources()
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}

func (g generator) memory() *specs.LinuxMemory {
	r := g.resources()
	if r.Memory == nil {
		r.Memory = &specs.LinuxMemory{}
	}
	return r.Memory
}

func (g generator) SetLinuxResourcesCPUCpus(cpus string)         { g.cpu().Cpus = cpus }
func (g generator) SetLinuxResourcesCPUMems(mems string)         { g.cpu().Mems = mems }
func (g generator) SetLinuxResourcesCPUPeriod(us uint64)         { g.cpu().Period = &us }
func (g generator) SetLinuxResourcesCPUQuota(us int64)           { g.cpu().Quota = &us }
func (g generator) SetLinuxResourcesCPURealtimePeriod(us uint64) { g.cpu().RealtimePeriod = &us }
func (g generator) SetLinuxResourcesCPURealtimeRuntime(us int64) { g.cpu().RealtimeRuntime = &us }
func (g generator) SetLinuxResourcesCPUShares(shares uint64)     { g.cpu().Shares = &shares }
func (g generator) SetLinuxResourcesMemoryLimit(bytes int64)     { g.memory().Limit = &bytes }
func (g generator) SetLinuxResourcesMemorySwap(bytes int64)      { g.memory().Swap = &bytes }
func (g generator) AddLinuxResourcesUnified(key, value string) {
	set(&g.resources().Unified, key, value)
}

func (g generator) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := g.resources()
	r.HugepageLimits = append(
		without(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size }),
		specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

func (g generator) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	r := g.resources()
	r.Devices = append(slices.Clip(r.Devices), specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access})
}
