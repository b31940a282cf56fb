package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Whiteouts as archives have them.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."     // aufs' own; only the next one means something
	whiteoutOpaque = ".wh..wh..opq" // hides what lower layers have in this directory
)

// opaqueXattr is how overlayfs marks a directory that hides lower ones.
const opaqueXattr = "trusted.overlay.opaque"

// content sums up what was unpacked.
type content struct {
	bytes      uint64
	inodes     uint64
	sum        contentSum
	opaqueRoot bool
	implicit   map[string]bool // directories made for an entry inside them; "." is the root
}

// untar unpacks a layer's plain tar stream into dir, which is empty and reached
// by nobody else.
//
// No entry can reach out of dir: the kernel resolves every path beneath it
// (openat2), and nothing that exists is ever written through or replaced. What
// cannot be part of a sound layer is refused: names with "..", paths through
// symbolic links that lead out, the same name twice (but for directories), hard
// links to what is not there.
func untar(ctx context.Context, dir string, r io.Reader) (content, error) {
	u, err := newUntarrer(dir)
	if err != nil {
		return content{}, err
	}
	defer u.close()
	if err := u.unpack(ctx, r); err != nil {
		return content{}, err
	}
	return u.content, u.finish()
}

func newUntarrer(dir string) (*untarrer, error) {
	root, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &untarrer{
		root:    root,
		parent:  parent{fd: -1},
		buf:     make([]byte, blockSize),
		content: content{inodes: 1, implicit: map[string]bool{".": true}},
	}, nil
}

func (u *untarrer) close() {
	u.parent.close()
	unix.Close(u.root)
}

// unpack makes what an archive describes.
func (u *untarrer) unpack(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if errors.Is(err, tar.ErrHeader) {
			return fmt.Errorf("not a tar archive: %w: %w", errdefs.ErrInvalidArgument, err)
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

type untarrer struct {
	root    int // O_PATH
	parent  parent
	buf     []byte
	times   []dirTime // of directories, set when nothing is put into them any more
	content content
}

// parent is the directory that the last entry was in.
type parent struct {
	path string
	fd   int // O_PATH, or -1
}

func (p *parent) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
	p.fd = -1
}

type dirTime struct {
	path string
	ts   [2]unix.Timespec
}

// entry makes what one header describes.
func (u *untarrer) entry(h *tar.Header, body io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if name == "." {
		return u.rootEntry(h)
	}
	if strings.HasPrefix(name, whiteoutMeta) || strings.Contains(name, "/"+whiteoutMeta) {
		if path.Base(name) == whiteoutOpaque {
			return u.opaque(path.Dir(name))
		}
		return nil
	}
	dirfd, err := u.directory(path.Dir(name))
	if err != nil {
		return err
	}
	base := path.Base(name)
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return u.whiteout(dirfd, hidden)
	}
	if h.Typeflag == tar.TypeDir {
		return u.mkdir(dirfd, base, name, h)
	}
	err = u.create(dirfd, base, h, body)
	if errors.Is(err, unix.EEXIST) && isWhiteout(dirfd, base) {
		if err := unix.Unlinkat(dirfd, base, 0); err != nil {
			return err
		}
		err = u.create(dirfd, base, h, body)
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("the archive has this name twice: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil && h.Typeflag != tar.TypeLink {
		u.content.inodes++
	}
	return err
}

// cleanName returns an entry's path relative to the root, "." for the root
// itself.
func cleanName(name string) (string, error) {
	if len(name) >= unix.PathMax {
		return "", fmt.Errorf("the name has %d bytes: %w", len(name), errdefs.ErrInvalidArgument)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("the name leads upwards: %w", errdefs.ErrInvalidArgument)
		}
		if len(part) > 255 {
			return "", fmt.Errorf("a part of the name has %d bytes: %w", len(part), errdefs.ErrInvalidArgument)
		}
	}
	return path.Clean(strings.TrimLeft(name, "/")), nil
}

// rootEntry sets the attributes of the root directory.
func (u *untarrer) rootEntry(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return fmt.Errorf("the root of a layer is a directory: %w", errdefs.ErrInvalidArgument)
	}
	fd, err := unix.Openat(u.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	delete(u.content.implicit, ".")
	u.times = append(u.times, dirTime{".", timestamps(h)})
	return setAttributes(fd, h)
}

// directory opens a directory of the layer, making what is missing of it. The
// descriptor is valid until the next call.
func (u *untarrer) directory(dir string) (int, error) {
	if u.parent.fd >= 0 && u.parent.path == dir {
		return u.parent.fd, nil
	}
	fd, err := u.openBeneath(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		fd, err = u.makeDirectory(dir)
	}
	if err != nil {
		return -1, err
	}
	u.parent.close()
	u.parent = parent{path: dir, fd: fd}
	return fd, nil
}

// openBeneath opens a directory, following symbolic links as long as they stay
// in the layer.
func (u *untarrer) openBeneath(dir string) (int, error) {
	fd, err := unix.Openat2(u.root, dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("directory %s goes through a symbolic link that leads out of the layer: %w", dir, errdefs.ErrInvalidArgument)
	}
	return fd, err
}

