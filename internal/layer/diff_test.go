package layer

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestDiff writes into a root file system and brings what was written into another.
func TestDiff(t *testing.T) {
	everyWay(t, func(t *testing.T, s *Store) {
		base := apply(t, s, dir("etc"), file("etc/a", "1"), file("etc/b", "1"), dir("opt"), file("opt/old", "1"), dir("var"), file("var/x", "x"), file("tmp/deep/file", ""))
		m := spec(t, s, base)
		if err := s.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		in := func(name string) string { return filepath.Join(m.Target, name) }
		for what, err := range map[string]error{
			"change": os.WriteFile(in("etc/a"), []byte("2"), 0o640),
			"remove": os.Remove(in("etc/b")),
			"new":    os.WriteFile(in("new"), bytes.Repeat([]byte("x"), 100000), 0o4755),
			"link":   os.Link(in("new"), in("hard")),
			"soft":   os.Symlink("/etc/passwd", in("soft")),
			"fifo":   unix.Mkfifo(in("fifo"), 0o600),
			"device": unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
			"away":   os.RemoveAll(in("var")),
			"deep":   os.WriteFile(in("tmp/deep/more"), nil, 0o600),
			"owner":  os.Chown(in("etc/a"), 12, 34),
		} {
			if err != nil {
				t.Fatal(what, err)
			}
		}
		// A directory in place of another hides what was in that.
		if err := os.RemoveAll(in("opt")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(in("opt"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(in("opt/fresh"), []byte("f"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(in("new"), "trusted.mine", []byte("v"), 0); err != nil {
			t.Fatal(err)
		}
		var archive bytes.Buffer
		deleted, err := s.Diff(t.Context(), m.Layers, m.Upper, &archive)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(deleted)
		if diff := cmp.Diff([]string{"etc/b", "opt/old", "var"}, deleted); diff != "" {
			t.Errorf("deleted (-want +got):\n%s", diff)
		}
		other := spec(t, s, base)
		if err := s.RestoreUpper(t.Context(), other.Layers, other.Upper, &archive, deleted); err != nil {
			t.Fatal(err)
		}
		if err := s.Mount(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(listing(t, m.Target), listing(t, other.Target)); diff != "" {
			t.Errorf("restored root file system (-want +got):\n%s", diff)
		}
		value := make([]byte, 10)
		n, err := unix.Getxattr(filepath.Join(other.Target, "hard"), "trusted.mine", value)
		if err != nil || string(value[:n]) != "v" {
			t.Errorf("attribute %q, error %v", value[:max(n, 0)], err)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(other.Target, "etc/a"), &st); err != nil || st.Uid != 12 || st.Gid != 34 {
			t.Errorf("owner %d:%d, error %v", st.Uid, st.Gid, err)
		}
	})
}

// TestRestoreUpperHostile tries to get out of the writable layer.
func TestRestoreUpperHostile(t *testing.T) {
	needRoot(t)
	s := openStore(t, filepath.Join(t.TempDir(), "layers"))
	base := apply(t, s, dir("etc"))
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	archiveOf := func(headers ...tar.Header) *bytes.Buffer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		return &b
	}
	for name, tc := range map[string]struct {
		archive *bytes.Buffer
		deleted []string
	}{
		"upwards":           {archiveOf(tar.Header{Name: "../secret", Typeflag: tar.TypeReg}), nil},
		"through a link":    {archiveOf(tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, tar.Header{Name: "out/secret", Typeflag: tar.TypeReg}), nil},
		"hard link":         {archiveOf(tar.Header{Name: "s", Typeflag: tar.TypeLink, Linkname: "../../" + secret}), nil},
		"delete upwards":    {archiveOf(), []string{"../secret"}},
		"delete absolutely": {archiveOf(tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}), []string{"out/secret"}},
		"delete nothing":    {archiveOf(), []string{"etc/.."}},
		"delete the root":   {archiveOf(), []string{"/"}},
		"no archive":        {bytes.NewBufferString("this is no archive, but long enough to be taken for one at first sight, as it has more than five hundred and twelve bytes" + string(make([]byte, 1000))), nil},
	} {
		t.Run(name, func(t *testing.T) {
			upper := filepath.Join(t.TempDir(), "upper")
			if err := s.RestoreUpper(t.Context(), spec(t, s, base).Layers, upper, tc.archive, tc.deleted); !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v, want invalid argument", err)
			}
			for _, left := range []string{upper, upper + ".new"} {
				if _, err := os.Lstat(left); err == nil {
					t.Errorf("%s is left", left)
				}
			}
			if got, err := os.ReadFile(secret); err != nil || string(got) != "mine" {
				t.Errorf("the file outside is %q, error %v", got, err)
			}
		})
	}
}

func TestPack(t *testing.T) {
	needRoot(t)
	from, to := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(from, "segment"), []byte("shared"), 0o640); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := Pack(t.Context(), from, &archive); err != nil {
		t.Fatal(err)
	}
	if err := Unpack(t.Context(), to, &archive); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(listing(t, from), listing(t, to)); diff != "" {
		t.Errorf("unpacked (-want +got):\n%s", diff)
	}
}
