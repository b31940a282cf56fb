package crash

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestReboot lets the machine seem to restart under pods that run: every process
// and mount of theirs is gone, and the kernel has another boot id. ROOT is as it
// was, and so is STATE, as it may be on a disk. The kubelet finds what there was,
// and can clean it up and make it anew, with the same addresses and host ports.
func TestReboot(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := func(name string) *runtimeapi.PodSandboxConfig {
		c := l.PodConfig(name)
		c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 18099}}
		return c
	}
	old := config("web")
	pod := l.RunPod(t, old)
	id := l.CreateContainer(t, pod, old, l.ContainerConfig("box", image, "sleep", "1000"))
	l.StartContainer(t, id)
	created := l.CreateContainer(t, pod, old, l.ContainerConfig("created", image, "true"))
	if out, code := l.Fsck("--content"); code != 0 {
		t.Fatalf("fsck before: %d\n%s", code, out)
	}

	reboot(t, l)
	l.Pull(t, "busybox") // perhaps it was not on the disk yet
	for _, c := range []string{id, created} {
		st := l.Status(t, c)
		if st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetExitCode() != 255 || !strings.Contains(st.GetMessage(), "restarted") {
			t.Errorf("container after a reboot: %v, code %d (%q); want exited, 255, and why", st.GetState(), st.GetExitCode(), st.GetMessage())
		}
	}
	r, err := l.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || r.GetStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || r.GetStatus().GetMetadata().GetName() != "web" {
		t.Errorf("pod after a reboot: %v, %v; want not ready", r.GetStatus(), err)
	}
	// The kubelet makes the pod anew, as the next attempt, before it removes the
	// old one.
	again := config("web")
	again.Metadata.Attempt = 1
	second := l.RunPod(t, again)
	box := l.CreateContainer(t, second, again, l.ContainerConfig("box", image, "sleep", "1000"))
	l.StartContainer(t, box)
	l.RemovePod(t, pod)
	if out := l.ExecSync(t, box, "hostname"); string(out.GetStdout()) != "web\n" {
		t.Errorf("exec in the new pod: %q, %q", out.GetStdout(), out.GetStderr())
	}
	if out, code := l.Fsck(); code != 0 {
		t.Errorf("fsck: %d\n%s", code, out)
	}
	l.RemovePod(t, second)
}

// reboot kills all of Sampan and its containers, takes away what the kernel has
// made for them, and starts the daemon under another boot id.
func reboot(t *testing.T, l *lab.Lab) {
	t.Helper()
	l.Kill(t)
	if err := l.PowerOff(); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join(l.Dir, "boot_id")
	var b [16]byte
	rand.Read(b[:])
	if err := os.WriteFile(boot, fmt.Appendf(nil, "%x-%x-%x-%x-%x\n", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), 0o444); err != nil {
		t.Fatal(err)
	}
	const kernels = "/proc/sys/kernel/random/boot_id"
	if err := unix.Mount(boot, kernels, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(kernels, unix.MNT_DETACH) })
	l.Start(t)
}