// makeDirectory makes a directory that no entry has described (yet), and its
// parents, and opens it.
func (u *untarrer) makeDirectory(dir string) (int, error) {
	above := path.Dir(dir)
	dirfd, err := u.openBeneath(above)
	if (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)) && above != "." {
		dirfd, err = u.makeDirectory(above)
	}
	if err != nil {
		return -1, err
	}
	defer unix.Close(dirfd)
	made, err := u.ensureDir(dirfd, path.Base(dir))
	if err != nil {
		return -1, err
	}
	if made {
		u.content.implicit[dir] = true
		fd, err := openDir(dirfd, path.Base(dir))
		if err != nil {
			return -1, err
		}
		defer unix.Close(fd)
		if err := unix.Fchmod(fd, 0o755); err != nil {
			return -1, err
		}
	}
	return u.openBeneath(dir)
}

// ensureDir makes the directory base in dirfd unless it exists, and reports
// whether it did. A directory in place of a whiteout hides what is below it.
func (u *untarrer) ensureDir(dirfd int, base string) (made bool, err error) {
	err = unix.Mkdirat(dirfd, base, 0o700)
	switch {
	case err == nil:
		u.content.inodes++
		return true, nil
	case !errors.Is(err, unix.EEXIST):
		return false, err
	case isWhiteout(dirfd, base):
		if err := unix.Unlinkat(dirfd, base, 0); err != nil {
			return false, err
		}
		if err := unix.Mkdirat(dirfd, base, 0o700); err != nil {
			return false, err
		}
		return true, setOpaque(dirfd, base)
	case fileType(dirfd, base) != unix.S_IFDIR:
		return false, fmt.Errorf("%s is in the archive already, and no directory: %w", base, errdefs.ErrInvalidArgument)
	}
	return false, nil
}

