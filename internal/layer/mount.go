package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
)

// MountSpec describes a root file system.
type MountSpec struct {
	Layers   []digest.Digest // bottom first; may be empty
	Upper    string          // what the container writes; made if absent
	Work     string          // overlayfs' own; on the same file system as Upper; emptied
	Target   string          // the mount point; made if absent
	ReadOnly bool            // no Upper and Work then
	Label    string          // SELinux label for all files, or empty
	// Places shows, below all layers, the files and directories that something is
	// mounted on in every container. Otherwise each would have to make those that its
	// image lacks, in its writable layer.
	Places bool
	// UserNS is where a user namespace is pinned, to whose users the files of the
	// layers belong: what is user 0's in a layer is its root's. Empty for the
	// host's.
	UserNS string
}

// mounter remembers what the kernel's overlayfs cannot do.
type mounter struct {
	noAppend atomic.Bool // "lowerdir+" came with Linux 6.7
}

// Mount mounts the root file system described by m on its target. If overlayfs
// is mounted there already, it is left as it is.
//
// The mount is volatile: what a container writes to its root file system is
// not forced to disk by its fsync. A root file system does not outlive the boot.
func (s *Store) Mount(ctx context.Context, m MountSpec) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.mount(m); err != nil {
		return fmt.Errorf("mount root file system on %s: %w", m.Target, err)
	}
	return nil
}

// Unmount takes the root file system off target. Absent or not mounted is fine.
func (s *Store) Unmount(target string) error {
	err := host.Unmount(target)
	if err == nil && s.graves.Load() {
		err = s.sweepGraves()
	}
	return err
}

func (s *Store) mount(m MountSpec) error {
	if err := m.validate(); err != nil {
		return err
	}
	mounted, err := isOverlay(m.Target)
	if err != nil || mounted {
		return err
	}
	stack, err := s.stack(m.Layers)
	if err != nil {
		return err
	}
	if err := m.prepare(); err != nil {
		return err
	}
	if m.UserNS == "" {
		return s.mountFrom(view(s.root), m, stack)
	}
	return s.mountMapped(m, stack)
}

// mountMapped mounts with the ids of a user namespace. Overlayfs sees whose a file is
// through the mount that its layer is found on, and keeps a copy of that mount. So
// there is one such mount for a moment, of the directory that all layers are in:
// their number does not matter. It is read-only: nothing that goes wrong with it can
// harm the layers.
func (s *Store) mountMapped(m MountSpec, stack []record) (err error) {
	tree, err := host.IDMapped(s.root, m.UserNS, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return err
	}
	defer tree.Close()
	place := m.Target + ".layers"
	if err := os.MkdirAll(place, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Unmount(place), os.Remove(place)) }()
	if err := host.Attach(tree, place); err != nil {
		return err
	}
	return s.mountFrom(view(place), m, stack)
}

// view is the path at which the directory with the layers is seen.
type view string

func (v view) trees() string { return filepath.Join(string(v), "tree") }

// tree returns the directory of a layer's files.
func (v view) tree(r record) string { return filepath.Join(v.trees(), name(r.DiffID)) }

func (s *Store) mountFrom(v view, m MountSpec, stack []record) error {
	if !m.ReadOnly {
		if err := v.makeUpper(stack, m.Upper); err != nil {
			return err
		}
	}
	fault.Point("rootfs.prepared")
	lower := lowerDirs(stack, m.Places, m.ReadOnly)
	if !s.mounts.noAppend.Load() {
		err := v.mountNew(m, lower)
		if !errors.Is(err, errNoAppend) {
			return err
		}
		s.mounts.noAppend.Store(true)
	}
	return v.mountClassic(m, lower)
}

// stack returns the layers that can be seen, top first. Below one with an opaque
// root there is nothing to see, and a layer that comes twice hides itself.
func (s *Store) stack(ids []digest.Digest) ([]record, error) {
	var stack []record
	seen := make(map[digest.Digest]bool, len(ids))
	for _, id := range slices.Backward(ids) {
		if seen[id] {
			continue
		}
		seen[id] = true
		r, err := s.get(id)
		if err != nil {
			return nil, err
		}
		stack = append(stack, r)
		if r.OpaqueRoot {
			break
		}
	}
	return stack, nil
}

func (m MountSpec) validate() error {
	switch {
	case !filepath.IsAbs(m.Target):
		return fmt.Errorf("target %q is not an absolute path: %w", m.Target, errdefs.ErrInvalidArgument)
	case m.ReadOnly && (m.Upper != "" || m.Work != ""):
		return fmt.Errorf("a read-only root file system has no upper and work directories: %w", errdefs.ErrInvalidArgument)
	case !m.ReadOnly && (!filepath.IsAbs(m.Upper) || !filepath.IsAbs(m.Work)):
		return fmt.Errorf("upper %q and work %q are not absolute paths: %w", m.Upper, m.Work, errdefs.ErrInvalidArgument)
	}
	return nil
}

