package nri

import (
	"maps"
	"slices"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Describe adds to what plugins are told of a container all that its spec says.
func Describe(c *api.Container, oci *specs.Spec) {
	if oci == nil {
		return
	}
	c.Annotations = maps.Clone(oci.Annotations)
	c.Mounts = api.FromOCIMounts(oci.Mounts)
	c.Hooks = api.FromOCIHooks(oci.Hooks)
	if p := oci.Process; p != nil {
		c.Args, c.Env = slices.Clone(p.Args), slices.Clone(p.Env)
		c.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: slices.Clone(p.User.AdditionalGids)}
		for _, l := range p.Rlimits {
			c.Rlimits = append(c.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
	}
	if c.Linux = describeLinux(oci.Linux); c.Linux != nil && oci.Process != nil {
		c.Linux.OomScoreAdj = api.Int(oci.Process.OOMScoreAdj)
		c.Linux.IoPriority = api.FromOCILinuxIOPriority(oci.Process.IOPriority)
		c.Linux.Scheduler = api.FromOCILinuxScheduler(oci.Process.Scheduler)
	}
}

func describeLinux(l *specs.Linux) *api.LinuxContainer {
	if l == nil {
		return nil
	}
	linux := &api.LinuxContainer{
		Namespaces:  api.FromOCILinuxNamespaces(l.Namespaces),
		Devices:     api.FromOCILinuxDevices(l.Devices),
		Resources:   api.FromOCILinuxResources(l.Resources, nil),
		CgroupsPath: l.CgroupsPath,
		Sysctl:      maps.Clone(l.Sysctl),
		NetDevices:  api.FromOCILinuxNetDevices(l.NetDevices),
	}
	if l.Seccomp != nil {
		linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
	}
	return linux
}
