package spec

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// Build makes the spec of a container. Pod and Container have passed
// ValidatePod and ValidateContainer.
func Build(in Input) (*specs.Spec, error) { return nil, nil }

// ValidatePod checks the configuration of a pod.
func ValidatePod(pod *runtimeapi.PodSandboxConfig) error { return nil }

// ValidateContainer checks the configuration of a container in a pod.
func ValidateContainer(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) error {
	return nil
}

// ContainerUser returns the identity of a spec's process, as a container's
// status reports it.
func ContainerUser(s *specs.Spec) *runtimeapi.ContainerUser { return nil }

// PIDMode returns how a container of the pod gets its PID namespace: POD (the
// pod's shared one, to be given as Namespaces.PID), CONTAINER (one of its own),
// NODE (the host's) or TARGET (that of the container whose id is returned, to
// be given as Namespaces.PID).
func PIDMode(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) (mode runtimeapi.NamespaceMode, target string) {
	return 0, ""
}

// Namespaces a pod has of its own.
type PodNamespaces struct{ Network, IPC, UTS, PID, User bool }

// NamespacesOf tells which namespaces a pod has of its own; the rest are the
// host's. PID means one shared by its containers.
func NamespacesOf(pod *runtimeapi.PodSandboxConfig) PodNamespaces { return PodNamespaces{} }

// SeccompFile returns the path of the seccomp profile that a container needs
// as Input.SeccompProfile, or "" if it needs none.
func SeccompFile(c *runtimeapi.ContainerConfig) (string, error) { return "", nil }

// AppArmorProfile returns the name of the AppArmor profile of a container, or
// "" for none.
func AppArmorProfile(c *runtimeapi.ContainerConfig, facts host.Facts) (string, error) {
	return "", nil
}

// DefaultAppArmorProfile is the profile of containers that ask for none or for
// the runtime's default. Somebody has to load it.
const DefaultAppArmorProfile = "sampan-default"

// ImageVolumes lists the paths of the image's VOLUMEs on which the container
// mounts nothing itself, sorted.
func ImageVolumes(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) []string { return nil }

// Resources converts resource limits; see MergeResources for an update.
func Resources(r *runtimeapi.LinuxContainerResources, facts host.Facts) (*specs.LinuxResources, error) {
	return nil, nil
}

// MergeResources returns old with all that update specifies.
func MergeResources(old, update *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	return nil
}

// StopSignal returns the signal that asks the container to stop: the
// container's, else the image's, else SIGTERM.
func StopSignal(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) (unix.Signal, error) {
	return unix.SIGTERM, nil
}

// SignalOf returns the CRI's name of a signal, for a container's status.
func SignalOf(sig unix.Signal) runtimeapi.Signal { return 0 }

// Sysctls returns the pod's sysctls as names below /proc/sys ("net/ipv4/ip_forward").
// Those below net belong to the pod's network namespace, all others to its
// IPC namespace.
func Sysctls(pod *runtimeapi.PodSandboxConfig) (map[string]string, error) { return nil, nil }
