package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// label marks the pods that a benchmark has made.
const label = "dev.sampan/bench"

// callTime bounds one call.
const callTime = 2 * time.Minute

// target is a connection to a runtime.
type target struct {
	Target
	version string
	image   string // as the runtime calls it
	logDir  string
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
	known   map[int]uint64 // monitors seen so far: when each pid started
}

func dial(o Target) (*target, error) {
	conn, err := grpc.NewClient(o.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return nil, err
	}
	return &target{
		Target: o, conn: conn, known: map[int]uint64{},
		runtime: runtimeapi.NewRuntimeServiceClient(conn), images: runtimeapi.NewImageServiceClient(conn),
	}, nil
}

func (t *target) close() { t.conn.Close() } //nolint:errcheck // nothing is left to be lost

// daemon is the process that answers on the socket.
func (t *target) daemon() (int, error) {
	c, err := net.DialTimeout("unix", strings.TrimPrefix(t.Endpoint, "unix://"), 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var callErr error
	if err := raw.Control(func(fd uintptr) { peer, callErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if callErr != nil {
		return 0, callErr
	}
	if peer.Pid == 0 {
		return 0, errors.New("the daemon is in another PID namespace: run the benchmark where its processes can be seen")
	}
	return int(peer.Pid), nil
}

func (t *target) pull(ctx context.Context, ref string) (string, error) {
	r, err := t.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return r.GetImageRef(), err
}

// pod is a pod that a benchmark has made, with its containers.
type pod struct {
	id         string
	config     *runtimeapi.PodSandboxConfig
	containers []string
}

// podConfig is as the kubelet would ask for a small pod. Kubelets make the
// directory for its logs.
func (r *runner) podConfig(t *target, hostNetwork bool) *runtimeapi.PodSandboxConfig {
	r.serial++
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), r.serial)
	options := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	if hostNetwork {
		options.Network = runtimeapi.NamespaceMode_NODE
	}
	logs := filepath.Join(t.logDir, name)
	_ = os.MkdirAll(logs, 0o755) // if that fails, so do the containers, and say so
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "sampan-bench", Uid: name},
		LogDirectory: logs,
		Labels:       map[string]string{label: ""},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: options}},
	}
	if !hostNetwork {
		config.Hostname = name
	}
	return config
}

func (t *target) containerConfig(p *pod, command ...string) *runtimeapi.ContainerConfig {
	name := fmt.Sprintf("c%d", len(p.containers))
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: t.image},
		Command:  command,
		LogPath:  name + ".log",
		Labels:   map[string]string{label: ""},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 102, MemoryLimitInBytes: 1 << 30, OomScoreAdj: 900},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: p.config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
			},
		},
	}
}

// sleep is what a container does that is to do nothing.
var sleep = []string{"sleep", "1000000"}

// runPod is RunPodSandbox.
func (t *target) runPod(ctx context.Context, config *runtimeapi.PodSandboxConfig) (*pod, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	a, err := t.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: t.Handler})
	return &pod{id: a.GetPodSandboxId(), config: config}, err
}

// create is CreateContainer.
func (t *target) create(ctx context.Context, p *pod, config *runtimeapi.ContainerConfig) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	a, err := t.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	if err == nil {
		p.containers = append(p.containers, a.GetContainerId())
	}
	return a.GetContainerId(), err
}

// startContainer is StartContainer.
func (t *target) startContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := t.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return err
}

// add creates and starts a container.
func (t *target) add(ctx context.Context, p *pod, config *runtimeapi.ContainerConfig) (string, error) {
	id, err := t.create(ctx, p, config)
	if err != nil {
		return "", err
	}
	return id, t.startContainer(ctx, id)
}

// up makes a pod with one container that sleeps.
func (t *target) up(ctx context.Context, config *runtimeapi.PodSandboxConfig) (*pod, error) {
	p, err := t.runPod(ctx, config)
	if err != nil {
		return nil, err
	}
	_, err = t.add(ctx, p, t.containerConfig(p, sleep...))
	return p, err
}

// down is StopPodSandbox and RemovePodSandbox.
func (t *target) down(ctx context.Context, id string) error {
	return errors.Join(t.stop(ctx, id), t.remove(ctx, id))
}

func (t *target) stop(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := t.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
	return err
}

func (t *target) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := t.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

// execSync runs a command that must succeed.
func (t *target) execSync(ctx context.Context, id string, command ...string) error {
	a, err := t.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: 60})
	if err == nil && a.GetExitCode() != 0 {
		err = fmt.Errorf("exec %v: exit code %d: %s", command, a.GetExitCode(), a.GetStderr())
	}
	return err
}

// removeAll removes the pods and logs of this and earlier benchmarks.
func (t *target) removeAll(ctx context.Context) error {
	a, err := t.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{label: ""}}})
	if err != nil {
		return err
	}
	ids := make([]string, 0, len(a.GetItems()))
	for _, p := range a.GetItems() {
		ids = append(ids, p.GetId())
	}
	if err := inParallel(4, len(ids), func(i int) error { return t.down(ctx, ids[i]) }); err != nil {
		return err
	}
	logs, err := filepath.Glob(filepath.Join(t.logDir, "bench-*"))
	for _, dir := range logs {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// containerPids are the first processes of the containers that run.
func (t *target) containerPids(ctx context.Context) ([]int, error) {
	running := &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}
	a, err := t.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: running})
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, c := range a.GetContainers() {
		pid, err := t.containerPid(ctx, c.GetId())
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// containerPid is the first process of a container: the runtimes tell it in the
// same place, for crictl.
func (t *target) containerPid(ctx context.Context, id string) (int, error) {
	a, err := t.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return 0, err
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(a.GetInfo()["info"]), &info); err != nil || info.Pid == 0 {
		return 0, fmt.Errorf("container %s: the runtime does not tell its process", id)
	}
	return info.Pid, nil
}

// inParallel calls do with 0 to n-1, at most c at a time, and returns its errors.
func inParallel(c, n int, do func(int) error) error {
	errs := make([]error, n)
	next := make(chan int)
	done := make(chan struct{})
	for range c {
		go func() {
			for i := range next {
				errs[i] = do(i)
			}
			done <- struct{}{}
		}()
	}
	for i := range n {
		next <- i
	}
	close(next)
	for range c {
		<-done
	}
	return errors.Join(errs...)
}
