// Package spec turns what the CRI asks for into what an OCI runtime is told:
// container and pod configuration, image configuration and facts of the host
// in, an OCI runtime spec out.
//
// It is pure. It opens no file, reads no clock, asks no kernel: what it needs
// to know of the host, the image's files and the pod is in its Input, read by
// the caller. The same Input gives the same spec.
//
// It also says what is wrong with a request: ValidatePod and ValidateContainer
// check all that can be known from the messages alone, Build what depends on
// the Input. Every error is a *FieldError.
package spec

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// Input is all that a container's spec depends on.
type Input struct {
	PodID, ContainerID string
	Pod                *runtimeapi.PodSandboxConfig // as given to RunPodSandbox
	Container          *runtimeapi.ContainerConfig
	Image              ocispec.ImageConfig

	Rootfs string // absolute path of the mounted root file system

	// Passwd and Group are the image's /etc/passwd and /etc/group, nil if it
	// has none.
	Passwd, Group []byte

	// Hostname is the host name in the container's UTS namespace.
	Hostname string
	// CgroupsPath is the OCI cgroupsPath, in the form of the cgroup driver.
	CgroupsPath string
	Namespaces  Namespaces
	Files       Files

	// Sources has, for each of Container.Mounts, what stands at its source.
	Sources []Source
	// Volumes has a host directory for each of ImageVolumes.
	Volumes map[string]string
	// Devices has, for each HostPath of Container.Devices, the nodes that
	// stand there: itself, or all below it if it is a directory.
	Devices map[string][]host.Device
	// HostDevices are all devices of the host, for a privileged container.
	HostDevices []host.Device

	// SeccompProfile is the content of the file that SeccompFile names.
	SeccompProfile []byte
	// AppArmorProfile is the name of the loaded profile that fits AppArmorOf, empty
	// for none.
	AppArmorProfile string
	// ProcessLabel and MountLabel are the SELinux labels, empty for none.
	ProcessLabel, MountLabel string

	Host    host.Facts
	Handler Features
}

// Namespaces are paths of the pod's pinned namespaces. An empty path is right
// only where the pod or the container uses the host's namespace, or, for PID,
// where the container gets one of its own; see PIDMode. User is empty unless
// the pod has a user namespace.
type Namespaces struct {
	Network, IPC, UTS, PID, User string
}

// Files are paths on the host of what every container of the pod finds at a
// well-known place, unless its configuration mounts something else there. An
// empty path leaves the place as the image has it.
type Files struct {
	ResolvConf string // /etc/resolv.conf
	Hostname   string // /etc/hostname
	Hosts      string // /etc/hosts
	Shm        string // /dev/shm
}

// Source is what stands at the source of a mount.
type Source struct {
	// Path is the real path on the host, symbolic links followed, or where an
	// image volume is mounted.
	Path string
	// Shared and Slave are the propagation of the mount that holds Path; they
	// matter only to a mount that asks for propagation.
	Shared, Slave bool
}

// Version is the version of the OCI runtime specification that specs are
// written to: the oldest that has all that is used, because some runtimes
// (crun before 1.9) refuse later ones.
const Version = "1.0.2"

// Build makes the spec of a container. Pod and Container have passed
// ValidatePod and ValidateContainer.
func Build(in Input) (*specs.Spec, error) {
	p, err := process(in)
	if err != nil {
		return nil, err
	}
	limits, err := Resources(in.Container.GetLinux().GetResources(), in.Host)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:     Version,
		Process:     p,
		Root:        &specs.Root{Path: in.Rootfs, Readonly: in.Container.GetLinux().GetSecurityContext().GetReadonlyRootfs()},
		Annotations: annotations(in),
		Linux:       &specs.Linux{CgroupsPath: in.CgroupsPath, Resources: limits},
	}
	for _, add := range []func(*specs.Spec, Input) error{namespaces, mounts, devices, confine} {
		if err := add(s, in); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// annotationPrefix is that of the annotations by which containerd tells
// sandboxing runtimes (Kata, gVisor) and hooks what a container is.
const annotationPrefix = "io.kubernetes.cri."

// annotations name the container and its pod. The annotations of the pod are
// not among them: an OCI runtime may obey them, and they are whatever the
// pod's author wrote.
func annotations(in Input) map[string]string {
	a := sandboxAnnotations(in)
	a[annotationPrefix+"container-type"] = "container"
	a[annotationPrefix+"container-name"] = in.Container.GetMetadata().GetName()
	a[annotationPrefix+"image-name"] = in.Container.GetImage().GetImage()
	return a
}

func sandboxAnnotations(in Input) map[string]string {
	return map[string]string{
		annotationPrefix + "container-type":    "sandbox",
		annotationPrefix + "sandbox-id":        in.PodID,
		annotationPrefix + "sandbox-name":      in.Pod.GetMetadata().GetName(),
		annotationPrefix + "sandbox-namespace": in.Pod.GetMetadata().GetNamespace(),
		annotationPrefix + "sandbox-uid":       in.Pod.GetMetadata().GetUid(),
	}
}
