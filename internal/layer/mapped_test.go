package layer

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

const firstID = 200000 // who root is in the tests' user namespace

// userNS makes a user namespace for as long as the test runs. It skips the test if a
// probe shows that ids cannot be mapped here.
func userNS(t testing.TB) string {
	t.Helper()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: firstID, Size: 65536}}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("probe: user namespace: %v", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	path := fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid)
	tree, err := host.IDMapped(t.TempDir(), path, 0)
	if err != nil {
		t.Skipf("probe: %v", err)
	}
	tree.Close()
	return path
}

// ids lists whose the files below root are, one a line. The tests' archives give a file
// to the group with the number of its user.
func ids(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		name, _ := filepath.Rel(root, path)
		if st.Gid != st.Uid {
			t.Errorf("%s: group %d, user %d", path, st.Gid, st.Uid)
		}
		fmt.Fprintf(&b, "%s %d\n", name, st.Uid)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestMountMapped: what is user N's in a layer is the Nth user's of the namespace, also
// where directories had to be restored and where the container writes.
func TestMountMapped(t *testing.T) {
	ns := userNS(t)
	everyWay(t, func(t *testing.T, s *Store) {
		bottom := apply(t, s,
			entry{name: "./", typ: tar.TypeDir, mode: 0o711, uid: 5},
			entry{name: "home", typ: tar.TypeDir, mode: 0o700, uid: 8},
			entry{name: "home/mine", uid: 9, body: "1"},
			entry{name: "home/huge", uid: 70000},
		)
		top := apply(t, s, file("home/x", ""))
		m := spec(t, s, bottom, top)
		m.UserNS = ns
		for range 2 { // a second time changes nothing
			if err := s.Mount(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(m.Target, "home/mine"), []byte("2"), 0o644); err != nil {
			t.Fatal(err)
		}
		const nobody = 65534 // stands for who has no id in the namespace
		want := fmt.Sprintf(". %d\nhome %d\nhome/huge %d\nhome/mine %d\nhome/x %d\n", firstID+5, firstID+8, nobody, firstID+9, firstID)
		if diff := cmp.Diff(want, ids(t, m.Target)); diff != "" {
			t.Errorf("root file system (-want +got):\n%s", diff)
		}
		if err := s.Unmount(m.Target); err != nil {
			t.Fatal(err)
		}
		want = fmt.Sprintf(". %d\nhome %d\nhome/mine %d\n", firstID+5, firstID+8, firstID+9)
		if diff := cmp.Diff(want, ids(t, m.Upper)); diff != "" {
			t.Errorf("writable layer (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(". 8\nhuge 70000\nmine 9\n", ids(t, filepath.Join(s.Path(bottom), "home"))); diff != "" {
			t.Errorf("the layer has changed (-want +got):\n%s", diff)
		}
	})
}

// TestMountMappedOnce: however many layers, nothing but the root file system is mounted
// in the end, also when it cannot be.
func TestMountMappedOnce(t *testing.T) {
	ns := userNS(t)
	everyWay(t, func(t *testing.T, s *Store) {
		var layers []digest.Digest
		for i := range 100 {
			layers = append(layers, apply(t, s, file(fmt.Sprint(i), "")))
		}
		m := spec(t, s, layers...)
		m.UserNS = ns
		base := filepath.Dir(m.Target)
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		points, err := host.MountPoints(base)
		if diff := cmp.Diff([]string{m.Target}, points); err != nil || diff != "" {
			t.Errorf("mounts (-want +got), %v:\n%s", err, diff)
		}
		if _, err := os.Lstat(m.Target + ".layers"); !os.IsNotExist(err) {
			t.Errorf("the place where the layers were is left: %v", err)
		}
		broken := spec(t, s, layers...)
		broken.UserNS, broken.Upper = ns, filepath.Join("/proc", "upper")
		if err := s.Mount(t.Context(), broken); err == nil {
			t.Error("mounted with an upper directory in proc")
		}
		if points, err := host.MountPoints(filepath.Dir(broken.Target)); err != nil || len(points) > 0 {
			t.Errorf("left mounted: %v, %v", points, err)
		}
	})
}

// TestMountMappedIsReadOnly: nobody can harm layers through the place where they are seen
// with other ids.
func TestMountMappedIsReadOnly(t *testing.T) {
	ns := userNS(t)
	s := openStore(t, t.TempDir())
	id := apply(t, s, file("x", ""))
	tree, err := host.IDMapped(s.Root(), ns, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	path := filepath.Join("tree", filepath.Base(s.Path(id)), "x")
	if err := unix.Unlinkat(int(tree.Fd()), path, 0); err != unix.EROFS {
		t.Errorf("remove a file: %v, want a read-only file system", err)
	}
}

func BenchmarkMount(b *testing.B) {
	for name, mapped := range map[string]bool{"host-users": false, "user-namespace": true} {
		b.Run(name, func(b *testing.B) {
			s, err := Open(Config{Root: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			base := b.TempDir()
			m := MountSpec{Upper: filepath.Join(base, "upper"), Work: filepath.Join(base, "work"), Target: filepath.Join(base, "rootfs")}
			if mapped {
				m.UserNS = userNS(b)
			}
			for b.Loop() {
				if err := s.Mount(b.Context(), m); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Unmount(m.Target); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// TestMountMappedAfterKill: the place where the layers were seen, which a killed process has left
// mounted, is in nobody's way.
func TestMountMappedAfterKill(t *testing.T) {
	ns := userNS(t)
	mountable(t)
	s := openStore(t, t.TempDir())
	m := spec(t, s, apply(t, s, file("x", "")))
	m.UserNS = ns
	place := m.Target + ".layers"
	if err := os.MkdirAll(place, 0o700); err != nil {
		t.Fatal(err)
	}
	tree, err := host.IDMapped(s.Root(), ns, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if err := host.Attach(tree, place); err != nil {
		t.Fatal(err)
	}
	if err := s.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	points, err := host.MountPoints(filepath.Dir(m.Target))
	if diff := cmp.Diff([]string{m.Target}, points); err != nil || diff != "" {
		t.Errorf("mounts (-want +got), %v:\n%s", err, diff)
	}
}
