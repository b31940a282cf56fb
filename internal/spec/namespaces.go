package spec

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// PodNamespaces tells which namespaces a pod has of its own; the others are
// the host's. PID means one that its containers share.
type PodNamespaces struct{ Network, IPC, UTS, PID, User bool }

// NamespacesOf returns the namespaces of a pod. A pod on the host's network
// has the host's UTS namespace as well, and so its name.
func NamespacesOf(pod *runtimeapi.PodSandboxConfig) PodNamespaces {
	o := podNamespaceOptions(pod)
	return PodNamespaces{
		Network: o.GetNetwork() != runtimeapi.NamespaceMode_NODE,
		UTS:     o.GetNetwork() != runtimeapi.NamespaceMode_NODE,
		IPC:     o.GetIpc() != runtimeapi.NamespaceMode_NODE,
		PID:     o.GetPid() == runtimeapi.NamespaceMode_POD,
		User:    usesUserNamespace(o.GetUsernsOptions()),
	}
}

// usesUserNamespace: mode POD is also what old kubelets send by not knowing the
// field, so only mappings ask for a namespace.
func usesUserNamespace(u *runtimeapi.UserNamespace) bool {
	return u.GetMode() == runtimeapi.NamespaceMode_POD && len(u.GetUids())+len(u.GetGids()) > 0
}

// PIDMode returns how a container gets its PID namespace: POD (the pod's shared
// one), CONTAINER (one of its own), NODE (the host's) or TARGET (that of the
// container whose id is returned). For POD and TARGET, Namespaces.PID names it.
//
// POD is also what a client sends that sets nothing: in a pod without a shared
// namespace it means what the pod says.
func PIDMode(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) (mode runtimeapi.NamespaceMode, target string) {
	o := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch o.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		return podNamespaceOptions(pod).GetPid(), ""
	case runtimeapi.NamespaceMode_TARGET:
		return runtimeapi.NamespaceMode_TARGET, o.GetTargetId()
	}
	return o.GetPid(), ""
}

// RootOf returns who on the host the root of a pod's containers is.
func RootOf(pod *runtimeapi.PodSandboxConfig) (uid, gid uint32) {
	if !NamespacesOf(pod).User {
		return 0, 0
	}
	u := podNamespaceOptions(pod).GetUsernsOptions()
	return u.GetUids()[0].GetHostId(), u.GetGids()[0].GetHostId()
}

// UserIDs returns the ids of the pod's user namespace, none if it has none.
func UserIDs(pod *runtimeapi.PodSandboxConfig) (uids, gids []host.IDRange) {
	if !NamespacesOf(pod).User {
		return nil, nil
	}
	ranges := func(list []*runtimeapi.IDMapping) (out []host.IDRange) {
		for _, m := range list {
			out = append(out, host.IDRange{Inside: m.GetContainerId(), Outside: m.GetHostId(), Size: m.GetLength()})
		}
		return out
	}
	u := podNamespaceOptions(pod).GetUsernsOptions()
	return ranges(u.GetUids()), ranges(u.GetGids())
}

// hasGroup reports whether a group exists in the pod's user namespace.
func hasGroup(pod *runtimeapi.PodSandboxConfig, gid uint32) bool {
	return !NamespacesOf(pod).User || gid < podNamespaceOptions(pod).GetUsernsOptions().GetGids()[0].GetLength()
}

func podNamespaceOptions(pod *runtimeapi.PodSandboxConfig) *runtimeapi.NamespaceOption {
	return pod.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// namespaces adds the container's namespaces. Network, IPC, UTS and user
// namespace are the pod's, whatever the container says: ValidateContainer has
// seen to it that it says nothing else.
func namespaces(s *specs.Spec, in Input) error {
	pod := NamespacesOf(in.Pod)
	pidMode, _ := PIDMode(in.Pod, in.Container)

	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	join := func(kind specs.LinuxNamespaceType, path string) error {
		if path == "" {
			return impossible("namespaces."+string(kind), nil, "the pod has one, but its path is not known", "")
		}
		list = append(list, specs.LinuxNamespace{Type: kind, Path: path})
		return nil
	}
	for _, ns := range []struct {
		kind specs.LinuxNamespaceType
		has  bool
		path string
	}{
		{specs.NetworkNamespace, pod.Network, in.Namespaces.Network},
		{specs.IPCNamespace, pod.IPC, in.Namespaces.IPC},
		{specs.UTSNamespace, pod.UTS, in.Namespaces.UTS},
		{specs.UserNamespace, pod.User, in.Namespaces.User},
		{specs.PIDNamespace, pidMode == runtimeapi.NamespaceMode_POD || pidMode == runtimeapi.NamespaceMode_TARGET, in.Namespaces.PID},
	} {
		if !ns.has {
			continue
		}
		if err := join(ns.kind, ns.path); err != nil {
			return err
		}
	}
	if pidMode == runtimeapi.NamespaceMode_CONTAINER {
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if privateCgroupNamespace(in) {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	s.Linux.Namespaces = list

	if pod.User {
		u := podNamespaceOptions(in.Pod).GetUsernsOptions()
		// Runtimes of today want the mappings beside the path of the
		// namespace that has them.
		s.Linux.UIDMappings = idMappings(u.GetUids())
		s.Linux.GIDMappings = idMappings(u.GetGids())
	}
	return nil
}

// privateCgroupNamespace: on v2 a container sees its own cgroup as the root,
// unless it is privileged, which on a node means: to look after the node.
func privateCgroupNamespace(in Input) bool {
	return in.Host.Cgroup == host.CgroupV2 && !in.Container.GetLinux().GetSecurityContext().GetPrivileged()
}

func idMappings(list []*runtimeapi.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}