// mkdir makes the directory an entry describes, or takes over the description of
// one that exists.
func (u *untarrer) mkdir(dirfd int, base, name string, h *tar.Header) error {
	if _, err := u.ensureDir(dirfd, base); err != nil {
		return err
	}
	fd, err := openDir(dirfd, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	delete(u.content.implicit, name)
	u.times = append(u.times, dirTime{name, timestamps(h)})
	return setAttributes(fd, h)
}

// create makes anything but a directory. Nothing has that name, or the error is
// EEXIST.
func (u *untarrer) create(dirfd int, base string, h *tar.Header, body io.Reader) error {
	mode := uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(dirfd, base, h, body)
	case tar.TypeLink:
		return u.link(dirfd, base, h.Linkname)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, dirfd, base); err != nil {
			return err
		}
		return setAttributesAt(dirfd, base, h)
	case tar.TypeFifo:
		if err := unix.Mknodat(dirfd, base, unix.S_IFIFO|mode, 0); err != nil {
			return err
		}
		return setAttributesAt(dirfd, base, h)
	case tar.TypeChar, tar.TypeBlock:
		return device(dirfd, base, h)
	}
	return fmt.Errorf("entry type %q is not one a layer can have: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

func (u *untarrer) file(dirfd int, base string, h *tar.Header, body io.Reader) error {
	if err := checkRoom(u.root, h.Size); err != nil {
		return err
	}
	fd, err := unix.Openat(dirfd, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(h.Mode&0o777))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var sum fileSum
	for {
		n, err := body.Read(u.buf)
		if err := writeAll(fd, u.buf[:n]); err != nil {
			return err
		}
		u.content.bytes += uint64(n)
		sum.add(u.buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	u.content.sum.add(sum)
	if err := setAttributes(fd, h); err != nil {
		return err
	}
	ts := timestamps(h)
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// roomCheck is the size from which a file's claim is compared with the free
// space before any of it is written.
const roomCheck = 16 << 20

// checkRoom refuses a file that cannot fit, such as one that claims exabytes.
func checkRoom(fd int, size int64) error {
	if size < roomCheck {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return nil // writing will tell
	}
	if free := st.Bavail * uint64(st.Bsize); uint64(size) > free {
		return fmt.Errorf("it claims %d bytes and %d are free: %w", size, free, errdefs.ErrResourceExhausted)
	}
	return nil
}

// link makes a hard link to an earlier entry.
func (u *untarrer) link(dirfd int, base, target string) error {
	name, err := cleanName(target)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", target, err)
	}
	targetfd, err := u.openBeneath(path.Dir(name))
	if err == nil {
		defer unix.Close(targetfd)
		if isWhiteout(targetfd, path.Base(name)) {
			err = unix.ENOENT
		} else {
			err = unix.Linkat(targetfd, path.Base(name), dirfd, base, 0)
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("hard link to %q, which the layer does not have: %w", target, errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("hard link to %q, which is a directory: %w", target, errdefs.ErrInvalidArgument)
	}
	return err
}

// device makes a device node. The one device that no layer can have is the one
// overlayfs takes for a whiteout.
func device(dirfd int, base string, h *tar.Header) error {
	mode := uint32(h.Mode & 0o7777)
	if h.Typeflag == tar.TypeChar {
		mode |= unix.S_IFCHR
	} else {
		mode |= unix.S_IFBLK
	}
	if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 || mode&unix.S_IFMT == unix.S_IFCHR && h.Devmajor == 0 && h.Devminor == 0 {
		return fmt.Errorf("device %d:%d cannot be in a layer: %w", h.Devmajor, h.Devminor, errdefs.ErrInvalidArgument)
	}
	if err := unix.Mknodat(dirfd, base, mode, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
		return err
	}
	return setAttributesAt(dirfd, base, h)
}

// whiteout hides a name of lower layers. If this layer has the name as well, its
// own entry hides a lower file already, and a directory is made opaque.
func (u *untarrer) whiteout(dirfd int, hidden string) error {
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("whiteout of %q: %w", hidden, errdefs.ErrInvalidArgument)
	}
	err := unix.Mknodat(dirfd, hidden, unix.S_IFCHR, 0)
	if err == nil {
		u.content.inodes++
		return nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if fileType(dirfd, hidden) == unix.S_IFDIR {
		return setOpaque(dirfd, hidden)
	}
	return nil
}

// opaque makes dir hide what lower layers have in it.
func (u *untarrer) opaque(dir string) error {
	if dir == "." {
		// Overlayfs does not look at the mark on a root: Mount leaves out the
		// layers below.
		u.content.opaqueRoot = true
		return nil
	}
	if _, err := u.directory(dir); err != nil {
		return err
	}
	dirfd, err := u.directory(path.Dir(dir))
	if err != nil {
		return err
	}
	return setOpaque(dirfd, path.Base(dir))
}

// finish sets the times of directories, now that no entry changes them.
func (u *untarrer) finish() error {
	for _, t := range u.times {
		fd, err := unix.Openat2(u.root, t.path, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != nil {
			return fmt.Errorf("directory %s: %w", t.path, err)
		}
		err = unix.UtimesNanoAt(fd, "", t.ts[:], unix.AT_EMPTY_PATH)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("times of %s: %w", t.path, err)
		}
	}
	return nil
}

func openDir(dirfd int, base string) (int, error) {
	return unix.Openat(dirfd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

func setOpaque(dirfd int, base string) error {
	fd, err := openDir(dirfd, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0)
}

// fileType returns the S_IFMT bits of a name, or 0 if there is none.
func fileType(dirfd int, base string) uint32 {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0
	}
	return st.Mode & unix.S_IFMT
}

func isWhiteout(dirfd int, base string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(dirfd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// setAttributes sets owner, mode and extended attributes, in the order in which
// one does not undo the other. Most files have owner and mode from the start, and
// to ask costs next to nothing beside a change.
func setAttributes(fd int, h *tar.Header) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	chown := int(st.Uid) != h.Uid || int(st.Gid) != h.Gid
	if chown {
		if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
			return err
		}
	}
	if mode := uint32(h.Mode & 0o7777); chown || st.Mode&0o7777 != mode {
		if err := unix.Fchmod(fd, mode); err != nil {
			return err
		}
	}
	return eachXattr(h, func(name string, value []byte) error {
		return unix.Fsetxattr(fd, name, value, 0)
	})
}

// setAttributesAt does the same, and the times, for what cannot be opened.
func setAttributesAt(dirfd int, base string, h *tar.Header) error {
	if err := unix.Fchownat(dirfd, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(dirfd, base, uint32(h.Mode&0o7777), 0); err != nil {
			return err
		}
	}
	err := eachXattr(h, func(name string, value []byte) error {
		return unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, base), name, value, 0)
	})
	if err != nil {
		return err
	}
	ts := timestamps(h)
	return unix.UtimesNanoAt(dirfd, base, ts[:], unix.AT_SYMLINK_NOFOLLOW)
}

// paxXattr introduces an extended attribute among a header's PAX records.
const paxXattr = "SCHILY.xattr."

// eachXattr calls set for each attribute that belongs to a file's content. The
// attributes by which overlayfs and SELinux do their own work do not: they come
// from the machine the archive was made on.
func eachXattr(h *tar.Header, set func(name string, value []byte) error) error {
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") || name == "security.selinux" {
			continue
		}
		err := set(name, []byte(value))
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") {
			continue // the file system, or this type of file, has no such attributes
		}
		if err != nil {
			return fmt.Errorf("extended attribute %q: %w", name, err)
		}
	}
	return nil
}

// maxTime is the last second that ext4 can store.
var maxTime = time.Unix(1<<34-1, 0)

// timestamps returns the access and modification time of an entry, within what
// file systems can store.
func timestamps(h *tar.Header) [2]unix.Timespec {
	clamp := func(t time.Time) unix.Timespec {
		if t.Before(time.Unix(0, 0)) {
			t = time.Unix(0, 0)
		}
		if t.After(maxTime) {
			t = maxTime
		}
		return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	}
	accessed := h.AccessTime
	if accessed.IsZero() {
		accessed = h.ModTime
	}
	return [2]unix.Timespec{clamp(accessed), clamp(h.ModTime)}
}