// prepare makes the directories of m. The work directory is made afresh: what
// is in it belongs to an earlier mount, and a volatile overlay refuses to be
// mounted over its own traces.
func (m MountSpec) prepare() error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil {
		return err
	}
	if m.ReadOnly {
		return nil
	}
	if err := os.RemoveAll(m.Work); err != nil {
		return err
	}
	return os.MkdirAll(m.Work, 0o711)
}

// makeUpper makes the writable layer, unless it exists: then it holds what a
// container wrote, and is left alone. Like the container's own files, it belongs to
// whom the view shows as root.
func (v view) makeUpper(stack []record, upper string) error {
	if _, err := os.Lstat(upper); err == nil {
		return nil
	}
	fresh := upper + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.MkdirAll(fresh, 0o755); err != nil {
		return err
	}
	if err := copyOwner(string(v), fresh); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	if err := v.restore(stack, fresh); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	fault.Point("rootfs.upper-restored")
	return os.Rename(fresh, upper)
}

// lowerDirs lists the lower directories relative to the directory of trees,
// top first. Overlayfs wants at least one, and two if there is no upper directory:
// empty ones stand in.
func lowerDirs(stack []record, places, readOnly bool) []string {
	dirs := make([]string, 0, len(stack)+2)
	for _, r := range stack {
		dirs = append(dirs, name(r.DiffID))
	}
	if places {
		dirs = append(dirs, "../places")
	}
	want := 1
	if readOnly {
		want = 2
	}
	for i := 0; len(dirs) < want; i++ {
		dirs = append(dirs, filepath.Join("../empty", strconv.Itoa(i)))
	}
	return dirs
}

var errNoAppend = errors.New("overlayfs does not know lowerdir+")

// mountNew mounts by the file system context calls: one call per lower
// directory, so that their number and the length of their names do not matter.
func (v view) mountNew(m MountSpec, lower []string) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return errNoAppend
	}
	defer unix.Close(fsfd)
	if !checksOptions() {
		return errNoAppend
	}
	for _, dir := range lower {
		if err := unix.FsconfigSetString(fsfd, "lowerdir+", filepath.Join(v.trees(), dir)); err != nil {
			return errNoAppend
		}
	}
	for _, o := range m.options() {
		key, value, isPair := strings.Cut(o, "=")
		if isPair {
			err = unix.FsconfigSetString(fsfd, key, value)
		} else {
			err = unix.FsconfigSetFlag(fsfd, key)
		}
		if err != nil {
			return fmt.Errorf("overlayfs option %s: %w", o, explain(fsfd, err))
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("overlayfs: %w", explain(fsfd, err))
	}
	attributes := 0
	if m.ReadOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return fmt.Errorf("overlayfs: %w", explain(fsfd, err))
	}
	defer unix.Close(mfd)
	return unix.MoveMount(mfd, "", unix.AT_FDCWD, m.Target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// checksOptions tells whether overlayfs looks at each option when it is given.
// Before Linux 6.5 the kernel collects them for mount(2)'s way of reading them,
// and takes any until the end.
var checksOptions = sync.OnceValue(func() bool {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fsfd)
	return unix.FsconfigSetFlag(fsfd, "no-such-option") != nil
})

// mountClassic mounts by mount(2), which takes all options in one page: lower
// directories are named relative to the directory they are in.
func (v view) mountClassic(m MountSpec, lower []string) error {
	options := append(m.options(), "lowerdir="+strings.Join(lower, ":"))
	for i, o := range options[:len(options)-1] {
		if label, ok := strings.CutPrefix(o, "context="); ok {
			options[i] = `context="` + label + `"` // SELinux takes it out before overlayfs looks
			continue
		}
		options[i] = strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(o)
	}
	data := strings.Join(options, ",")
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are more than this kernel can mount: %w", len(lower), errdefs.ErrResourceExhausted)
	}
	var flags uintptr
	if m.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	return host.InDir(v.trees(), func() error {
		if err := unix.Mount("overlay", m.Target, "overlay", flags, data); err != nil {
			return fmt.Errorf("overlayfs: %w", err)
		}
		return nil
	})
}

// options returns everything but the lower directories.
func (m MountSpec) options() []string {
	o := []string{"index=off"}
	if !m.ReadOnly {
		o = append(o, "upperdir="+m.Upper, "workdir="+m.Work, "volatile")
	}
	if m.Label != "" {
		o = append(o, "context="+m.Label)
	}
	return o
}

// explain adds what the kernel wrote about err to the file system context.
func explain(fsfd int, err error) error {
	buf := make([]byte, 1024)
	n, readErr := unix.Read(fsfd, buf)
	if readErr != nil || n < 2 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[2:n])))
}

// isOverlay reports whether an overlay is mounted right on path.
func isOverlay(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, nil
	}
	var sfs unix.Statfs_t
	if err := unix.Statfs(path, &sfs); err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	return sfs.Type == unix.OVERLAYFS_SUPER_MAGIC, nil
}
