package spec

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// mounts adds all mounts of a container, parents before what lies in them.
// What the container mounts itself replaces what it would get anyway at the
// same place.
func mounts(s *specs.Spec, in Input) error {
	own := make([]specs.Mount, 0, len(in.Container.GetMounts()))
	for i, m := range in.Container.GetMounts() {
		mount, err := ownMount(in, i, m)
		if err != nil {
			return err
		}
		own = append(own, mount)
	}

	taken := make(map[string]bool)
	for _, m := range own {
		taken[path.Clean(m.Destination)] = true
	}
	given := append(append(systemMounts(in), podFiles(in)...), volumeMounts(in)...)
	given = slices.DeleteFunc(given, func(m specs.Mount) bool { return taken[path.Clean(m.Destination)] })

	all := append(given, own...)
	slices.SortStableFunc(all, func(a, b specs.Mount) int { return cmp.Compare(depth(a.Destination), depth(b.Destination)) })
	s.Mounts = all
	s.Linux.RootfsPropagation = rootfsPropagation(in.Container.GetMounts())
	return nil
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

// ttyGroup is the group of terminals, the same in all distributions.
const ttyGroup = 5

// systemMounts are the kernel's file systems every container has.
func systemMounts(in Input) []specs.Mount {
	access := "ro"
	if in.Container.GetLinux().GetSecurityContext().GetPrivileged() {
		access = "rw"
	}
	pod := NamespacesOf(in.Pod)

	sys := specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}}
	if pod.User && !pod.Network {
		// sysfs can be mounted only by whoever owns the network namespace.
		sys = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "nosuid", "noexec", "nodev", access}}
	}
	terminals := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if hasGroup(in.Pod, ttyGroup) {
		terminals = append(terminals, fmt.Sprintf("gid=%d", ttyGroup))
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: terminals},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		sys,
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", access}},
	}
}

// podFiles are the files and the shared memory that the containers of a pod
// have in common.
func podFiles(in Input) []specs.Mount {
	access := "rw"
	if in.Container.GetLinux().GetSecurityContext().GetReadonlyRootfs() {
		access = "ro"
	}
	var list []specs.Mount
	bind := func(source, destination string, options ...string) {
		if source != "" {
			list = append(list, specs.Mount{Destination: destination, Type: "bind", Source: source, Options: options})
		}
	}
	bind(in.Files.ResolvConf, "/etc/resolv.conf", "rbind", "rprivate", access)
	bind(in.Files.Hostname, "/etc/hostname", "rbind", "rprivate", access)
	bind(in.Files.Hosts, "/etc/hosts", "rbind", "rprivate", access)

	shm := in.Files.Shm
	if !NamespacesOf(in.Pod).IPC {
		shm = "/dev/shm" // shared memory goes with the IPC namespace
	}
	bind(shm, "/dev/shm", "rbind", "rprivate", "nosuid", "noexec", "nodev", "rw")
	return list
}

// ImageVolumes lists the paths of the image's VOLUMEs on which the container
// mounts nothing itself, sorted. They are writable also when the container's
// root file system is not.
func ImageVolumes(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) []string {
	taken := make(map[string]bool)
	for _, m := range c.GetMounts() {
		taken[path.Clean(m.GetContainerPath())] = true
	}
	var volumes []string
	for v := range image.Volumes {
		// A VOLUME may be written without the leading slash.
		if v = path.Join("/", v); v != "/" && !taken[v] {
			volumes = append(volumes, v)
		}
	}
	slices.Sort(volumes)
	return slices.Compact(volumes)
}

func volumeMounts(in Input) []specs.Mount {
	var list []specs.Mount
	for _, destination := range slices.Sorted(maps.Keys(in.Volumes)) {
		list = append(list, specs.Mount{Destination: destination, Type: "bind", Source: in.Volumes[destination], Options: []string{"rbind", "rprivate", "rw"}})
	}
	return list
}

