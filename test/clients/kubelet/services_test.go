// Package kubelet drives the daemon with the kubelet's own client library. The
// socket is in SAMPAN_SOCKET, an image that can be pulled in SAMPAN_IMAGE.
package kubelet

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cri "k8s.io/cri-client/pkg"
)

// requestTimeout is what the kubelet has as runtimeRequestTimeout.
const requestTimeout = 2 * time.Minute

type node struct {
	runtime internalapi.RuntimeService
	images  internalapi.ImageManagerService
}

func connect(t *testing.T, streaming bool) node {
	t.Helper()
	socket := os.Getenv("SAMPAN_SOCKET")
	if socket == "" {
		t.Skip("SAMPAN_SOCKET is not set: test/e2e runs this in its lab")
	}
	var n node
	var err error
	n.runtime, err = cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + socket).
		WithConnectionTimeout(requestTimeout).WithUseStreaming(streaming).Build(t.Context())
	must(t, err)
	t.Cleanup(func() { n.runtime.Close(context.Background()) })
	n.images, err = cri.NewRemoteImageServiceBuilder().WithEndpoint("unix://" + socket).
		WithConnectionTimeout(requestTimeout).WithUseStreaming(streaming).Build(t.Context())
	must(t, err)
	t.Cleanup(func() { n.images.Close(context.Background()) })
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func get[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		must(t, err)
		return v
	}
}

func TestNode(t *testing.T) {
	n, ctx := connect(t, false), t.Context()
	v := get[*runtimeapi.VersionResponse](t)(n.runtime.Version(ctx, "0.1.0"))
	if v.RuntimeApiVersion != "v1" || v.RuntimeName != "sampan" {
		t.Errorf("version: %v", v)
	}
	st := get[*runtimeapi.StatusResponse](t)(n.runtime.Status(ctx, true))
	for _, c := range st.Status.Conditions {
		if !c.Status {
			t.Errorf("condition %v", c)
		}
	}
	if len(st.RuntimeHandlers) == 0 || !st.Features.GetMountOptions() || len(st.Info) == 0 {
		t.Errorf("status: %v", st)
	}
	config := get[*runtimeapi.RuntimeConfigResponse](t)(n.runtime.RuntimeConfig(ctx))
	if config.GetLinux() == nil {
		t.Errorf("runtime config: %v", config)
	}
	must(t, n.runtime.UpdateRuntimeConfig(ctx, &runtimeapi.RuntimeConfig{}))
}

func TestImages(t *testing.T) {
	for _, streaming := range []bool{false, true} {
		n, ctx := connect(t, streaming), t.Context()
		spec := &runtimeapi.ImageSpec{Image: os.Getenv("SAMPAN_IMAGE")}
		id := get[string](t)(n.images.PullImage(ctx, spec, nil, nil))
		st := get[*runtimeapi.ImageStatusResponse](t)(n.images.ImageStatus(ctx, spec, true))
		if st.Image.GetId() != id || len(st.Info) == 0 {
			t.Errorf("status %v, pulled %s", st, id)
		}
		all := get[[]*runtimeapi.Image](t)(n.images.ListImages(ctx, nil))
		if !slices.ContainsFunc(all, func(i *runtimeapi.Image) bool { return i.Id == id }) {
			t.Errorf("streaming %v: %s is not in %v", streaming, id, all)
		}
		if one := get[[]*runtimeapi.Image](t)(n.images.ListImages(ctx, &runtimeapi.ImageFilter{Image: spec})); len(one) != 1 {
			t.Errorf("streaming %v: filtered: %v", streaming, one)
		}
		fs := get[*runtimeapi.ImageFsInfoResponse](t)(n.images.ImageFsInfo(ctx))
		if len(fs.ImageFilesystems) == 0 {
			t.Errorf("file systems: %v", fs)
		}
		for range 2 {
			must(t, n.images.RemoveImage(ctx, spec))
		}
		if st := get[*runtimeapi.ImageStatusResponse](t)(n.images.ImageStatus(ctx, spec, false)); st.Image != nil {
			t.Errorf("removed: %v", st)
		}
		_, err := n.images.PullImage(ctx, &runtimeapi.ImageSpec{Image: "registry.k8s.io/no-such-image:1"}, nil, nil)
		if status.Code(err) != codes.NotFound {
			t.Errorf("absent image: %v", err)
		}
	}
}

// listen collects events until the test ends.
func listen(t *testing.T, n node) <-chan *runtimeapi.ContainerEventResponse {
	t.Helper()
	events := make(chan *runtimeapi.ContainerEventResponse, 100)
	ready := make(chan struct{})
	go n.runtime.GetContainerEvents(t.Context(), events, func(c runtimeapi.RuntimeService_GetContainerEventsClient) {
		c.Header() // comes when the daemon listens
		close(ready)
	})
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		t.Fatal("no answer to GetContainerEvents")
	}
	return events
}

