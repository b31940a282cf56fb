package e2e

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/test/lab"
)

// counting counts in a variable of a shell and shows how far it is in a file, in the
// log, and in /dev/shm.
const counting = "i=0; echo was here > /root-mark; rm /etc/group; while :; do i=$((i+1)); echo $i > /count; echo $i > /dev/shm/count; echo line $i; sleep 0.05; done"

// needCRIU skips a test where there is no CRIU that works.
func needCRIU(t *testing.T) {
	t.Helper()
	lab.Require(t)
	if _, err := new(host.CRIU).Check(t.Context()); err != nil {
		t.Skipf("probe: %v", err)
	}
}

// eachRuntime runs a test with the built-in handler and with runc.
func eachRuntime(t *testing.T, test func(t *testing.T, l *lab.Lab)) {
	for name, keys := range map[string]string{"builtin": "", "runc": `default_handler = "runc"`} {
		t.Run(name, func(t *testing.T) {
			test(t, lab.New(t, lab.Options{Keys: keys, Config: "[handlers.runc]\npath = \"/usr/sbin/runc\"\n"}))
		})
	}
}

// number is what a file of a container says.
func number(t testing.TB, l *lab.Lab, id, file string) int {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		out := l.ExecSync(t, id, "cat", file)
		if n, err := strconv.Atoi(strings.TrimSpace(string(out.GetStdout()))); err == nil && out.GetExitCode() == 0 {
			return n
		}
	}
	t.Fatalf("%s of container %s is no number", file, id)
	return 0
}

// counted waits until a container has counted on from n, and returns how far.
func counted(t testing.TB, l *lab.Lab, id string, n int) int {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		if now := number(t, l, id, "/count"); now > n {
			return now
		}
	}
	t.Fatalf("container %s does not count", id)
	return 0
}

func runCounter(t testing.TB, l *lab.Lab, pod string, podConfig *runtimeapi.PodSandboxConfig, name, image string) string {
	t.Helper()
	id := l.CreateContainer(t, pod, podConfig, l.ContainerConfig(name, image, "sh", "-c", counting))
	l.StartContainer(t, id)
	return id
}

func codeOf(err error) codes.Code { return status.Code(err) }

func TestCheckpointContainer(t *testing.T) {
	needCRIU(t)
	eachRuntime(t, func(t *testing.T, l *lab.Lab) {
		image := l.Pull(t, "busybox")
		podConfig := l.PodConfig("counter")
		pod := l.RunPod(t, podConfig)
		id := runCounter(t, l, pod, podConfig, "count", image)
		counted(t, l, id, 5)
		archive := filepath.Join(l.Tmp(), "count.tar")
		if out, errs, err := l.Crictl("checkpoint", "--export="+archive, id); err != nil {
			t.Fatal(out, errs, err)
		}
		after := counted(t, l, id, 5)
		counted(t, l, id, after) // it goes on
		checkArchive(t, archive)
		l.RemovePod(t, pod)

		podConfig = l.PodConfig("restored")
		pod = l.RunPod(t, podConfig)
		config := l.ContainerConfig("count", archive)
		restored := l.CreateContainer(t, pod, podConfig, config)
		st := l.Status(t, restored)
		if st.GetState() != runtimeapi.ContainerState_CONTAINER_CREATED || st.GetImageId() != image {
			t.Errorf("a restored container is %v of image %s, want created and %s", st.GetState(), st.GetImageId(), image)
		}
		if again := l.CreateContainer(t, pod, podConfig, config); again != restored {
			t.Errorf("created again it is %s, not %s", again, restored)
		}
		time.Sleep(200 * time.Millisecond)
		if out, _ := os.ReadFile(filepath.Join(podConfig.LogDirectory, "count.log")); len(out) > 0 {
			t.Errorf("log before the start: %q", out)
		}
		l.StartContainer(t, restored)
		wentOn(t, l, restored, filepath.Join(podConfig.LogDirectory, "count.log"), 5, after)

		if _, err := l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: restored}); err != nil {
			t.Error(err)
		}
		if st := l.Status(t, restored); st.GetExitCode() != 137 || st.GetFinishedAt() == 0 {
			t.Errorf("the stopped container's status: %v", st)
		}
	})
}

// checkArchive looks for what other tools want to see in a checkpoint.
func checkArchive(t *testing.T, archive string) {
	t.Helper()
	info, err := os.Stat(archive)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("archive: mode %v, error %v; want 0600", info.Mode(), err)
	}
	names := strings.Join(tarNames(t, archive), "\n")
	for _, want := range []string{
		"config.dump", "spec.dump", "status.dump", "bind.mounts", "deleted.files", "rootfs-diff.tar", "devshm-checkpoint.tar", "dump.log", "stats-dump",
		"checkpoint/pages-1.img", "checkpoint/descriptors.json",
	} {
		if !strings.Contains(names, want) {
			t.Errorf("the archive has no %s, only\n%s", want, names)
		}
	}
	if left, _ := filepath.Glob(archive + ".*"); len(left) > 0 {
		t.Errorf("left beside the archive: %v", left)
	}
}

