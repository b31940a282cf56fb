package layer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// restore makes directories of the writable layer that bring back what layers,
// unpacked without knowledge of each other, have lost: overlayfs shows the
// attributes of the topmost directory of a name, and that one may come from an
// archive that never described it (an archive with tmp/file but no tmp/). The
// writable layer gets such directories with the attributes of the topmost layer
// that does describe them. The root, which is always in the writable layer, is
// one of them.
//
// Most images need this for the root only.
func (v view) restore(stack []record, upper string) error {
	if err := v.restoreOne(stack, ".", upper); err != nil {
		return fmt.Errorf("attributes of /: %w", err)
	}
	var implicit []string
	for _, r := range stack {
		implicit = append(implicit, r.Implicit...)
	}
	slices.Sort(implicit) // parents first
	for _, dir := range slices.Compact(implicit) {
		if dir == "." {
			continue
		}
		if err := v.restoreOne(stack, dir, upper); err != nil {
			return fmt.Errorf("attributes of /%s: %w", dir, err)
		}
	}
	return nil
}

// restoreOne restores one directory, if it needs to be.
func (v view) restoreOne(stack []record, dir, upper string) error {
	source, ok := v.describedBelow(stack, dir)
	if !ok {
		return nil
	}
	if ok, err := v.showParents(stack, filepath.Dir(dir), upper); err != nil || !ok {
		return err
	}
	return copyDirectory(source, filepath.Join(upper, dir))
}

// showParents makes dir and what is above it in upper, each as it is seen in the
// stack. It reports false if dir is not seen as a directory.
func (v view) showParents(stack []record, dir, upper string) (bool, error) {
	if isDirectory(upper, dir) {
		return true, nil
	}
	if ok, err := v.showParents(stack, filepath.Dir(dir), upper); err != nil || !ok {
		return false, err
	}
	for _, r := range stack {
		if tree := v.tree(r); isDirectory(tree, dir) {
			return true, copyDirectory(filepath.Join(tree, dir), filepath.Join(upper, dir))
		} else if hides(tree, dir) {
			break
		}
	}
	return false, nil
}

// describedBelow returns the topmost directory called dir whose layer describes
// it, if a layer above has it undescribed or it is the root. A layer that hides
// what is below ends the search.
func (v view) describedBelow(stack []record, dir string) (source string, ok bool) {
	undescribed := dir == "."
	for _, r := range stack {
		tree := v.tree(r)
		_, implicit := slices.BinarySearch(r.Implicit, dir)
		switch {
		case implicit && isDirectory(tree, dir):
			undescribed = true
		case !implicit && isDirectory(tree, dir):
			return filepath.Join(tree, dir), undescribed
		}
		if hides(tree, dir) {
			break
		}
	}
	return "", false
}

// hides reports whether nothing that layers below have under dir can be seen:
// the layer has dir, or something above it, as an opaque directory or as no
// directory at all.
func hides(tree, dir string) bool {
	path := tree
	for part := range strings.SplitSeq(dir, "/") {
		path = filepath.Join(path, part)
		info, err := os.Lstat(path)
		if err != nil {
			return false
		}
		if !info.IsDir() || isOpaque(path) {
			return true
		}
	}
	return false
}

// isDirectory reports whether tree has a directory called dir, not counting
// what is reached through symbolic links.
func isDirectory(tree, dir string) bool {
	root, err := unix.Open(tree, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func isOpaque(path string) bool {
	var buf [1]byte
	n, err := unix.Lgetxattr(path, opaqueXattr, buf[:])
	return err == nil && n == 1 && buf[0] == 'y'
}

// copyDirectory makes target a directory with the attributes of source.
func copyDirectory(source, target string) error {
	if err := os.Mkdir(target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return copyAttributes(source, target)
}

func copyOwner(source, target string) error {
	var st unix.Stat_t
	if err := unix.Lstat(source, &st); err != nil {
		return fmt.Errorf("owner of %s: %w", source, err)
	}
	return os.Lchown(target, int(st.Uid), int(st.Gid))
}

// copyAttributes gives target the owner, mode and times of source, and those of
// its extended attributes that are not overlayfs' own.
func copyAttributes(source, target string) error {
	var st unix.Stat_t
	if err := unix.Lstat(source, &st); err != nil {
		return err
	}
	if err := unix.Lchown(target, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(target, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(source, target); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, target, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(source, target string) error {
	list := make([]byte, 64<<10) // the kernel's limit
	n, err := unix.Llistxattr(source, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || name == "security.selinux" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(source, name, value)
		if err != nil {
			return fmt.Errorf("extended attribute %q: %w", name, err)
		}
		if err := unix.Lsetxattr(target, name, value[:n], 0); err != nil {
			return fmt.Errorf("extended attribute %q: %w", name, err)
		}
	}
	return nil
}
