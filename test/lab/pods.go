package lab

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Wait is how long the requests of the tests may take.
const Wait = time.Minute

// Pull pulls an image and returns its id.
func (l *Lab) Pull(t testing.TB, ref string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	r, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	must(t, err)
	return r.GetImageRef()
}

// PodConfig is a pod with a log directory and all namespaces of its own.
func (l *Lab) PodConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "lab", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(l.Logs(), name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// RunPod runs a pod and returns its id.
func (l *Lab) RunPod(t testing.TB, config *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	must(t, err)
	return r.GetPodSandboxId()
}

// RemovePod stops and removes a pod.
func (l *Lab) RemovePod(t testing.TB, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Wait)
	defer cancel()
	_, err := l.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
	must(t, err)
	_, err = l.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
	must(t, err)
}

// RemoveImage removes an image.
func (l *Lab) RemoveImage(t testing.TB, ref string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Wait)
	defer cancel()
	_, err := l.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	must(t, err)
}

// ContainerConfig is a container that logs to name.log.
func (l *Lab) ContainerConfig(name, image string, args ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Args:     args,
		LogPath:  name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// CreateContainer creates a container in a pod and returns its id.
func (l *Lab) CreateContainer(t testing.TB, pod string, podConfig *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	r, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
	must(t, err)
	return r.GetContainerId()
}

// StartContainer starts a created container.
func (l *Lab) StartContainer(t testing.TB, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	_, err := l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	must(t, err)
}

// Status is a container's status.
func (l *Lab) Status(t testing.TB, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	r, err := l.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	must(t, err)
	return r.GetStatus()
}

// AwaitExit waits until a container has exited and returns its status then.
func (l *Lab) AwaitExit(t testing.TB, id string, limit time.Duration) *runtimeapi.ContainerStatus {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		status := l.Status(t, id)
		if status.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
			return status
		}
		if time.Now().After(end) {
			t.Fatalf("container %s: %v after %v, want exited", id, status.GetState(), limit)
		}
	}
}

// ExecSync runs a command in a container.
func (l *Lab) ExecSync(t testing.TB, id string, command ...string) *runtimeapi.ExecSyncResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	r, err := l.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: 30})
	must(t, err)
	return r
}