func TestPod(t *testing.T) {
	t.Run("unary", func(t *testing.T) { testPod(t, connect(t, false)) })
	t.Run("streaming", func(t *testing.T) { testPod(t, connect(t, true)) })
}

func testPod(t *testing.T, n node) {
	ctx := t.Context()
	spec := &runtimeapi.ImageSpec{Image: os.Getenv("SAMPAN_IMAGE")}
	image := get[string](t)(n.images.PullImage(ctx, spec, nil, nil))
	namespaces := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "lab", Uid: "uid-p"},
		LogDirectory: t.TempDir(), Hostname: "p",
		Labels: map[string]string{"app": "p"}, Annotations: map[string]string{"long": strings.Repeat("x", 1<<20)},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces}},
	}
	events := listen(t, n)
	// For each event: the kind, whose it is, and the states of the containers.
	expect := func(kind runtimeapi.ContainerEventType, id string, states ...runtimeapi.ContainerState) {
		t.Helper()
		select {
		case e := <-events:
			var got []runtimeapi.ContainerState
			for _, c := range e.ContainersStatuses {
				got = append(got, c.State)
			}
			if e.ContainerEventType != kind || e.ContainerId != id || !slices.Equal(got, states) || e.PodSandboxStatus.GetMetadata().GetUid() != "uid-p" || time.Since(time.Unix(0, e.CreatedAt)) > time.Minute {
				t.Fatalf("event %v of %s at %d with %v, want %v of %s with %v", e.ContainerEventType, e.ContainerId, e.CreatedAt, got, kind, id, states)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("no event %v", kind)
		}
	}
	const (
		created, started = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
		stopped, deleted = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
	)
	pod := get[string](t)(n.runtime.RunPodSandbox(ctx, config, ""))
	expect(created, pod)
	expect(started, pod)
	container := get[string](t)(n.runtime.CreateContainer(ctx, pod, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: image, UserSpecifiedImage: spec.Image},
		Command: []string{"sh", "-c", "echo hello; exec sleep 1000"}, LogPath: "c.log", Labels: map[string]string{"app": "p"},
		Mounts: []*runtimeapi.Mount{{HostPath: config.LogDirectory, ContainerPath: "/m", MountOptions: []string{"noexec"}}},
		Linux:  &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: namespaces}},
	}, config))
	expect(created, container, runtimeapi.ContainerState_CONTAINER_CREATED)
	must(t, n.runtime.StartContainer(ctx, container))
	expect(started, container, runtimeapi.ContainerState_CONTAINER_RUNNING)

	st := get[*runtimeapi.PodSandboxStatusResponse](t)(n.runtime.PodSandboxStatus(ctx, pod, true))
	if len(st.ContainersStatuses) != 1 || st.ContainersStatuses[0].Id != container || time.Since(time.Unix(0, st.Timestamp)).Abs() > time.Minute || st.Status.GetNetwork().GetIp() == "" {
		t.Errorf("pod's status: %v", st)
	}
	pods := get[[]*runtimeapi.PodSandbox](t)(n.runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{Id: pod, LabelSelector: config.Labels}))
	containers := get[[]*runtimeapi.Container](t)(n.runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{PodSandboxId: pod}))
	if len(pods) != 1 || len(containers) != 1 || pods[0].Annotations["long"] != config.Annotations["long"] {
		t.Errorf("lists: %d pods, %d containers", len(pods), len(containers))
	}
	get[*runtimeapi.UpdatePodSandboxResourcesResponse](t)(n.runtime.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod, Resources: &runtimeapi.LinuxContainerResources{CpuShares: 700},
	}))
	if st := get[*runtimeapi.PodSandboxStatusResponse](t)(n.runtime.PodSandboxStatus(ctx, pod, true)); !strings.Contains(st.Info["info"], `"cpu_shares":700`) {
		t.Errorf("the pod's resources are not in %s", st.Info["info"])
	}
	resources := &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 600}}
	must(t, n.runtime.UpdateContainerResources(ctx, container, resources))
	cs := get[*runtimeapi.ContainerStatusResponse](t)(n.runtime.ContainerStatus(ctx, container, true))
	if cs.Status.GetResources().GetLinux().GetCpuShares() != 600 || cs.Status.ImageId != image || cs.Status.LogPath != filepath.Join(config.LogDirectory, "c.log") {
		t.Errorf("container's status: %v", cs.Status)
	}
	stdout, stderr, err := n.runtime.ExecSync(ctx, container, []string{"sh", "-c", "echo out; echo err >&2"}, 10*time.Second)
	if string(stdout) != "out\n" || string(stderr) != "err\n" || err != nil {
		t.Errorf("exec: %q %q %v", stdout, stderr, err)
	}
	stdout, _, err = n.runtime.ExecSync(ctx, container, []string{"grep", " /m ", "/proc/mounts"}, 10*time.Second)
	if !strings.Contains(string(stdout), "noexec") || err != nil {
		t.Errorf("mount: %q %v", stdout, err)
	}
	_, _, err = n.runtime.ExecSync(ctx, container, []string{"sh", "-c", "exit 3"}, 10*time.Second)
	if exit, ok := err.(interface{ ExitStatus() int }); !ok || exit.ExitStatus() != 3 {
		t.Errorf("exit code 3: %v", err)
	}
	if _, _, err = n.runtime.ExecSync(ctx, container, []string{"sleep", "100"}, time.Second); err == nil || !strings.Contains(err.Error(), cri.ErrCommandTimedOut.Error()) {
		t.Errorf("timeout: %v", err)
	}
	must(t, n.runtime.ReopenContainerLog(ctx, container))
	testStreams(t, n, pod, container)
	testStats(t, n, pod, container)

	for range 2 {
		must(t, n.runtime.StopContainer(ctx, container, 0))
	}
	expect(stopped, container, runtimeapi.ContainerState_CONTAINER_EXITED)
	for range 2 {
		must(t, n.runtime.RemoveContainer(ctx, container))
	}
	expect(deleted, container)
	for range 2 {
		must(t, n.runtime.StopPodSandbox(ctx, pod))
		must(t, n.runtime.RemovePodSandbox(ctx, pod))
	}
	expect(stopped, pod)
	expect(deleted, pod)
	if _, err := n.runtime.PodSandboxStatus(ctx, pod, false); status.Code(err) != codes.NotFound {
		t.Errorf("status of a removed pod: %v", err)
	}
	if _, err := n.runtime.ContainerStatus(ctx, container, false); status.Code(err) != codes.NotFound {
		t.Errorf("status of a removed container: %v", err)
	}
	must(t, n.images.RemoveImage(ctx, spec))
}