func tarNames(t *testing.T, archive string) []string {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var names []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

// wentOn checks that a restored counter, which had counted to between least and
// most, counts on, has its files, and can be used as any container.
func wentOn(t *testing.T, l *lab.Lab, id, log string, least, most int) {
	t.Helper()
	n := counted(t, l, id, most)
	counted(t, l, id, n)
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	fields := strings.Fields(first)
	if len(fields) != 5 {
		t.Fatalf("the first line of the log is %q", first)
	}
	if n, err := strconv.Atoi(fields[4]); err != nil || n < least || n > most+1 {
		t.Errorf("the restored counter begins with %q, want %d to %d", first, least, most+1)
	}
	if out := l.ExecSync(t, id, "cat", "/root-mark"); string(out.GetStdout()) != "was here\n" {
		t.Errorf("what the container had written is %q", out.GetStdout())
	}
	if out := l.ExecSync(t, id, "ls", "/etc/group"); out.GetExitCode() == 0 {
		t.Error("what the container had removed is there again")
	}
	if number(t, l, id, "/dev/shm/count") < least {
		t.Error("/dev/shm is another")
	}
}

func TestCheckpointRefuses(t *testing.T) {
	needCRIU(t)
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	podConfig := l.PodConfig("counter")
	pod := l.RunPod(t, podConfig)
	id := runCounter(t, l, pod, podConfig, "count", image)
	created := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("created", image, "true"))
	for _, tc := range []struct {
		name, id, location string
		want               codes.Code
	}{
		{"no location", id, "", codes.InvalidArgument},
		{"relative location", id, "here.tar", codes.InvalidArgument},
		{"no such directory", id, "/no/such/directory/x.tar", codes.InvalidArgument},
		{"no such container", "absent", "/tmp/x.tar", codes.NotFound},
		{"not started", created, filepath.Join(l.Tmp(), "x.tar"), codes.FailedPrecondition},
	} {
		if _, err := l.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: tc.id, Location: tc.location}); codeOf(err) != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	late, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	archive := filepath.Join(l.Tmp(), "late.tar")
	if _, err := l.Runtime.CheckpointContainer(late, &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: archive}); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("a deadline that passes: %v", err)
	}
	counted(t, l, id, counted(t, l, id, 0)) // it goes on
	await(t, "the end of what a checkpoint that came too late had begun", func() bool {
		left, _ := filepath.Glob(archive + "*")
		return len(left) == 0
	})

	bad := filepath.Join(l.Tmp(), "bad.tar")
	if err := os.WriteFile(bad, []byte(strings.Repeat("this is no archive ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		image string
		want  codes.Code
	}{
		"no archive": {bad, codes.InvalidArgument},
		"absent":     {filepath.Join(l.Tmp(), "absent.tar"), codes.NotFound},
	} {
		config := l.ContainerConfig("restored", tc.image)
		if _, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig}); codeOf(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	good := filepath.Join(l.Tmp(), "good.tar")
	if _, err := l.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: good, Timeout: 60}); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*runtimeapi.ContainerConfig){
		"a mount more": func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/more", HostPath: l.Tmp()}}
		},
		"a terminal":         func(c *runtimeapi.ContainerConfig) { c.Tty = true },
		"a read-only rootfs": func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true },
		"fewer capabilities": func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		},
	} {
		config := l.ContainerConfig("restored", good)
		edit(config)
		_, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
		if want := map[bool]codes.Code{true: codes.PermissionDenied, false: codes.InvalidArgument}[name == "fewer capabilities"]; codeOf(err) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	if _, err := l.Images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}}); err != nil {
		t.Fatal(err)
	}
	config := l.ContainerConfig("restored", good)
	_, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
	if codeOf(err) != codes.NotFound || !strings.Contains(err.Error(), "pull it") {
		t.Errorf("without its image: %v", err)
	}
}