// ownMount is the i-th mount of the container's configuration.
func ownMount(in Input, i int, m *runtimeapi.Mount) (specs.Mount, error) {
	field := mountField(i)
	if i >= len(in.Sources) || in.Sources[i].Path == "" {
		return specs.Mount{}, impossible(field+".host_path", m.GetHostPath(), "what stands at the source is not known", "")
	}
	source := in.Sources[i]

	propagation, err := mountPropagation(field, m, source)
	if err != nil {
		return specs.Mount{}, err
	}
	access := "rw"
	switch {
	case m.GetRecursiveReadOnly():
		if err := checkRecursiveReadOnly(in, field); err != nil {
			return specs.Mount{}, err
		}
		access = "rro"
	case m.GetReadonly() || m.GetImage() != nil:
		access = "ro"
	}
	for _, option := range m.GetMountOptions() {
		if !in.Handler.knowsMountOption(option) {
			return specs.Mount{}, impossible(field+".mount_options", option, "the handler's OCI runtime does not know it", "leave it out, or use another handler")
		}
	}
	options := []string{"rbind", propagation, access}
	if m.GetImage() != nil {
		// What is mounted may come from anywhere. The container's own options come
		// later.
		options = append(options, "nosuid", "nodev")
	}
	mount := specs.Mount{
		Destination: m.GetContainerPath(),
		Type:        "bind",
		Source:      source.Path,
		Options:     append(options, m.GetMountOptions()...),
	}
	if m.GetImage() == nil {
		if len(m.GetUidMappings()) > 0 && !in.Handler.IDMappedMounts {
			// It would ignore them, and the volume would not be the pod's.
			return specs.Mount{}, impossible(field+".uidMappings", nil, "the handler's OCI runtime cannot mount volumes with the ids of a user namespace", "use another handler")
		}
		// What stands at the source of an image is mounted with the pod's ids
		// already, and overlayfs cannot be mapped again.
		mount.UIDMappings, mount.GIDMappings = idMappings(m.GetUidMappings()), idMappings(m.GetGidMappings())
	}
	return mount, nil
}

// checkRecursiveReadOnly: a mount that is less read-only than was asked for would
// be a hole. The kubelet knows the error by its name.
func checkRecursiveReadOnly(in Input, field string) error {
	cause, remedy := "", ""
	switch {
	case !in.Host.RecursiveReadOnly:
		cause, remedy = "this kernel cannot make mounts recursively read-only", "use Linux 5.12 or later, or a plain readonly mount"
	case !in.Handler.RecursiveReadOnly:
		cause, remedy = "the handler's OCI runtime cannot make mounts recursively read-only", "use another handler, or a plain readonly mount"
	default:
		return nil
	}
	return impossible(field+".recursive_read_only", true, crierrors.ErrRROUnsupported.Error()+": "+cause, remedy)
}

// mountPropagation returns the mount option. Propagation has a meaning only if
// the source lies on a mount that takes part in it; to find out at the first
// missing mount would be too late.
func mountPropagation(field string, m *runtimeapi.Mount, source Source) (string, error) {
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
		return "rprivate", nil
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if !source.Shared && !source.Slave {
			return "", impossible(field+".propagation", m.GetPropagation(), fmt.Sprintf("%s is not on a shared or slave mount", source.Path), "mount --make-rshared the file system it is on")
		}
		return "rslave", nil
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if !source.Shared {
			return "", impossible(field+".propagation", m.GetPropagation(), fmt.Sprintf("%s is not on a shared mount", source.Path), "mount --make-rshared the file system it is on")
		}
		return "rshared", nil
	}
	return "", invalid(field+".propagation", m.GetPropagation(), "there is no such propagation", "")
}

// rootfsPropagation: what a mount is to receive or to send has to pass through
// the container's root.
func rootfsPropagation(list []*runtimeapi.Mount) string {
	propagation := ""
	for _, m := range list {
		switch m.GetPropagation() {
		case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			return "rshared"
		case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			propagation = "rslave"
		}
	}
	return propagation
}

func mountField(i int) string { return fmt.Sprintf("mounts[%d]", i) }
