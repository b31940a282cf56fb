package spec

import (
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

const (
	// nobody is who a pod's init runs as if the pod does not say, or the last
	// user of a user namespace that has fewer.
	nobody = 65534
	// initOOMScoreAdj keeps a pod's init from being killed in place of what
	// took the memory; the kubelet gives it to what it cannot do without.
	initOOMScoreAdj = -998
)

// BuildInit makes the spec of a pod's init: the process that holds a PID
// namespace its containers share, or that stands for the pod with runtimes that
// want a process for it. It is a container that asks for nothing and may do
// nothing.
//
// Of the Input, Container and Image are ignored, and so is all that belongs to
// them. Rootfs is a directory with the program and with the directories proc
// and dev; it may be the same for all pods.
func BuildInit(in Input, args ...string) (*specs.Spec, error) {
	sc := in.Pod.GetLinux().GetSecurityContext()
	user := sc.GetRunAsUser()
	uids, gids := UserIDs(in.Pod)
	if user == nil {
		user = lastOf(uids)
	}
	group := sc.GetRunAsGroup()
	if group == nil {
		group = lastOf(gids)
	}
	in.Container = &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "init"},
		Command:  args,
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 2, OomScoreAdj: initOOMScoreAdj},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				RunAsUser:        user,
				RunAsGroup:       group,
				ReadonlyRootfs:   true,
				NoNewPrivs:       true,
				Capabilities:     &runtimeapi.Capability{DropCapabilities: []string{allCapabilities}},
				MaskedPaths:      defaultMasked,
				ReadonlyPaths:    defaultReadonly,
			},
		},
	}
	in.Image, in.Passwd, in.Group = ocispec.ImageConfig{}, nil, nil
	s, err := Build(in)
	if err != nil {
		return nil, err
	}
	s.Annotations = sandboxAnnotations(in)
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination != "/proc" && m.Destination != "/dev" })
	return s, nil
}

// lastOf returns nobody, or the last id of a user namespace that has fewer.
func lastOf(ids []host.IDRange) *runtimeapi.Int64Value {
	last := int64(nobody)
	if len(ids) > 0 {
		last = min(last, int64(ids[0].Size)-1)
	}
	return &runtimeapi.Int64Value{Value: last}
}
