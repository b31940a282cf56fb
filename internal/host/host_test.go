package host

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestStartTime(t *testing.T) {
	stat := "42 (a) b (c)) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3"
	if got, err := startTime([]byte(stat)); err != nil || got != 987654 {
		t.Fatalf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "42", "42 (x) S 1", "42 (x"} {
		if _, err := startTime([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestProcess(t *testing.T) {
	cmd := exec.Command("sh", "-c", "read x; exit 7")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := h.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("wait for a living process: %v", err)
	}
	if !p.Alive() || h.Exited() {
		t.Fatal("a living process is reported dead")
	}
	in.Close()
	if err := h.Wait(t.Context()); err != nil {
		t.Fatalf("wait: %v", err)
	}
	if p.Alive() || !h.Exited() {
		t.Fatal("a dead process is reported alive")
	}
	cmd.Wait()
	if status, ok := h.ExitStatus(); ok && status.ExitStatus() != 7 {
		t.Fatalf("exit status %d, want 7", status.ExitStatus())
	}
	if _, err := p.Open(); !errdefs.IsNotFound(err) {
		t.Fatalf("open a reaped process: %v", err)
	}
	if err := h.Signal(unix.SIGTERM); !errdefs.IsNotFound(err) {
		t.Fatalf("signal a reaped process: %v", err)
	}
}

func TestOpenRefusesReusedPid(t *testing.T) {
	p, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string]Process{
		"other start": {p.Pid, p.Start + 1, p.Boot},
		"other boot":  {p.Pid, p.Start, "another"},
	} {
		if _, err := other.Open(); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// requireNamespaces skips where this process may not make namespaces.
func requireNamespaces(t *testing.T) {
	t.Helper()
	if err := onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }); errors.Is(err, unix.EPERM) {
		t.Skip("probe: unshare(CLONE_NEWNET) is not permitted here")
	}
}

func TestNamespaces(t *testing.T) {
	requireNamespaces(t)
	dir := t.TempDir()
	n := Namespaces{
		Net: filepath.Join(dir, "net"), IPC: filepath.Join(dir, "ipc"), UTS: filepath.Join(dir, "uts"),
		Hostname: "sampan-test",
		Sysctls:  map[string]string{"net.ipv4.ip_local_port_range": "2000\t3000", "kernel.shm_rmid_forced": "1"},
	}
	t.Cleanup(func() { n.Remove() })
	for range 2 { // the second Create replaces what the first left
		if err := n.Create(); err != nil {
			t.Fatal(err)
		}
	}
	if !Pinned(n.Net) || !Pinned(n.IPC) || !Pinned(n.UTS) {
		t.Fatal("a namespace is not pinned")
	}
	read := func(path string) string { data, _ := os.ReadFile(path); return strings.TrimSpace(string(data)) }
	var inside string
	err := InNetNS(n.Net, func() error {
		inside = read("/proc/sys/net/ipv4/ip_local_port_range")
		return nil
	})
	if err != nil || inside != "2000\t3000" {
		t.Fatalf("sysctl inside: %q, %v", inside, err)
	}
	if outside := read("/proc/sys/net/ipv4/ip_local_port_range"); outside == inside {
		t.Fatal("the sysctl changed outside too")
	}
	if err := n.Remove(); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("left behind: %v", entries)
	}
}

func TestNamespacesFailureLeavesNothing(t *testing.T) {
	requireNamespaces(t)
	dir := t.TempDir()
	n := Namespaces{Net: filepath.Join(dir, "net"), UTS: filepath.Join(dir, "absent", "uts")}
	if err := n.Create(); err == nil {
		t.Fatal("no error")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("left behind: %v", entries)
	}
}

func TestUnmountUnder(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a")
	if err := os.Mkdir(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := unix.Mount("none", deep, "tmpfs", 0, "size=4k"); errors.Is(err, unix.EPERM) {
			t.Skip("probe: mount(2) is not permitted here")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	// A file, as namespaces are pinned, and a mount below a mount.
	pin := filepath.Join(dir, "b", "ns", "pin")
	below := filepath.Join(deep, "below")
	if err := errors.Join(os.MkdirAll(filepath.Dir(pin), 0o755), os.WriteFile(pin, nil, 0o600), os.Mkdir(below, 0o755),
		unix.Mount("/proc/self/ns/net", pin, "", unix.MS_BIND, ""), unix.Mount("none", below, "tmpfs", 0, "size=4k")); err != nil {
		t.Fatal(err)
	}
	if points, err := MountPoints(dir); err != nil || len(points) != 4 {
		t.Fatalf("got %v, %v", points, err)
	}
	if err := errors.Join(UnmountUnder(dir), UnmountUnder(filepath.Join(dir, "absent"))); err != nil {
		t.Fatal(err)
	}
	if points, _ := MountPoints(dir); len(points) != 0 {
		t.Fatalf("still mounted: %v", points)
	}
	for _, path := range []string{dir, filepath.Join(dir, "absent")} {
		if err := Unmount(path); err != nil {
			t.Errorf("unmount %s: %v", path, err)
		}
	}
}
