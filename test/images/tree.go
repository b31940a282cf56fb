package images

import (
	"archive/tar"
	"bytes"
	"path"
	"slices"
	"strings"
	"time"
)

// tree is a layer in the making: paths without a leading slash, each with its
// tar header and content. The same tree always gives the same bytes.
type tree struct {
	entries map[string]entry
}

type entry struct {
	header tar.Header
	data   []byte
}

func newTree() *tree { return &tree{entries: map[string]entry{}} }

// epoch is the time stamp of everything in the images.
var epoch = time.Unix(1700000000, 0).UTC()

// add puts one entry in, as the header says; the last one for a path stays.
func (t *tree) add(h tar.Header, data []byte) {
	name := strings.Trim(h.Name, "/")
	name = strings.TrimPrefix(name, "./")
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := t.entries[dir]; !ok {
			t.entries[dir] = entry{header: tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch}}
		}
	}
	clean := tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid,
		ModTime: epoch, Size: int64(len(data)),
	}
	if h.Typeflag == tar.TypeDir {
		clean.Name += "/"
	}
	t.entries[name] = entry{header: clean, data: data}
}

func (t *tree) file(name string, mode int64, data string) {
	t.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, []byte(data))
}

func (t *tree) dir(name string, mode int64) {
	t.add(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, nil)
}

func (t *tree) symlink(name, target string) {
	t.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// link makes name a hard link; its mode is the target's, since they share the
// inode and whoever unpacks the entry may set the mode again.
func (t *tree) link(name, target string) {
	t.add(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: t.entries[target].header.Mode}, nil)
}

// tar returns the archive: directories before what is in them, hard links last.
func (t *tree) tar() ([]byte, error) {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		la, lb := t.entries[a].header.Typeflag == tar.TypeLink, t.entries[b].header.Typeflag == tar.TypeLink
		switch {
		case la && !lb:
			return 1
		case lb && !la:
			return -1
		}
		return strings.Compare(a, b)
	})
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range names {
		e := t.entries[name]
		if err := w.WriteHeader(&e.header); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
