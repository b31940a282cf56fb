package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// requireUserNamespaces skips where no user namespace can be made and used, and
// returns sampan-init, which makes them.
func requireUserNamespaces(t testing.TB) (holder string) {
	t.Helper()
	holder = buildInit(t)
	if err := ProbeUserNamespaces(t.TempDir(), holder); err != nil {
		t.Skipf("probe: %v", err)
	}
	return holder
}

func TestUserNamespaceOwnsTheOthers(t *testing.T) {
	holder := requireUserNamespaces(t)
	dir := t.TempDir()
	n := Namespaces{
		Net: filepath.Join(dir, "net"), IPC: filepath.Join(dir, "ipc"), UTS: filepath.Join(dir, "uts"),
		Hostname: "sampan-test",
		Sysctls:  map[string]string{"net.ipv4.ip_local_port_range": "2000\t3000", "kernel.shm_rmid_forced": "1"},
		User:     filepath.Join(dir, "user"), Holder: holder,
		UIDs: []IDRange{{0, 200000, 1000}}, GIDs: []IDRange{{0, 300000, 2000}},
	}
	t.Cleanup(func() { n.Remove() })
	for range 2 { // the second Create replaces what the first left
		if err := n.Create(); err != nil {
			t.Fatal(err)
		}
	}
	user := inode(t, n.User)
	for _, path := range []string{n.Net, n.IPC, n.UTS} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(owner, &st); err != nil || st.Ino != user {
			t.Errorf("%s: the user namespace does not own it: %d, not %d, %v", filepath.Base(path), st.Ino, user, err)
		}
		unix.Close(owner)
	}
	tree, err := IDMapped(dir, n.User, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.Fd()), &st); err != nil || st.Uid != 200000 || st.Gid != 300000 {
		t.Errorf("what is root's shows as of user %d and group %d, %v", st.Uid, st.Gid, err)
	}
	err = InNetNS(n.Net, func() error {
		data, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
		if got := strings.TrimSpace(string(data)); got != "2000\t3000" {
			t.Errorf("sysctl inside: %q", got)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if err := n.Remove(); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("left behind: %v", entries)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestUserNamespaceFailureLeavesNothing(t *testing.T) {
	holder := requireUserNamespaces(t)
	dir := t.TempDir()
	overlap := []IDRange{{0, 200000, 1000}, {500, 300000, 1000}}
	for name, n := range map[string]Namespaces{
		"no directory": {User: filepath.Join(dir, "user"), Holder: holder, UTS: filepath.Join(dir, "absent", "uts"), UIDs: []IDRange{{0, 200000, 1}}, GIDs: []IDRange{{0, 200000, 1}}},
		"bad ids":      {User: filepath.Join(dir, "user"), Holder: holder, UIDs: overlap, GIDs: overlap},
	} {
		if err := n.Create(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Fatalf("left behind: %v", entries)
	}
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: %d, %v", pid, err)
	}
}

// TestProbeUserNamespaces: the probe tells what cannot be, and leaves nothing.
func TestProbeUserNamespaces(t *testing.T) {
	holder := requireUserNamespaces(t)
	before, err := MountPoints("/")
	if err != nil {
		t.Fatal(err)
	}
	// proc cannot have mapped ids.
	if err := ProbeUserNamespaces("/proc", holder); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "map the ids of /proc") {
		t.Errorf("on proc: %v", err)
	}
	dir := t.TempDir()
	if err := ProbeUserNamespaces(dir, holder); err != nil {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
	if after, err := MountPoints("/"); err != nil || len(after) != len(before) {
		t.Errorf("%d mounts, were %d, %v", len(after), len(before), err)
	}
}

func BenchmarkNamespaces(b *testing.B) {
	for name, user := range map[string]bool{"host-users": false, "user-namespace": true} {
		b.Run(name, func(b *testing.B) {
			holder, dir := requireUserNamespaces(b), b.TempDir()
			n := Namespaces{Net: filepath.Join(dir, "net"), IPC: filepath.Join(dir, "ipc"), UTS: filepath.Join(dir, "uts"), Holder: holder}
			if user {
				n.User, n.UIDs, n.GIDs = filepath.Join(dir, "user"), []IDRange{{0, 200000, 65536}}, []IDRange{{0, 200000, 65536}}
			}
			for b.Loop() {
				if err := n.Create(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				n.Remove()
				b.StartTimer()
			}
		})
	}
}
