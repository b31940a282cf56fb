package checkpoint

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func archive(t testing.TB, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Size = 0
		if h.Typeflag == tar.TypeReg {
			h.Size = 1
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			w.Write([]byte("x"))
		}
	}
	w.Close()
	return &b
}

func TestPackExtract(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	config := Config{ID: "1", Name: "counter"}
	if err := errors.Join(
		WriteJSON(from, ConfigName, config), os.Mkdir(filepath.Join(from, ImagesDir), 0o700),
		os.WriteFile(filepath.Join(from, ImagesDir, "pages-1.img"), []byte("pages"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Pack(t.Context(), from, &b); err != nil {
		t.Fatal(err)
	}
	if err := Extract(t.Context(), &b, to); err != nil {
		t.Fatal(err)
	}
	var got Config
	if err := ReadJSON(to, ConfigName, &got); err != nil || got != config {
		t.Errorf("%+v, error %v", got, err)
	}
	if pages, err := os.ReadFile(filepath.Join(to, ImagesDir, "pages-1.img")); err != nil || string(pages) != "pages" {
		t.Errorf("pages %q, error %v", pages, err)
	}
	if err := ReadJSON(to, SpecName, &got); !errors.Is(err, fs.ErrNotExist) || !errdefs.IsInvalidArgument(err) {
		t.Errorf("error of a file that is not there: %v", err)
	}
}

// TestExtractHostile gives archives that reach out of their directory.
func TestExtractHostile(t *testing.T) {
	for name, tc := range map[string]struct {
		headers []tar.Header
		refused bool
	}{
		"upwards":          {[]tar.Header{{Name: "../config.dump", Typeflag: tar.TypeReg}, {Name: "checkpoint/../../x", Typeflag: tar.TypeReg}}, false},
		"absolute":         {[]tar.Header{{Name: "/etc/passwd", Typeflag: tar.TypeReg}}, false},
		"unknown":          {[]tar.Header{{Name: "evil", Typeflag: tar.TypeSymlink, Linkname: "/"}, {Name: "evil/x", Typeflag: tar.TypeReg}}, false},
		"images elsewhere": {[]tar.Header{{Name: "checkpoint", Typeflag: tar.TypeSymlink, Linkname: "/tmp"}, {Name: "checkpoint/x", Typeflag: tar.TypeReg}}, false},
		"link":             {[]tar.Header{{Name: ConfigName, Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}}, true},
		"hard link":        {[]tar.Header{{Name: "checkpoint/x", Typeflag: tar.TypeLink, Linkname: "/etc/shadow"}}, true},
		"device":           {[]tar.Header{{Name: SpecName, Typeflag: tar.TypeChar}}, true},
		"twice":            {[]tar.Header{{Name: SpecName, Typeflag: tar.TypeReg}, {Name: "./" + SpecName, Typeflag: tar.TypeReg}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			dir := filepath.Join(base, "a", "b")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			err := Extract(t.Context(), archive(t, tc.headers...), dir)
			if tc.refused != errdefs.IsInvalidArgument(err) || !tc.refused && err != nil {
				t.Errorf("error %v, want one: %v", err, tc.refused)
			}
			assertContained(t, base, dir)
		})
	}
}

// assertContained checks that there is nothing in base but dir, and in dir nothing
// but regular files where they may be.
func assertContained(t testing.TB, base, dir string) {
	t.Helper()
	filepath.WalkDir(base, func(file string, e fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, file)
		switch {
		case err != nil:
			t.Error(err)
		case e.IsDir() && (file == base || file == filepath.Dir(dir) || file == dir || slices.Contains(folders, name)):
		case e.Type().IsRegular() && (known[name] || slices.Contains(folders, filepath.Dir(name))):
		default:
			t.Errorf("there is %s", file)
		}
		return nil
	})
}

func FuzzExtract(f *testing.F) {
	f.Add(archive(f, tar.Header{Name: ConfigName, Typeflag: tar.TypeReg}, tar.Header{Name: "checkpoint/", Typeflag: tar.TypeDir},
		tar.Header{Name: "checkpoint/x", Typeflag: tar.TypeReg}).Bytes())
	f.Add(archive(f, tar.Header{Name: "../../x", Typeflag: tar.TypeReg}, tar.Header{Name: "checkpoint", Typeflag: tar.TypeSymlink, Linkname: "/"}).Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		dir := filepath.Join(base, "a", "b")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		Extract(t.Context(), bytes.NewReader(data), dir)
		assertContained(t, base, dir)
	})
}
