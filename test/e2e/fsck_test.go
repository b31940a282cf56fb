package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestFsck breaks one thing after the other and lets `sampan fsck` find it. A
// damaged layer is fetched again, alone, and nothing happens to a container that
// has it mounted.
func TestFsck(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	podConfig := l.PodConfig("box")
	podConfig.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 18110}}
	pod := l.RunPod(t, podConfig)
	id := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("box", image, "sleep", "1000"))
	l.StartContainer(t, id)
	clean := func(when string, args ...string) {
		t.Helper()
		if out, code := l.Fsck(args...); code != 0 {
			t.Errorf("%s: exit code %d\n%s", when, code, out)
		}
	}
	finds := func(want string, args ...string) {
		t.Helper()
		if out, code := l.Fsck(args...); code != 1 || !strings.Contains(out, want) {
			t.Errorf("exit code %d, want 1, and %q in:\n%s", code, want, out)
		}
	}
	clean("while the daemon runs", "--content")
	l.Stop(t)
	clean("while it is stopped")

	shm := filepath.Join(l.State, "pods", pod, "shm")
	if err := unix.Unmount(shm, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	finds("its /dev/shm is not mounted")
	if err := unix.Mount("shm", shm, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}

	nobodys := filepath.Join(l.State, "containers", strings.Repeat("ab", 32))
	if err := os.MkdirAll(nobodys, 0o700); err != nil {
		t.Fatal(err)
	}
	finds("nobody's")
	clean("repair of what is nobody's", "--repair")

	lost := strayProcess(t, pod)
	finds("cgroup /sampan-" + pod[:16])
	clean("repair of the cgroup of a container that is gone", "--repair")
	late := time.AfterFunc(lab.Wait, func() { lost.Process.Signal(unix.SIGTERM) })
	defer late.Stop()
	if err := lost.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Error("the process of a container that is gone was not killed")
	}

	stray := exec.Command("nft", "add", "element", "inet", "sampan0", "ports4", "{ tcp . 18111 : 10.88.0.99 . 80 }")
	if out, err := stray.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	finds("belongs to no pod")
	clean("repair of a forwarded port of no pod", "--repair")
	clean("after it")
	port := exec.Command("nft", "flush", "map", "inet", "sampan0", "ports4")
	if out, err := port.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	finds("host ports are missing")
	l.Start(t)
	clean("after a start has put it back")
	l.Stop(t)

	damageLayer(t, l)
	clean("without reading files")
	finds("the content of its files has changed", "--content")
	if out, code := l.Fsck("--content", "--repair"); code != 1 || !strings.Contains(out, "repaired") {
		t.Errorf("repair of a layer: exit code %d\n%s", code, out)
	}
	l.Start(t)
	alive(t, l, id) // the layer is mounted still
	if again := l.Pull(t, "busybox"); again != image {
		t.Errorf("pulled again: %s, want %s", again, image)
	}
	clean("after the layer was fetched again", "--content")

	config := filepath.Join(l.Root, "containers", id, "config")
	if err := os.Truncate(config, 40); err != nil {
		t.Fatal(err)
	}
	finds("record is damaged")
	if out, code := l.Fsck("--repair"); code != 2 || !strings.Contains(out, "stop it") {
		t.Errorf("repair while the daemon runs: exit code %d\n%s", code, out)
	}
	l.RemovePod(t, pod)
}

// strayProcess is one in the cgroup of a container of the pod that nobody knows.
func strayProcess(t *testing.T, pod string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	dirs, err := filepath.Glob("/sys/fs/cgroup/*/sampan-" + pod[:16])
	if more, gerr := filepath.Glob("/sys/fs/cgroup/sampan-" + pod[:16]); gerr == nil {
		dirs = append(dirs, more...)
	}
	if err != nil || len(dirs) == 0 {
		t.Fatalf("cgroup of the pod: %v, %v", dirs, err)
	}
	for _, dir := range dirs {
		if strings.Contains(dir, "cpuset") {
			continue // without processors of its own no process can be there
		}
		dir = filepath.Join(dir, strings.Repeat("cd", 32))
		if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return cmd
}

// damageLayer changes a byte of the largest file of all layers, and nothing that
// can be seen without reading it.
func damageLayer(t *testing.T, l *lab.Lab) {
	t.Helper()
	var largest string
	var size int64
	err := filepath.Walk(filepath.Join(l.Root, "layers", "tree"), func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && info.Size() > size {
			largest, size = path, info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(largest, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, size-1); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b, size-1); err != nil {
		t.Fatal(err)
	}
}
