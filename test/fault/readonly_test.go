package fault

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// A disk that has become read-only, as ext4 makes it after an error: what runs
// goes on, what would be new fails with the reason, stops work, and the daemon
// comes back when the disk does.
func TestReadOnlyDisk(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("steady")
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sleep", "1000"))
	l.StartContainer(t, id)
	writable := makeReadOnly(t, l.Root)

	_, err := l.Runtime.RunPodSandbox(brief(t), &runtimeapi.RunPodSandboxRequest{Config: l.PodConfig("new")})
	refused(t, "run a pod", err)
	_, err = create(brief(t), l, pod, config, l.ContainerConfig("new", image, "true"))
	refused(t, "create a container", err)
	_, err = l.Images.PullImage(brief(t), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "quay.io/sampan/variants:oci-gzip"}})
	refused(t, "pull an image", err)
	if out := l.ExecSync(t, id, "echo", "alive"); string(out.GetStdout()) != "alive\n" {
		t.Errorf("exec: %v", out)
	}
	_, err = l.Runtime.ListContainerStats(brief(t), &runtimeapi.ListContainerStatsRequest{})
	must(t, err)
	_, err = l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 0})
	must(t, err)
	if code := l.Status(t, id).GetExitCode(); code != 137 {
		t.Errorf("exit code %d", code)
	}

	writable()
	l.RemovePod(t, pod)
	checkOthers(t, l, image, "afterwards")
}

// makeReadOnly makes what is in a directory read-only.
func makeReadOnly(t *testing.T, root string) (undo func()) {
	t.Helper()
	entries, err := os.ReadDir(root)
	must(t, err)
	var mounted []string
	undo = func() {
		for _, dir := range mounted {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		mounted = nil
	}
	t.Cleanup(undo)
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		if !e.IsDir() {
			continue
		}
		must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
		mounted = append(mounted, dir)
		must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	}
	return undo
}

func refused(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil || status.Code(err) == codes.DeadlineExceeded {
		t.Errorf("%s on a read-only disk: %v", what, err)
	}
}

// A disk that becomes full at any moment of a pod's life: each step succeeds or
// fails with ResourceExhausted, and leaves nothing; what is there can be removed
// with not one byte free.
func TestDiskFullAnywhere(t *testing.T) {
	disk := lab.SmallDisk(t, "size=192m")
	l := lab.New(t, lab.Options{Root: filepath.Join(disk, "sampan")})
	image := l.Pull(t, "busybox")
	failed, lived := 0, 0
	for pages := range 24 {
		free := lab.FillDisk(t, disk, int64(pages)*4096)
		config := l.PodConfig(fmt.Sprint("full-", pages))
		r, err := l.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
		var id string
		if err == nil {
			id, err = create(t.Context(), l, r.GetPodSandboxId(), config, l.ContainerConfig("c", image, "true"))
		}
		if err == nil {
			_, err = l.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id})
		}
		switch status.Code(err) {
		case codes.OK:
			lived++
		case codes.ResourceExhausted:
			failed++
		default:
			t.Errorf("with %d pages free: %v", pages, err)
		}
		if pod := r.GetPodSandboxId(); pod != "" {
			l.RemovePod(t, pod)
		}
		free()
	}
	t.Logf("%d pods failed, %d lived", failed, lived)
	if failed == 0 || lived == 0 {
		t.Error("the disk was never full, or always")
	}
	checkOthers(t, l, image, "afterwards")
}
