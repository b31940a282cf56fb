package selinux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// attribute is where a file's label is.
const attribute = "security.selinux"

// protected are paths that a whole host needs with the labels they have.
var protected = []string{
	"/", "/bin", "/boot", "/dev", "/etc", "/etc/pki", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin",
	"/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib", "/var/lib/kubelet", "/var/log", "/var/run", "/var/tmp",
}

// Relabel gives path and everything below it a label; an empty label changes
// nothing. Files that have the label already are not written to. Symbolic links are
// labelled, not followed, whoever puts them there meanwhile. File systems that have
// no labels of their own, or are read-only, are left as they are: how they were
// mounted decides what containers can do with them.
//
// path has no symbolic links in it. When ctx ends, what is labelled stays so.
func (s *SELinux) Relabel(ctx context.Context, path, label string) error {
	if label == "" {
		return nil
	}
	path = filepath.Clean(path)
	if slices.Contains(protected, path) || slices.Contains(s.cfg.Protected, path) {
		return fmt.Errorf("relabel %s: this host needs it with the label it has; mount a directory in it instead: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := relabel(ctx, path, label); err != nil {
		return fmt.Errorf("relabel %s: %w", path, err)
	}
	return nil
}

// LabelImages gives the directory with the files of images the label with which every
// container can read them: overlayfs passes on what they map into memory, and there the
// label of the mount does not count. What is made below later gets it from the kernel,
// so a directory that has it is done.
func (s *SELinux) LabelImages(ctx context.Context, dir string) error {
	if s.cfg.Image == "" || hasLabel(dir, s.cfg.Image) {
		return nil
	}
	if err := relabel(ctx, dir, s.cfg.Image); err != nil { // dir itself comes last
		return fmt.Errorf("label the images in %s: %w", dir, err)
	}
	return nil
}

func relabel(ctx context.Context, path, label string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return setLabel(path, label)
	case err != nil:
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	return relabelDir(ctx, dir, label, maxDepth)
}

const (
	batch    = 1024 // names of a directory that are held at once
	maxDepth = 1000 // directories in each other, each of which is open meanwhile
)

// relabelDir labels what is in a directory, then the directory. It reaches files
// through open directories only: a path could be led elsewhere meanwhile.
func relabelDir(ctx context.Context, dir *os.File, label string, depth int) error {
	if depth == 0 {
		return fmt.Errorf("%s: more than %d directories in each other: %w", dir.Name()[:min(256, len(dir.Name()))], maxDepth, errdefs.ErrInvalidArgument)
	}
	here := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd()))
	for {
		entries, err := dir.ReadDir(batch)
		for _, e := range entries {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := relabelEntry(ctx, dir, here, e, label, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
	}
	return setLabel(here+"/.", label)
}

func relabelEntry(ctx context.Context, dir *os.File, here string, e fs.DirEntry, label string, depth int) error {
	if !e.IsDir() {
		return setLabel(here+"/"+e.Name(), label)
	}
	fd, err := unix.Openat(int(dir.Fd()), e.Name(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // replaced meanwhile, by somebody who can label it
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Join(dir.Name(), e.Name()), Err: err}
	}
	below := os.NewFile(uintptr(fd), filepath.Join(dir.Name(), e.Name()))
	defer below.Close()
	return relabelDir(ctx, below, label, depth-1)
}

// setLabel labels one file, if it is there and has another label.
func setLabel(path, label string) error {
	if hasLabel(path, label) {
		return nil
	}
	err := unix.Lsetxattr(path, attribute, []byte(label), 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EROFS):
		return nil
	}
	return &fs.PathError{Op: "label", Path: path, Err: err}
}

func hasLabel(path, label string) bool {
	var now [512]byte
	n, err := unix.Lgetxattr(path, attribute, now[:])
	return err == nil && trim(now[:n]) == label
}

// trim takes off the NUL byte that some tools write.
func trim(label []byte) string {
	if n := len(label); n > 0 && label[n-1] == 0 {
		label = label[:n-1]
	}
	return string(label)
}

// SetLabel labels one file of ours.
func (s *SELinux) SetLabel(path, label string) error {
	if label == "" {
		return nil
	}
	return setLabel(path, label)
}