func TestCheckpointWithoutCRIU(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\n[ $1 = --version ] && echo Version: 0.1 && exit\necho Error: no such kernel >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		path string
		want codes.Code
		says string
	}{
		"missing": {"/no/such/criu", codes.Unimplemented, "not installed"},
		"broken":  {broken, codes.FailedPrecondition, "no such kernel"},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.New(t, lab.Options{Config: fmt.Sprintf("[checkpoint]\ncriu = %q\n", tc.path)})
			image := l.Pull(t, "busybox")
			podConfig := l.PodConfig("counter")
			pod := l.RunPod(t, podConfig)
			id := runCounter(t, l, pod, podConfig, "count", image)
			archive := filepath.Join(l.Tmp(), "x.tar")
			_, err := l.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: archive})
			if codeOf(err) != tc.want || !strings.Contains(fmt.Sprint(err), tc.says) {
				t.Errorf("checkpoint: %v, want %v", err, tc.want)
			}
			if _, err := l.Runtime.CheckpointPod(t.Context(), &runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: []string{id}, OutputPath: t.TempDir()}); codeOf(err) != tc.want {
				t.Errorf("checkpoint of a pod: %v, want %v", err, tc.want)
			}
			r, err := l.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
			if err != nil {
				t.Fatal(err)
			}
			var config struct{ Checkpoints string }
			if err := json.Unmarshal([]byte(r.GetInfo()["config"]), &config); err != nil || !strings.Contains(config.Checkpoints, tc.says) {
				t.Errorf("status says of checkpoints %q, error %v", config.Checkpoints, err)
			}
		})
	}
}

// TestCheckpointPod has one container write what another one reads, and checks that
// the cut goes through both at the same moment.
func TestCheckpointPod(t *testing.T) {
	needCRIU(t)
	eachRuntime(t, func(t *testing.T, l *lab.Lab) {
		image := l.Pull(t, "busybox")
		podConfig := l.PodConfig("pair")
		pod := l.RunPod(t, podConfig)
		configs := []*runtimeapi.ContainerConfig{
			l.ContainerConfig("one", image, "sh", "-c", counting), l.ContainerConfig("two", image, "sh", "-c", strings.ReplaceAll(counting, "/dev/shm/count", "/dev/shm/two")),
		}
		var ids []string
		for _, c := range configs {
			id := l.CreateContainer(t, pod, podConfig, c)
			l.StartContainer(t, id)
			ids = append(ids, id)
		}
		for _, id := range ids {
			counted(t, l, id, 3)
		}
		dir := filepath.Join(l.Tmp(), "pod")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		refusePod(t, l, pod, ids, dir)
		if _, err := l.Runtime.CheckpointPod(t.Context(), &runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: dir}); err != nil {
			t.Fatal(err)
		}
		var after []int
		for _, id := range ids {
			after = append(after, counted(t, l, id, counted(t, l, id, 3)))
		}
		l.RemovePod(t, pod)

		again := l.PodConfig("pair")
		again.Metadata.Uid, again.Metadata.Attempt = "another", 1
		again.LogDirectory = filepath.Join(l.Logs(), "again")
		request := &runtimeapi.RestorePodRequest{CheckpointPath: dir, Config: again, ContainerConfigs: configs}
		refuseRestore(t, l, request)
		r, err := l.Runtime.RestorePod(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		if second, err := l.Runtime.RestorePod(t.Context(), request); err != nil || !proto.Equal(second, r) {
			t.Errorf("asked again: %v, error %v; want %v", second, err, r)
		}
		for i, c := range r.GetRestoredContainers() {
			if st := l.Status(t, c.GetContainerId()); c.GetName() != configs[i].Metadata.Name || st.GetState() != runtimeapi.ContainerState_CONTAINER_CREATED {
				t.Errorf("container %v is %v", c, st.GetState())
			}
			l.StartContainer(t, c.GetContainerId())
		}
		for i, c := range r.GetRestoredContainers() {
			n := counted(t, l, c.GetContainerId(), 3)
			if n > after[i]+100 {
				t.Errorf("container %d is at %d, but was at most at %d", i, n, after[i])
			}
			counted(t, l, c.GetContainerId(), n)
		}
		l.RemovePod(t, r.GetPodSandboxId())
	})
}

func refusePod(t *testing.T, l *lab.Lab, pod string, ids []string, dir string) {
	t.Helper()
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		r    *runtimeapi.CheckpointPodRequest
		want codes.Code
	}{
		"no pod":          {&runtimeapi.CheckpointPodRequest{PodSandboxId: "absent", ContainerIds: ids, OutputPath: dir}, codes.NotFound},
		"no containers":   {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, OutputPath: dir}, codes.InvalidArgument},
		"twice":           {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: []string{ids[0], ids[0]}, OutputPath: dir}, codes.InvalidArgument},
		"no such":         {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: []string{"absent"}, OutputPath: dir}, codes.NotFound},
		"an option":       {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: dir, Options: map[string]string{"fast": "yes"}}, codes.InvalidArgument},
		"not empty":       {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: full}, codes.InvalidArgument},
		"not there":       {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: "/no/such"}, codes.InvalidArgument},
		"a relative path": {&runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: "pod"}, codes.InvalidArgument},
	} {
		if _, err := l.Runtime.CheckpointPod(t.Context(), tc.r); codeOf(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.Runtime.CheckpointPod(late, &runtimeapi.CheckpointPodRequest{PodSandboxId: pod, ContainerIds: ids, OutputPath: dir}); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("a deadline that passes: %v", err)
	}
	for _, id := range ids {
		counted(t, l, id, counted(t, l, id, 0)) // they go on
	}
	await(t, "an empty directory", func() bool {
		left, err := os.ReadDir(dir)
		return err == nil && len(left) == 0
	})
}

