package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// mountable skips a test if a probe shows that overlayfs cannot be mounted here.
func mountable(t *testing.T) {
	t.Helper()
	needRoot(t)
	base := t.TempDir()
	for _, d := range []string{"a", "b", "m"} {
		os.Mkdir(filepath.Join(base, d), 0o755)
	}
	target := filepath.Join(base, "m")
	if err := unix.Mount("overlay", target, "overlay", 0, fmt.Sprintf("lowerdir=%s/a:%s/b", base, base)); err != nil {
		t.Skipf("cannot mount overlayfs here: %v", err)
	}
	unix.Unmount(target, unix.MNT_DETACH)
}

func spec(t *testing.T, s *Store, layers ...digest.Digest) MountSpec {
	base := t.TempDir()
	m := MountSpec{Layers: layers, Upper: filepath.Join(base, "upper"), Work: filepath.Join(base, "work"), Target: filepath.Join(base, "rootfs")}
	t.Cleanup(func() {
		if err := s.Unmount(m.Target); err != nil {
			t.Error(err)
		}
	})
	return m
}

// everyWay runs a test with each way of mounting: the new calls and mount(2).
func everyWay(t *testing.T, test func(t *testing.T, s *Store)) {
	mountable(t)
	for name, classic := range map[string]bool{"fsconfig": false, "mount": true} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, filepath.Join(t.TempDir(), "lay,ers:x"))
			s.mounts.noAppend.Store(classic)
			test(t, s)
		})
	}
}

func TestMount(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		bottom := apply(t, s, dir("etc"), file("etc/a", "1"), file("etc/b", "1"), dir("opt"), file("opt/old", "1"), dir("var"), file("var/old", ""))
		middle := apply(t, s, file("etc/.wh.b", ""), file("opt/.wh..wh..opq", ""), file("opt/new", "2"), file(".wh.var", ""), dir("var"), file("var/new", ""))
		top := apply(t, s, dir("etc"), file("etc/a", "3"))
		m := spec(t, s, bottom, middle, top)
		for range 2 { // a second time changes nothing
			if err := s.Mount(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		want := `. drwxr-xr-x
etc drwxr-xr-x
etc/a -rw-r--r-- "3"
opt drwxr-xr-x
opt/new -rw-r--r-- "2"
var drwxr-xr-x
var/new -rw-r--r-- ""
`
		if diff := cmp.Diff(want, listing(t, m.Target)); diff != "" {
			t.Errorf("root file system (-want +got):\n%s", diff)
		}
		if err := os.WriteFile(filepath.Join(m.Target, "etc/a"), []byte("mine"), 0o644); err != nil {
			t.Fatal(err)
		}
		// What a container wrote is there again after the next mount.
		for range 2 {
			if err := s.Unmount(m.Target); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(m.Target, "etc/a")); string(got) != "mine" {
			t.Errorf("etc/a = %q, %v after mounting again", got, err)
		}
		if got, _ := os.ReadFile(filepath.Join(s.Path(top), "etc/a")); string(got) != "3" {
			t.Errorf("the layer's etc/a has become %q", got)
		}
		u, err := Measure(t.Context(), m.Upper, 3)
		if err != nil || u.Bytes == 0 || u.Inodes != 3 {
			t.Errorf("Measure = %v, %v; want 3 inodes", u, err)
		}
		if u, err := Measure(t.Context(), m.Upper, 2); !errors.Is(err, ErrTooMany) {
			t.Errorf("Measure of at most 2 = %v, %v; want ErrTooMany", u, err)
		}
	})
}

// TestMountPlaces: what is mounted on is there without being made, and what a
// layer has there is the layer's.
func TestMountPlaces(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		m := spec(t, s, apply(t, s, dir("etc"), file("etc/hosts", "image's"), dir("proc")))
		m.Places = true
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want := `. drwxr-xr-x
dev drwxr-xr-x
etc drwxr-xr-x
etc/hostname -rw-r--r-- ""
etc/hosts -rw-r--r-- "image's"
etc/resolv.conf -rw-r--r-- ""
proc drwxr-xr-x
sys drwxr-xr-x
`
		if diff := cmp.Diff(want, listing(t, m.Target)); diff != "" {
			t.Errorf("root file system (-want +got):\n%s", diff)
		}
		if err := os.WriteFile(filepath.Join(m.Target, "etc/hostname"), []byte("own"), 0o644); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(filepath.Join(s.root, "places/etc/hostname")); err != nil || len(data) > 0 {
			t.Errorf("what all have in common is %q, error %v", data, err)
		}
		if entries, err := os.ReadDir(m.Upper); err != nil || len(entries) != 1 {
			t.Errorf("written: %v, error %v; want etc alone", entries, err)
		}
	})
}

