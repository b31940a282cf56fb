// Package v1alpha2 is a client of the Kubernetes 1.18 era: its module has nothing
// newer than what that release was built with. It drives the daemon whose socket
// SAMPAN_SOCKET names, with the image in SAMPAN_IMAGE.
package v1alpha2

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1alpha2"
)

type client struct {
	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	conn   *grpc.ClientConn
}

func dial(t *testing.T) client {
	t.Helper()
	socket := os.Getenv("SAMPAN_SOCKET")
	if socket == "" {
		t.Skip("SAMPAN_SOCKET is not set: test/e2e runs this in its lab")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := grpc.DialContext(ctx, socket, grpc.WithInsecure(), grpc.WithBlock(),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn), conn}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestNode(t *testing.T) {
	c, ctx := dial(t), deadline(t)
	v, err := c.Version(ctx, &runtimeapi.VersionRequest{Version: "0.1.0"})
	must(t, err)
	if v.Version != "0.1.0" || v.RuntimeName != "sampan" || v.RuntimeVersion == "" || v.RuntimeApiVersion != "v1alpha2" {
		t.Errorf("version: %+v", v)
	}
	st, err := c.Status(ctx, &runtimeapi.StatusRequest{})
	must(t, err)
	for _, cond := range st.Status.Conditions {
		if !cond.Status {
			t.Errorf("condition %v", cond)
		}
	}
	if len(st.Status.Conditions) < 2 {
		t.Errorf("conditions: %v", st.Status.Conditions)
	}
	_, err = c.UpdateRuntimeConfig(ctx, &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{}})
	must(t, err)
	fs, err := c.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	must(t, err)
	if len(fs.ImageFilesystems) == 0 || fs.ImageFilesystems[0].FsId.Mountpoint == "" {
		t.Errorf("image file systems: %v", fs)
	}
	// What came after the old API is not under its name.
	err = c.conn.Invoke(ctx, "/runtime.v1alpha2.RuntimeService/RuntimeConfig", &runtimeapi.VersionRequest{}, &runtimeapi.VersionResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("RuntimeConfig: %v", err)
	}
}

// The deprecated strings are all that this API has to ask for a profile.
func TestLifecycle(t *testing.T) {
	c, ctx, image := dial(t), deadline(t), os.Getenv("SAMPAN_IMAGE")
	spec := &runtimeapi.ImageSpec{Image: image}
	pulled, err := c.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
	must(t, err)
	is, err := c.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
	must(t, err)
	if is.Image == nil || is.Image.Id != pulled.ImageRef || is.Image.Size_ == 0 {
		t.Fatalf("image: %+v, pulled %s", is.Image, pulled.ImageRef)
	}
	imageList, err := c.images.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: spec}})
	must(t, err)
	if len(imageList.Images) != 1 {
		t.Fatalf("images: %v", imageList.Images)
	}

	logs, err := os.MkdirTemp("", "")
	must(t, err)
	defer os.RemoveAll(logs)
	namespaces := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	pod := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "old", Namespace: "lab", Uid: "uid-old"},
		Hostname:     "old",
		LogDirectory: logs,
		Labels:       map[string]string{"era": "1.18"},
		Annotations:  map[string]string{"note": "kept as it is"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: namespaces, SeccompProfilePath: "docker/default",
		}},
	}
	run, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod})
	must(t, err)
	ps, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: run.PodSandboxId})
	must(t, err)
	if s := ps.Status; s.State != runtimeapi.PodSandboxState_SANDBOX_READY || net.ParseIP(s.Network.Ip) == nil || s.Annotations["note"] != "kept as it is" {
		t.Fatalf("pod: %+v", s)
	}
	pods, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: pod.Labels}})
	must(t, err)
	if len(pods.Items) != 1 {
		t.Fatalf("pods: %v", pods.Items)
	}

	// Seccomp's mode as the kernel tells: 0 is none, 2 a filter.
	for _, tt := range []struct{ profile, mode string }{
		{"runtime/default", "2"}, {"docker/default", "2"}, {"unconfined", "0"}, {"", "0"},
	} {
		t.Run("seccomp "+tt.profile, func(t *testing.T) {
			lifecycle(t, c, run.PodSandboxId, pod, &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "c" + strings.ReplaceAll(tt.profile, "/", "-")},
				Image:    spec,
				Command:  []string{"sh", "-c", "echo hello; exec sleep 1000"},
				LogPath:  "c" + strings.ReplaceAll(tt.profile, "/", "-") + ".log",
				Linux: &runtimeapi.LinuxContainerConfig{
					Resources:       &runtimeapi.LinuxContainerResources{CpuShares: 512},
					SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: namespaces, SeccompProfilePath: tt.profile},
				},
			}, tt.mode)
		})
	}
	for range 2 {
		_, err = c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: run.PodSandboxId})
		must(t, err)
		_, err = c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: run.PodSandboxId})
		must(t, err)
		_, err = c.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec})
		must(t, err)
	}
	if is, err = c.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec}); err != nil || is.Image != nil {
		t.Fatalf("removed image: %v, %v", is, err)
	}
	if _, err = c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: run.PodSandboxId}); status.Code(err) != codes.NotFound {
		t.Fatalf("removed pod: %v", err)
	}
}

func lifecycle(t *testing.T, c client, podID string, pod *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig, seccomp string) {
	ctx := deadline(t)
	created, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: config, SandboxConfig: pod})
	must(t, err)
	id := created.ContainerId
	_, err = c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	must(t, err)
	list, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: podID}})
	must(t, err)
	if len(list.Containers) != 1 || list.Containers[0].State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("containers: %v", list.Containers)
	}
	out, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"grep", "Seccomp:", "/proc/self/status"}, Timeout: 30})
	must(t, err)
	if fields := strings.Fields(string(out.Stdout)); len(fields) != 2 || fields[1] != seccomp {
		t.Errorf("seccomp mode %q, want %s", out.Stdout, seccomp)
	}
	_, err = c.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 1024}})
	must(t, err)
	_, err = c.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	must(t, err)
	log := filepath.Join(pod.LogDirectory, config.LogPath)
	awaitLog(t, log, " stdout F hello\n")
	for range 2 {
		_, err = c.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 0})
		must(t, err)
	}
	st, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	must(t, err)
	if s := st.Status; s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.FinishedAt == 0 {
		t.Errorf("stopped: %+v", s)
	}
	awaitLog(t, log, " stdout F hello\n")
	for range 2 {
		_, err = c.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		must(t, err)
	}
}

// awaitLog waits until the log ends with a line: the container may not have come
// to writing it.
func awaitLog(t *testing.T, path, end string) {
	t.Helper()
	var log []byte
	var err error
	for range 500 {
		if log, err = os.ReadFile(path); err == nil && strings.HasSuffix(string(log), end) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("log %q, %v", log, err)
}
