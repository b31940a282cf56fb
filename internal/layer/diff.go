package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Diff writes what is in a writable layer over the given layers, as a tar archive
// without whiteouts, and returns the paths of what the layer hides. Nobody may write
// to the layer meanwhile. RestoreUpper is the reverse.
//
// Sockets are left out: nobody listens on a copy.
func (s *Store) Diff(ctx context.Context, layers []digest.Digest, upper string, w io.Writer) (deleted []string, err error) {
	stack, err := s.stack(layers)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(upper)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	d := &differ{store: s, stack: stack, upper: upper, root: root, tar: tar.NewWriter(w), links: make(map[uint64]string)}
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = d.entry(name, e)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("writable layer: %w", err)
	}
	return d.deleted, d.tar.Close()
}

type differ struct {
	store   *Store
	stack   []record
	upper   string
	root    *os.Root
	tar     *tar.Writer
	links   map[uint64]string // the first name of an inode with several
	deleted []string
}

// entry writes what has one name.
func (d *differ) entry(name string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(d.upper, name), &st); err != nil {
		return fmt.Errorf("stat %s: %w", name, err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0: // a whiteout
		d.deleted = append(d.deleted, name)
		return nil
	case info.Mode()&fs.ModeSocket != 0:
		return nil
	case info.IsDir() && isOpaque(filepath.Join(d.upper, name)):
		if err := d.hideBelow(name); err != nil {
			return err
		}
	}
	h, err := d.header(name, info, &st)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := d.tar.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(d.tar, f)
	return err
}

// header describes a file as it is, but for the names of its owners, which only the
// container knows.
func (d *differ) header(name string, info fs.FileInfo, st *unix.Stat_t) (*tar.Header, error) {
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = d.root.Readlink(name); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return nil, err
	}
	h.Name, h.Uname, h.Gname, h.Format = name, "", "", tar.FormatPAX
	if info.IsDir() {
		h.Name += "/"
	}
	if h.PAXRecords, err = xattrRecords(filepath.Join(d.upper, name)); err != nil {
		return nil, err
	}
	if st.Nlink > 1 && !info.IsDir() {
		if first, ok := d.links[st.Ino]; ok {
			return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: first, Format: tar.FormatPAX}, nil
		}
		d.links[st.Ino] = name
	}
	return h, nil
}

// maxXattr is the most that the kernel lets one attribute, or the list of all
// names, have, in bytes.
const maxXattr = 64 << 10

// xattrRecords returns the extended attributes of a file that are not overlayfs'
// own.
func xattrRecords(path string) (map[string]string, error) {
	list := make([]byte, maxXattr)
	n, err := unix.Llistxattr(path, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	records := make(map[string]string)
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		switch {
		case name == "" || name == "security.selinux":
			continue
		case name == "trusted.overlay.redirect" || name == "trusted.overlay.metacopy":
			return nil, fmt.Errorf("overlayfs keeps part of it elsewhere (%s): %w", name, errdefs.ErrNotImplemented)
		case strings.HasPrefix(name, "trusted.overlay."):
			continue
		}
		value := make([]byte, maxXattr)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %q: %w", name, err)
		}
		records[paxXattr+name] = string(value[:n])
	}
	return records, nil
}

// hideBelow notes what an opaque directory hides, name by name, for not everybody
// who reads the list can hide all of a directory and keep what is new in it.
func (d *differ) hideBelow(dir string) error {
	hidden := make(map[string]bool)
	for _, r := range d.stack {
		tree := d.store.Path(r.DiffID)
		if isDirectory(tree, dir) {
			entries, err := os.ReadDir(filepath.Join(tree, dir))
			if err != nil {
				return err
			}
			for _, e := range entries {
				hidden[e.Name()] = true
			}
		}
		if hides(tree, dir) {
			break
		}
	}
	for _, name := range slices.Sorted(maps.Keys(hidden)) {
		if _, err := d.root.Lstat(path.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			d.deleted = append(d.deleted, path.Join(dir, name))
		}
	}
	return nil
}

// RestoreUpper makes a writable layer of what Diff has returned. Neither the archive
// nor the list of what is deleted is trusted: see untar. On error nothing is made.
func (s *Store) RestoreUpper(ctx context.Context, layers []digest.Digest, upper string, diff io.Reader, deleted []string) error {
	stack, err := s.stack(layers)
	if err != nil {
		return err
	}
	fresh := upper + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.MkdirAll(fresh, 0o755); err != nil {
		return err
	}
	err = s.fillUpper(ctx, stack, fresh, diff, deleted)
	if err == nil {
		err = os.Rename(fresh, upper)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writable layer: %w", classify(err)), os.RemoveAll(fresh))
	}
	return nil
}

func (s *Store) fillUpper(ctx context.Context, stack []record, upper string, diff io.Reader, deleted []string) error {
	if err := view(s.root).restore(stack, upper); err != nil {
		return err
	}
	u, err := newUntarrer(upper)
	if err != nil {
		return err
	}
	defer u.close()
	if err := u.unpack(ctx, diff); err != nil {
		return err
	}
	for _, name := range deleted {
		dir, base := path.Split(name)
		if base == "" || base == "." || base == ".." {
			return fmt.Errorf("deleted file %q: it has no name: %w", name, errdefs.ErrInvalidArgument)
		}
		if err := u.entry(&tar.Header{Typeflag: tar.TypeReg, Name: dir + whiteoutPrefix + base}, nil); err != nil {
			return fmt.Errorf("deleted file %q: %w", name, err)
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(u.content.implicit)) {
		if err := s.describe(stack, dir, upper); err != nil {
			return err
		}
	}
	return u.finish()
}

// describe gives a directory that the archive has not described the attributes
// that it has in the layers.
func (s *Store) describe(stack []record, dir, upper string) error {
	if dir == "." {
		return nil
	}
	for _, r := range stack {
		tree := s.Path(r.DiffID)
		if isDirectory(tree, dir) {
			return copyAttributes(filepath.Join(tree, dir), filepath.Join(upper, dir))
		}
		if hides(tree, dir) {
			break
		}
	}
	return nil
}

// Unpack unpacks a plain tar archive into dir, which is empty. The archive is not
// trusted: see untar.
func Unpack(ctx context.Context, dir string, r io.Reader) error {
	_, err := untar(ctx, dir, r)
	return classify(err)
}

// Pack writes what is in dir as a plain tar archive that Unpack takes. Nobody may
// write to it meanwhile.
func Pack(ctx context.Context, dir string, w io.Writer) error {
	_, err := new(Store).Diff(ctx, nil, dir, w)
	return err
}