func refuseRestore(t *testing.T, l *lab.Lab, good *runtimeapi.RestorePodRequest) {
	t.Helper()
	for name, tc := range map[string]struct {
		edit func(*runtimeapi.RestorePodRequest)
		want codes.Code
	}{
		"an option":        {func(r *runtimeapi.RestorePodRequest) { r.Options = map[string]string{"fast": "yes"} }, codes.InvalidArgument},
		"no such handler":  {func(r *runtimeapi.RestorePodRequest) { r.RuntimeHandler = "absent" }, codes.InvalidArgument},
		"no checkpoint":    {func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath = l.Tmp() }, codes.InvalidArgument},
		"a container less": {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs = r.ContainerConfigs[:1] }, codes.InvalidArgument},
		"another name":     {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[0].Metadata.Name = "three" }, codes.InvalidArgument},
		"another command":  {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[1].Args = []string{"true"} }, codes.InvalidArgument},
		"another user": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[1].Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 7}
		}, codes.InvalidArgument},
		"another image": {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[1].Image.Image = "absent" }, codes.NotFound},
		"fewer capabilities": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[1].Linux.SecurityContext.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		}, codes.PermissionDenied},
		"the host's IPC": {func(r *runtimeapi.RestorePodRequest) {
			r.Config.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		}, codes.InvalidArgument},
	} {
		r := proto.CloneOf(good)
		tc.edit(r)
		if _, err := l.Runtime.RestorePod(t.Context(), r); codeOf(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	late, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := l.Runtime.RestorePod(late, good); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("a deadline that passes: %v", err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		pods, err := l.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(pods.GetItems()) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left of refused restores: %v", pods)
		}
	}
}

// TestCheckpointImage restores a container from an image that is a checkpoint, as
// buildah makes one of an archive: where the node's owner allows it.
func TestCheckpointImage(t *testing.T) {
	needCRIU(t)
	l := lab.New(t, lab.Options{Config: "[checkpoint]\nrestore_images = true\n"})
	image := l.Pull(t, "busybox")
	podConfig := l.PodConfig("counter")
	pod := l.RunPod(t, podConfig)
	id := runCounter(t, l, pod, podConfig, "count", image)
	counted(t, l, id, 5)
	archive := filepath.Join(l.Tmp(), "count.tar")
	if _, err := l.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: archive}); err != nil {
		t.Fatal(err)
	}
	after := counted(t, l, id, 5)
	l.RemovePod(t, pod)

	const name = "example.test/checkpoints/count:1"
	loadCheckpoint(t, l, archive, name)
	podConfig = l.PodConfig("restored")
	pod = l.RunPod(t, podConfig)
	restored := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("count", name))
	if st := l.Status(t, restored); st.GetImageId() != image {
		t.Errorf("the restored container's image is %s, want %s, which the checkpointed one was made of", st.GetImageId(), image)
	}
	l.StartContainer(t, restored)
	wentOn(t, l, restored, filepath.Join(podConfig.LogDirectory, "count.log"), 5, after)
	l.RemovePod(t, pod)

	l.Stop(t)
	l.Configure(t, lab.Options{})
	l.Start(t)
	pod = l.RunPod(t, podConfig)
	_, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: l.ContainerConfig("count", name), SandboxConfig: podConfig})
	if codeOf(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "restore_images") {
		t.Errorf("where images are not to be restored: %v", err)
	}
}

// loadCheckpoint loads an image of one layer, a checkpoint's archive.
func loadCheckpoint(t *testing.T, l *lab.Lab, archive, name string) {
	t.Helper()
	layer, err := tarball.LayerFromFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layer)
	if err != nil {
		t.Fatal(err)
	}
	image = mutate.Annotations(image, map[string]string{"org.criu.checkpoint.container.name": "count"}).(v1.Image)
	dir := filepath.Join(l.Tmp(), "layout")
	path, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = path.AppendImage(image)
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(dir + ".tar")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(os.Getenv(lab.Binary), "image", "load", "--endpoint", "unix://"+l.Socket, "--name", name, f.Name()).CombinedOutput()
	if err != nil {
		t.Fatalf("sampan image load: %v\n%s", err, out)
	}
}
