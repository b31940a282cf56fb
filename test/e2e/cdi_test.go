package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestCDI gives a container a device by a vendor's file: a node, a mount, a
// variable, a group, and a hook.
func TestCDI(t *testing.T) {
	l := lab.New(t, lab.Options{})
	box := l.Pull(t, "busybox")
	shared := filepath.Join(l.Tmp(), "vendor")
	hooked := filepath.Join(l.Tmp(), "hooked")
	const dir = "/run/cdi" // the lab's own; /var/run is a link to /run
	t.Cleanup(func() { os.RemoveAll(dir) })
	text := fmt.Sprintf(`cdiVersion: 0.7.0
kind: vendor.test/device
devices:
- name: zero
  containerEdits:
    env: [DEVICE=zero]
    deviceNodes: [{path: /dev/vendor0, hostPath: /dev/zero}]
    mounts: [{hostPath: %q, containerPath: /opt/vendor, options: [ro, bind]}]
    additionalGids: [4242]
    hooks: [{hookName: createRuntime, path: /bin/sh, args: [sh, -c, 'echo ran > %s']}]
- name: other
  containerEdits: {env: [OTHER=yes]}
`, shared, hooked)
	for _, err := range []error{
		os.MkdirAll(shared, 0o755), os.WriteFile(filepath.Join(shared, "lib"), []byte("driver"), 0o644),
		os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "vendor.yaml"), []byte(text), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	pod := l.PodConfig("cdi")
	podID := l.RunPod(t, pod)
	defer l.RemovePod(t, podID)
	config := l.ContainerConfig("user", box, "sleep", "600")
	config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.test/device=zero"}}
	config.Annotations = map[string]string{"cdi.k8s.io/vendor": "vendor.test/device=other"}
	id := l.CreateContainer(t, podID, pod, config)
	l.StartContainer(t, id)
	for script, want := range map[string]int32{
		`test "$DEVICE$OTHER" = zeroyes`:                      0,
		`test "$(head -c 4 /dev/vendor0 | tr '\0' z)" = zzzz`: 0,
		`test "$(cat /opt/vendor/lib)" = driver`:              0,
		`touch /opt/vendor/new 2>/dev/null`:                   1,
		`id -G | tr ' ' '\n' | grep -qx 4242`:                 0,
	} {
		if r := l.ExecSync(t, id, "sh", "-c", script); r.GetExitCode() != want {
			t.Errorf("%s: exit code %d, want %d\n%s%s", script, r.GetExitCode(), want, r.GetStdout(), r.GetStderr())
		}
	}
	if data, err := os.ReadFile(hooked); string(data) != "ran\n" {
		t.Errorf("the hook wrote %q, %v", data, err)
	}

	config = l.ContainerConfig("hopeful", box, "true")
	config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.test/device=nine"}}
	_, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: config, SandboxConfig: pod})
	for _, says := range []string{"vendor.test/device=nine", "/etc/cdi", "/var/run/cdi"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("a device that nobody knows: %v, want an error that says %s", err, says)
		}
	}
}