// testStreams asks for the URLs at which a client would go on.
func testStreams(t *testing.T, n node, pod, container string) {
	t.Helper()
	ctx := t.Context()
	exec := get[*runtimeapi.ExecResponse](t)(n.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: container, Cmd: []string{"true"}, Stdout: true}))
	attach := get[*runtimeapi.AttachResponse](t)(n.runtime.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: container, Stdout: true}))
	forward := get[*runtimeapi.PortForwardResponse](t)(n.runtime.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: pod, Port: []int32{80}}))
	for _, text := range []string{exec.Url, attach.Url, forward.Url} {
		if u, err := url.Parse(text); err != nil || u.Host == "" {
			t.Errorf("url %q: %v", text, err)
		}
	}
}

func testStats(t *testing.T, n node, pod, container string) {
	t.Helper()
	ctx := t.Context()
	one := get[*runtimeapi.ContainerStats](t)(n.runtime.ContainerStats(ctx, container))
	all := get[[]*runtimeapi.ContainerStats](t)(n.runtime.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{PodSandboxId: pod}))
	if one.GetMemory().GetUsageBytes().GetValue() == 0 || len(all) != 1 || all[0].GetAttributes().GetId() != container {
		t.Errorf("container's figures: %v; list: %v", one, all)
	}
	podOne := get[*runtimeapi.PodSandboxStats](t)(n.runtime.PodSandboxStats(ctx, pod))
	podAll := get[[]*runtimeapi.PodSandboxStats](t)(n.runtime.ListPodSandboxStats(ctx, &runtimeapi.PodSandboxStatsFilter{Id: pod}))
	if podOne.GetLinux().GetNetwork() == nil || len(podAll) != 1 || len(podAll[0].GetLinux().GetContainers()) != 1 {
		t.Errorf("pod's figures: %v; list: %v", podOne, podAll)
	}
	known := make(map[string]int)
	for _, d := range get[[]*runtimeapi.MetricDescriptor](t)(n.runtime.ListMetricDescriptors(ctx)) {
		known[d.Name] = len(d.LabelKeys)
	}
	metrics := get[[]*runtimeapi.PodSandboxMetrics](t)(n.runtime.ListPodSandboxMetrics(ctx))
	if len(metrics) != 1 || len(metrics[0].ContainerMetrics) != 1 || len(metrics[0].ContainerMetrics[0].Metrics) == 0 {
		t.Fatalf("metrics: %v", metrics)
	}
	for _, m := range metrics[0].ContainerMetrics[0].Metrics {
		if labels, ok := known[m.Name]; !ok || labels != len(m.LabelValues) {
			t.Errorf("metric %v does not fit its descriptor", m)
		}
	}
}
