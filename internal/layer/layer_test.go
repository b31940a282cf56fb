package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/state"
)

// needRoot skips a test that makes devices, owners and mounts, if a probe shows
// that they cannot be made here.
func needRoot(t *testing.T) {
	t.Helper()
	if err := unix.Mknod(filepath.Join(t.TempDir(), "probe"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Skipf("cannot make device nodes here: %v", err)
	}
}

func openStore(t *testing.T, root string) *Store {
	t.Helper()
	s, err := Open(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

// entry is one tar entry of a test archive.
type entry struct {
	name   string
	typ    byte // TypeReg if 0
	body   string
	link   string
	mode   int64
	uid    int
	dev    [2]int64
	xattrs map[string]string
	mtime  time.Time
}

func archive(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.uid, Size: int64(len(e.body)), Devmajor: e.dev[0], Devminor: e.dev[1], ModTime: e.mtime}
		if e.typ == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if e.typ == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		for k, v := range e.xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords[paxXattr+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func from(data []byte) Source {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

// apply unpacks an archive as a layer and returns its diff id.
func apply(t *testing.T, s *Store, entries ...entry) digest.Digest {
	t.Helper()
	data := archive(t, entries...)
	info, err := s.Apply(t.Context(), digest.FromBytes(data), from(data))
	if err != nil {
		t.Fatal(err)
	}
	return info.DiffID
}

func dir(name string) entry             { return entry{name: name, typ: tar.TypeDir} }
func file(name, body string) entry      { return entry{name: name, body: body} }
func symlink(name, target string) entry { return entry{name: name, typ: tar.TypeSymlink, link: target} }
func hardlink(name, to string) entry    { return entry{name: name, typ: tar.TypeLink, link: to} }

// listing describes the files under root, one a line.
func listing(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		fmt.Fprintf(&b, "%s %s", rel, info.Mode())
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", data)
		case info.Mode()&os.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			fmt.Fprintf(&b, " -> %s", target)
		case info.Mode()&os.ModeDevice != 0:
			fmt.Fprintf(&b, " %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Uid != 0 {
			fmt.Fprintf(&b, " uid %d", st.Uid)
		}
		if info.IsDir() && isOpaque(path) {
			b.WriteString(" opaque")
		}
		b.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestApply(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name    string
		entries []entry
		want    string
	}{
		{"nothing", nil, ". drwxr-xr-x\n"},
		{"everything", []entry{
			{name: "./", typ: tar.TypeDir, mode: 0o750},
			{name: "bin/", typ: tar.TypeDir, uid: 7},
			{name: "bin/su", body: "x", mode: 0o4755, uid: 1000},
			hardlink("bin/su2", "bin/su"),
			symlink("sbin", "bin"),
			symlink("abs", "/etc/passwd"),
			{name: "null", typ: tar.TypeChar, mode: 0o666, dev: [2]int64{1, 3}},
			{name: "disk", typ: tar.TypeBlock, mode: 0o660, dev: [2]int64{8, 300}},
			{name: "pipe", typ: tar.TypeFifo, mode: 0o600},
		}, `. drwxr-x---
abs Lrwxrwxrwx -> /etc/passwd
bin drwxr-xr-x uid 7
bin/su urwxr-xr-x "x" uid 1000
bin/su2 urwxr-xr-x "x" uid 1000
disk Drw-rw---- 8:300
null Dcrw-rw-rw- 1:3
pipe prw-------
sbin Lrwxrwxrwx -> bin
`},
		{"missing parents", []entry{file("a/b/c", "1")}, `. drwxr-xr-x
a drwxr-xr-x
a/b drwxr-xr-x
a/b/c -rw-r--r-- "1"
`},
		{"directory described after its files", []entry{file("a/b", "1"), {name: "a", typ: tar.TypeDir, mode: 0o1777}}, `. drwxr-xr-x
a dtrwxrwxrwx
a/b -rw-r--r-- "1"
`},
		{"directory twice", []entry{dir("a"), file("a/b", ""), {name: "a/", typ: tar.TypeDir, mode: 0o700}}, `. drwxr-xr-x
a drwx------
a/b -rw-r--r-- ""
`},
		{"absolute names", []entry{dir("/a"), file("//a/b", "1")}, `. drwxr-xr-x
a drwxr-xr-x
a/b -rw-r--r-- "1"
`},
		{"through a symbolic link in the layer", []entry{dir("usr/lib"), symlink("lib", "usr/lib"), file("lib/x", "1")}, `. drwxr-xr-x
lib Lrwxrwxrwx -> usr/lib
usr drwxr-xr-x
usr/lib drwxr-xr-x
usr/lib/x -rw-r--r-- "1"
`},
		{"whiteouts", []entry{dir("a"), file("a/.wh.gone", ""), file(".wh.b", ""), file("c/.wh..wh..opq", ""), file(".wh..wh.plnk", ""), file(".wh..wh.aufs/x", "")}, `. drwxr-xr-x
a drwxr-xr-x
a/gone Dc--------- 0:0
b Dc--------- 0:0
c drwxr-xr-x opaque
`},
		{"whiteout, then the same name", []entry{file(".wh.f", ""), file("f", "new"), file(".wh.d", ""), dir("d"), file(".wh.e", ""), file("e/x", "1")}, `. drwxr-xr-x
d drwxr-xr-x opaque
e drwxr-xr-x opaque
e/x -rw-r--r-- "1"
f -rw-r--r-- "new"
`},
		{"the same name, then its whiteout", []entry{file("f", "new"), file(".wh.f", ""), dir("d"), file(".wh.d", "")}, `. drwxr-xr-x
d drwxr-xr-x opaque
f -rw-r--r-- "new"
`},
		{"overlay's own marks are not content", []entry{{name: "d", typ: tar.TypeDir, xattrs: map[string]string{"trusted.overlay.opaque": "y", "trusted.overlay.redirect": "/etc"}}}, `. drwxr-xr-x
d drwxr-xr-x
`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			id := apply(t, s, tc.entries...)
			if diff := cmp.Diff(tc.want, listing(t, s.Path(id))); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

func TestApplyAttributes(t *testing.T) {
	needRoot(t)
	s := openStore(t, t.TempDir())
	when := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	id := apply(t, s,
		entry{name: "d", typ: tar.TypeDir, mtime: when},
		entry{name: "d/ping", body: "x", uid: 3, mtime: when, xattrs: map[string]string{"security.capability": capability, "trusted.note": "n"}},
		entry{name: "d/link", typ: tar.TypeSymlink, link: "ping", uid: 4, mtime: when},
		entry{name: "old", mtime: time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)},
		entry{name: "far", mtime: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)},
	)
	for _, name := range []string{"d", "d/ping", "d/link"} {
		info, err := os.Lstat(filepath.Join(s.Path(id), name))
		if err != nil {
			t.Fatal(err)
		}
		if !info.ModTime().Equal(when) {
			t.Errorf("%s has time %v, want %v", name, info.ModTime(), when)
		}
	}
	buf := make([]byte, 64)
	n, err := unix.Lgetxattr(filepath.Join(s.Path(id), "d/ping"), "security.capability", buf)
	if err != nil || string(buf[:n]) != capability {
		t.Errorf("capability = %q, %v", buf[:max(n, 0)], err)
	}
	info, err := s.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if want := (Info{DiffID: id, Bytes: 1, Inodes: 6}); info != want {
		t.Errorf("Info = %+v, want %+v", info, want)
	}
}

// Archives that are no sound layer are refused, and nothing of them stays, in
// the store or anywhere else.
func TestHostile(t *testing.T) {
	needRoot(t)
	outside := t.TempDir()
	big := archive(t, file("x", ""))
	copy(big[124:136], "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff") // the size field, base 256
	fixChecksum(big)
	for _, tc := range []struct {
		name string
		data []byte
		want error
		text string
	}{
		{"dot dot", archive(t, file("../x", "1")), errdefs.ErrInvalidArgument, "leads upwards"},
		{"dot dot inside", archive(t, dir("a"), file("a/../../x", "1")), errdefs.ErrInvalidArgument, "leads upwards"},
		{"link to outside", archive(t, symlink("l", outside), file("l/pwned", "1")), errdefs.ErrInvalidArgument, "leads out of the layer"},
		{"relative link to outside", archive(t, symlink("l", strings.Repeat("../", 30)+"tmp"), file("l/pwned", "1")), errdefs.ErrInvalidArgument, "leads out of the layer"},
		{"links in a row", archive(t, symlink("a", "b"), symlink("b", outside), dir("a/pwned")), errdefs.ErrInvalidArgument, "leads out of the layer"},
		{"link loop", archive(t, symlink("a", "b"), symlink("b", "a"), file("a/x", "1")), errdefs.ErrInvalidArgument, "symbolic link"},
		{"file over a link", archive(t, symlink("l", outside+"/pwned"), file("l", "1")), errdefs.ErrInvalidArgument, "twice"},
		{"directory over a link", archive(t, symlink("l", outside), dir("l"), file("l/x", "1")), errdefs.ErrInvalidArgument, "already"},
		{"file twice", archive(t, file("f", "1"), file("f", "2")), errdefs.ErrInvalidArgument, "twice"},
		{"file as directory", archive(t, file("f", "1"), file("f/g", "2")), errdefs.ErrInvalidArgument, "no directory"},
		{"hard link to outside", archive(t, hardlink("l", "../../etc/passwd")), errdefs.ErrInvalidArgument, "leads upwards"},
		{"hard link through a link", archive(t, symlink("e", "/etc"), hardlink("l", "e/passwd")), errdefs.ErrInvalidArgument, "leads out of the layer"},
		{"hard link to nothing", archive(t, hardlink("l", "nope")), errdefs.ErrInvalidArgument, "does not have"},
		{"hard link to a directory", archive(t, dir("d"), hardlink("l", "d")), errdefs.ErrInvalidArgument, "is a directory"},
		{"hard link to a whiteout", archive(t, file(".wh.x", ""), hardlink("l", "x")), errdefs.ErrInvalidArgument, "does not have"},
		{"whiteout of dot dot", archive(t, file("a/.wh...", "")), errdefs.ErrInvalidArgument, "whiteout"},
		{"whiteout device", archive(t, entry{name: "x", typ: tar.TypeChar}), errdefs.ErrInvalidArgument, "device 0:0"},
		{"root is a link", archive(t, symlink(".", "/etc")), errdefs.ErrInvalidArgument, "root"},
		{"long name", archive(t, file(strings.Repeat("n", 300), "1")), errdefs.ErrInvalidArgument, "300 bytes"},
		{"deep name", archive(t, file(strings.Repeat("n/", 3000)+"x", "1")), errdefs.ErrInvalidArgument, "6001 bytes"},
		{"absurd size", big, errdefs.ErrResourceExhausted, "are free"},
		{"cut short", archive(t, file("x", strings.Repeat("y", 3000)))[:2000], errdefs.ErrDataLoss, "cut short"},
		{"no archive", bytes.Repeat([]byte("<html>"), 200), errdefs.ErrInvalidArgument, "not a tar archive"},
		{"gzip cut short", gz(t, archive(t, file("x", strings.Repeat("y", 3000))))[:60], errdefs.ErrDataLoss, "cut short"},
		{"gzip damaged", append(gz(t, nil)[:10], bytes.Repeat([]byte{0xff}, 100)...), errdefs.ErrInvalidArgument, "damaged"},
		{"zstd damaged", append([]byte{0x28, 0xb5, 0x2f, 0xfd}, bytes.Repeat([]byte{0xff}, 100)...), errdefs.ErrInvalidArgument, "damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root)
			_, err := s.Apply(t.Context(), digest.FromBytes(tc.data), from(tc.data))
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("err = %v, want %v with %q", err, tc.want, tc.text)
			}
			checkEmpty(t, root)
		})
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("written outside of the layer: %v", left)
	}
}

func checkEmpty(t *testing.T, root string) {
	t.Helper()
	for _, sub := range []string{"tree", "record", "tmp"} {
		left, err := os.ReadDir(filepath.Join(root, sub))
		if err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", sub, left, err)
		}
	}
}

func fixChecksum(header []byte) {
	copy(header[148:156], "        ")
	sum := 0
	for _, b := range header[:512] {
		sum += int(b)
	}
	copy(header[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

func gz(t *testing.T, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zst(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

func TestCompression(t *testing.T) {
	plain := archive(t, file("x", strings.Repeat("sampan ", 100_000)))
	for name, data := range map[string][]byte{
		"plain":            plain,
		"gzip":             gz(t, plain),
		"gzip in members":  append(gz(t, plain[:1000]), gz(t, plain[1000:])...),
		"zstd":             zst(t, plain),
		"zstd with a skip": append([]byte{0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'h', 'i'}, zst(t, plain)...),
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			info, err := s.Apply(t.Context(), digest.FromBytes(plain), from(data))
			if err != nil {
				t.Fatal(err)
			}
			if info.Bytes != 700_000 {
				t.Errorf("%d bytes of content, want 700000", info.Bytes)
			}
		})
	}
}

func TestWrongDigest(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root)
	_, err := s.Apply(t.Context(), digest.FromString("something else"), from(archive(t, file("x", "1"))))
	if !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("err = %v, want data loss", err)
	}
	checkEmpty(t, root)
}

// What the source says at its end counts for more than what the content looked
// like.
func TestSourceVerdict(t *testing.T) {
	verdict := fmt.Errorf("wrong digest: %w", errdefs.ErrDataLoss)
	root := t.TempDir()
	s := openStore(t, root)
	for _, data := range [][]byte{archive(t, file("x", "1")), []byte("garbage")} {
		_, err := s.Apply(t.Context(), digest.FromBytes(data), func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(data), iotestErr{verdict})), nil
		})
		if !errors.Is(err, verdict) {
			t.Errorf("err = %v, want the source's", err)
		}
	}
	checkEmpty(t, root)
}

type iotestErr struct{ err error }

func (r iotestErr) Read([]byte) (int, error) { return 0, r.err }

func TestJoin(t *testing.T) {
	s := openStore(t, t.TempDir())
	data := archive(t, file("x", "1"))
	var opened atomic.Int32
	release := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := s.Apply(t.Context(), digest.FromBytes(data), func(ctx context.Context) (io.ReadCloser, error) {
				opened.Add(1)
				<-release
				return from(data)(ctx)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	close(release)
	wg.Wait()
	if n := opened.Load(); n != 1 {
		t.Errorf("the archive was opened %d times, want once", n)
	}
}

func TestCancel(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	data := archive(t, file("x", "1"))
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err := s.Apply(ctx, digest.FromString("x"), func(ctx context.Context) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			w.Write(data[:600])
			<-ctx.Done()
			w.CloseWithError(ctx.Err())
			close(ended)
		}()
		return r, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
	<-ended
	checkEmpty(t, root)
}

func TestReopen(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root)
	id := apply(t, s, file("x", "1"))
	gone := apply(t, s, file("y", "1"))
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	torn := apply(t, s, file("z", "1"))
	if err := s.Remove(gone); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(gone); err != nil {
		t.Errorf("removing an absent layer: %v", err)
	}
	// What a killed process leaves behind.
	os.MkdirAll(filepath.Join(root, "tmp", "unpack-1", "tree", "x"), 0o700)
	os.MkdirAll(filepath.Join(root, "tree", strings.Repeat("0", nameLength)), 0o700)
	os.WriteFile(filepath.Join(root, "record", strings.Repeat("1", nameLength)), []byte("rubbish"), 0o600)
	// An earlier boot that ended before a sync.
	r := s.layers[torn]
	r.Boot = "another"
	if err := state.Write(s.recordPath(torn), recordKind, r, state.Volatile); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	s = openStore(t, root)
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	list := s.List()
	if len(list) != 1 || list[0].DiffID != id || !list[0].Synced {
		t.Errorf("layers after reopening: %+v, want only %s, synced", list, id)
	}
	for sub, want := range map[string]int{"tree": 1, "record": 1, "tmp": 0} {
		if left, _ := os.ReadDir(filepath.Join(root, sub)); len(left) != want {
			t.Errorf("%s has %d entries, want %d", sub, len(left), want)
		}
	}
}

// A full disk is an error of its own, and gives back what was written.
func TestDiskFull(t *testing.T) {
	root := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	s := openStore(t, root)
	var many []entry
	for i := range 8 {
		many = append(many, file(fmt.Sprint(i), strings.Repeat("x", 1<<20)))
	}
	for name, entries := range map[string][]entry{"in pieces": many, "at once": {file("x", strings.Repeat("x", 20<<20))}} {
		t.Run(name, func(t *testing.T) {
			data := archive(t, entries...)
			_, err := s.Apply(t.Context(), digest.FromBytes(data), from(data))
			if !errors.Is(err, errdefs.ErrResourceExhausted) {
				t.Errorf("err = %v, want resource exhausted", err)
			}
			checkEmpty(t, root)
		})
	}
}

func FuzzUntar(f *testing.F) {
	add := func(entries ...entry) {
		var t testing.T
		f.Add(archive(&t, entries...))
	}
	add(file("a/b", "1"), dir("a"), symlink("l", "a"), file("l/c", "2"), hardlink("h", "a/b"), file(".wh.x", ""))
	add(symlink("l", "/etc"), file("l/x", ""))
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		tree := filepath.Join(top, "tree")
		os.Mkdir(tree, 0o755)
		untar(t.Context(), tree, bytes.NewReader(data))
		if left, _ := os.ReadDir(top); len(left) != 1 {
			t.Errorf("written outside of the tree: %v", left)
		}
	})
}