func TestMountManyLayers(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		var layers []digest.Digest
		for i := range 140 {
			layers = append(layers, apply(t, s, file(fmt.Sprint(i), ""), file("last", fmt.Sprint(i))))
		}
		m := spec(t, s, layers...)
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(m.Target)
		if err != nil || len(entries) != 141 {
			t.Errorf("%d entries, %v; want 141", len(entries), err)
		}
		if got, _ := os.ReadFile(filepath.Join(m.Target, "last")); string(got) != "139" {
			t.Errorf("last = %q, want the topmost layer's", got)
		}
	})
}

func TestMountReadOnly(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		id := apply(t, s, file("x", "1"))
		for name, layers := range map[string][]digest.Digest{"one layer": {id}, "no layer": nil} {
			t.Run(name, func(t *testing.T) {
				m := spec(t, s, layers...)
				m.ReadOnly, m.Upper, m.Work = true, "", ""
				if err := s.Mount(t.Context(), m); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(m.Target, "y"), nil, 0o644); !errors.Is(err, unix.EROFS) {
					t.Errorf("writing: %v, want a read-only file system", err)
				}
			})
		}
	})
}

func TestMountEmpty(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		m := spec(t, s)
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(m.Target, "y"), nil, 0o644); err != nil {
			t.Error(err)
		}
	})
}

// A layer knows nothing of those below it; the mount puts right what that costs.
func TestMountRestoresDirectories(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		bottom := apply(t, s,
			entry{name: "./", typ: tar.TypeDir, mode: 0o711, uid: 5},
			entry{name: "tmp", typ: tar.TypeDir, mode: 0o1777},
			entry{name: "home", typ: tar.TypeDir, mode: 0o700, uid: 8},
			entry{name: "home/u", typ: tar.TypeDir, mode: 0o750, uid: 9},
			entry{name: "gone", typ: tar.TypeDir, mode: 0o700},
			symlink("lib", "usr/lib"),
			symlink("etc", "/etc"),
		)
		top := apply(t, s,
			file("tmp/x", ""), file("home/u/x", ""), file(".wh.gone", ""), file("gone/x", ""),
			file("new/x", ""), file("lib/x", ""), file("etc/ssl/x", ""))
		m := spec(t, s, bottom, top)
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want := `. drwx--x--x uid 5
etc drwxr-xr-x
etc/ssl drwxr-xr-x
etc/ssl/x -rw-r--r-- ""
gone drwxr-xr-x
gone/x -rw-r--r-- ""
home drwx------ uid 8
home/u drwxr-x--- uid 9
home/u/x -rw-r--r-- ""
lib drwxr-xr-x
lib/x -rw-r--r-- ""
new drwxr-xr-x
new/x -rw-r--r-- ""
tmp dtrwxrwxrwx
tmp/x -rw-r--r-- ""
`
		if diff := cmp.Diff(want, listing(t, m.Target)); diff != "" {
			t.Errorf("root file system (-want +got):\n%s", diff)
		}
	})
}

func TestMountOpaqueRoot(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		m := spec(t, s, apply(t, s, file("old", "")), apply(t, s, file(".wh..wh..opq", ""), file("new", "")))
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(". drwxr-xr-x\nnew -rw-r--r-- \"\"\n", listing(t, m.Target)); diff != "" {
			t.Errorf("root file system (-want +got):\n%s", diff)
		}
	})
}

// A container sees its files whatever user it runs as, and a user of the machine
// does not get at them.
func TestMountOtherUsers(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		m := spec(t, s, apply(t, s, dir("a"), file("a/x", "1")))
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		inside, err := unix.Open(m.Target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(inside)
		asNobody(t, func() {
			if fd, err := unix.Openat(inside, "a/x", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
				t.Errorf("in the container: %v", err)
			} else {
				unix.Close(fd)
			}
			if _, err := os.ReadFile(filepath.Join(s.Path(m.Layers[0]), "a/x")); !errors.Is(err, unix.EACCES) {
				t.Errorf("on the machine: %v, want permission denied", err)
			}
		})
	})
}

// asNobody runs fn with the file access rights of a user without any.
func asNobody(t *testing.T, fn func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, err := unix.SetfsuidRetUid(65534); err != nil {
		t.Fatal(err)
	}
	defer unix.SetfsuidRetUid(0)
	fn()
}

func TestMountErrors(t *testing.T) {
	s := openStore(t, t.TempDir())
	for name, tc := range map[string]struct {
		m    MountSpec
		want error
	}{
		"unknown layer":   {MountSpec{Layers: []digest.Digest{digest.FromString("x")}, Target: "/x", Upper: "/u", Work: "/w"}, errdefs.ErrNotFound},
		"relative target": {MountSpec{Target: "x"}, errdefs.ErrInvalidArgument},
		"no upper":        {MountSpec{Target: "/x"}, errdefs.ErrInvalidArgument},
		"upper read-only": {MountSpec{Target: "/x", ReadOnly: true, Upper: "/u"}, errdefs.ErrInvalidArgument},
	} {
		if err := s.Mount(t.Context(), tc.m); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}
