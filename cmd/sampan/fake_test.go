package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/admin"
)

// fake is a CRI runtime that only keeps books.
type fake struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer

	mu         sync.Mutex
	calls      []string
	fail       map[string]error // by the name of the call
	next       int
	images     map[string]bool
	pods       []*runtimeapi.PodSandbox
	containers []*runtimeapi.Container
	lastPod    *runtimeapi.RunPodSandboxRequest
	lastCreate *runtimeapi.CreateContainerRequest
	logPath    string
	exec       *runtimeapi.ExecSyncResponse
	conditions []*runtimeapi.RuntimeCondition
	loaded     int64
}

// startFake serves a fake on a socket and returns its endpoint.
func startFake(t *testing.T) (*fake, string) {
	t.Helper()
	f := &fake{fail: map[string]error{}, images: map[string]bool{}}
	path := filepath.Join(t.TempDir(), "cri.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		name := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
		f.mu.Lock()
		defer f.mu.Unlock()
		f.calls = append(f.calls, name)
		if err := f.fail[name]; err != nil {
			return nil, err
		}
		return handler(ctx, req)
	}))
	runtimeapi.RegisterRuntimeServiceServer(server, f)
	runtimeapi.RegisterImageServiceServer(server, f)
	admin.Register(server, admin.LoaderFunc(func(_ context.Context, r io.Reader, name string) ([]admin.Loaded, error) {
		n, err := io.Copy(io.Discard, r)
		f.loaded = n
		return []admin.Loaded{{ID: "sha256:abc", References: []string{name}}}, err
	}))
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-done })
	return f, "unix://" + path
}

// sampan runs the command line as main would.
func sampan(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := newCommand()
	cmd.SetArgs(args)
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	err := cmd.ExecuteContext(t.Context())
	if err != nil {
		fmt.Fprintln(&errOut, err)
		code = 1
		if exit, ok := err.(exitError); ok {
			code = int(exit)
		}
	}
	return out.String(), errOut.String(), code
}

func (f *fake) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "fake", RuntimeVersion: "7", RuntimeApiVersion: "v1"}, nil
}

func (f *fake) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{
		Status:          &runtimeapi.RuntimeStatus{Conditions: f.conditions},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{{Name: ""}, {Name: "builtin"}, {Name: "runc"}},
	}, nil
}

func (f *fake) RunPodSandbox(_ context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	f.lastPod = r
	pod := &runtimeapi.PodSandbox{
		Id: f.id(), Metadata: r.GetConfig().GetMetadata(), State: runtimeapi.PodSandboxState_SANDBOX_READY,
		Annotations: r.GetConfig().GetAnnotations(),
	}
	f.pods = append(f.pods, pod)
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: pod.GetId()}, nil
}

func (f *fake) id() string { f.next++; return fmt.Sprintf("%08x%056x", f.next*0x01010101, 0) }

func (f *fake) StopPodSandbox(context.Context, *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (f *fake) RemovePodSandbox(_ context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	for i, pod := range f.pods {
		if pod.GetId() == r.GetPodSandboxId() {
			f.pods = append(f.pods[:i:i], f.pods[i+1:]...)
			break
		}
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (f *fake) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: f.pods}, nil
}

func (f *fake) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	for _, pod := range f.pods {
		if pod.GetId() == r.GetPodSandboxId() {
			return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{
				Id: pod.GetId(), Metadata: pod.GetMetadata(), Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.88.0.2"},
			}}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "no such pod")
}

func (f *fake) CreateContainer(_ context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	f.lastCreate = r
	c := &runtimeapi.Container{
		Id: f.id(), PodSandboxId: r.GetPodSandboxId(), Metadata: r.GetConfig().GetMetadata(),
		State: runtimeapi.ContainerState_CONTAINER_RUNNING, CreatedAt: int64(f.next),
	}
	f.containers = append(f.containers, c)
	return &runtimeapi.CreateContainerResponse{ContainerId: c.GetId()}, nil
}

func (f *fake) StartContainer(context.Context, *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	return &runtimeapi.StartContainerResponse{}, nil
}

func (f *fake) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: f.containers}, nil
}

func (f *fake) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	for _, c := range f.containers {
		if c.GetId() == r.GetContainerId() {
			return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: c.GetId(), State: c.GetState(), LogPath: f.logPath}}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "no such container")
}

func (f *fake) ExecSync(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	return f.exec, nil
}

func (f *fake) ListImages(context.Context, *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	answer := &runtimeapi.ListImagesResponse{}
	for name := range f.images {
		answer.Images = append(answer.Images, &runtimeapi.Image{Id: "sha256:" + strings.Repeat("c", 64), RepoTags: []string{name}, Size: 1234567})
	}
	return answer, nil
}

func (f *fake) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if !f.images[r.GetImage().GetImage()] {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: "sha256:1"}}, nil
}

func (f *fake) PullImage(_ context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if a := r.GetAuth(); a != nil && (a.GetUsername() != "ann" || a.GetPassword() != "pass:word") {
		return nil, status.Error(codes.PermissionDenied, "wrong password")
	}
	f.images[r.GetImage().GetImage()] = true
	return &runtimeapi.PullImageResponse{ImageRef: "sha256:1"}, nil
}

func (f *fake) RemoveImage(_ context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	delete(f.images, r.GetImage().GetImage())
	return &runtimeapi.RemoveImageResponse{}, nil
}
