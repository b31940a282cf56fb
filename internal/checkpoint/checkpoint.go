// Package checkpoint owns the form in which checkpoints of containers and pods are
// kept: the files that Podman, CRI-O, containerd and checkpointctl have agreed on,
// in a directory or, for a container, in a tar archive. It neither makes nor
// restores anything, and trusts no archive.
package checkpoint

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The files of a container's checkpoint. Those without a comment are JSON.
const (
	ConfigName  = "config.dump"           // a Config
	SpecName    = "spec.dump"             // the OCI runtime spec
	StatusName  = "status.dump"           // the CRI's ContainerStatus
	RequestName = "request.dump"          // the CRI's ContainerConfig; ours alone
	MountsName  = "bind.mounts"           // []BindMount
	DeletedName = "deleted.files"         // []string, relative to the root file system
	DiffName    = "rootfs-diff.tar"       // archive of what was written to the root file system
	DevShmName  = "devshm-checkpoint.tar" // archive of /dev/shm
	DumpLogName = "dump.log"              // CRIU's, text
	StatsName   = "stats-dump"            // CRIU's, binary
	ImagesDir   = "checkpoint"            // directory with CRIU's images
)

// volumesDir is the directory with the archives of the volumes that the image has.
const volumesDir = "volumes"

// VolumeName is the name of the archive of a volume.
func VolumeName(i int) string { return volumesDir + "/" + strconv.Itoa(i) + ".tar" }

// folders are the directories in a container's checkpoint.
var folders = []string{ImagesDir, volumesDir}

// The files of a pod's checkpoint, beside the directories of its containers.
const (
	PodOptionsName = "pod.options" // a PodOptions
	PodName        = "pod.dump"    // the CRI's PodSandboxConfig
)

// AnnotationName is the annotation of an OCI image whose one layer is a checkpoint:
// its value names the container. OldAnnotationName is how CRI-O called it first.
const (
	AnnotationName    = "org.criu.checkpoint.container.name"
	OldAnnotationName = "io.kubernetes.cri-o.annotations.checkpoint.name"
)

// Config says what was checkpointed.
type Config struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	RootfsImage     string    `json:"rootfsImage,omitempty"`     // as the user called it
	RootfsImageRef  string    `json:"rootfsImageRef,omitempty"`  // name@digest, or the image's id
	RootfsImageName string    `json:"rootfsImageName,omitempty"` // a tag
	OCIRuntime      string    `json:"runtime,omitempty"`         // the handler
	CreatedTime     time.Time `json:"createdTime"`
	CheckpointedAt  time.Time `json:"checkpointedTime"`
	RestoredAt      time.Time `json:"restoredTime"`
	Restored        bool      `json:"restored"`
}

// BindMount is a mount whose source was outside of the container.
type BindMount struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	FileType    string `json:"file_type"` // directory or file
	Permissions uint32 `json:"permissions"`
}

// PodOptions says where the containers of a pod's checkpoint are.
type PodOptions struct {
	Version    int               `json:"version"`
	Containers map[string]string `json:"containers"` // name to directory
	Handler    string            `json:"handler"`
}

// PodOptionsVersion is the version that this package writes, and reads.
const PodOptionsVersion = 1

// maxJSON bounds a file that is read as a whole, in bytes.
const maxJSON = 16 << 20

// WriteJSON writes a file of a checkpoint.
func WriteJSON(dir, name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	return os.WriteFile(filepath.Join(dir, name), data, 0o600)
}

// ReadJSON reads a file of a checkpoint. The error wraps fs.ErrNotExist if there is
// none, and else ErrInvalidArgument.
func ReadJSON(dir, name string, v any) error {
	f, err := Open(dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err != nil {
		return err
	}
	if len(data) > maxJSON {
		return fmt.Errorf("checkpoint: %s has more than %d bytes: %w", name, maxJSON, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("checkpoint: %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Open opens a regular file of a checkpoint for reading.
func Open(dir, name string) (*os.File, error) {
	fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("checkpoint: there is no %s: %w: %w", name, fs.ErrNotExist, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: open %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	f := os.NewFile(uintptr(fd), name)
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("checkpoint: %s is no regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

// known are the files that an archive may have, besides those in folders.
var known = map[string]bool{
	ConfigName: true, SpecName: true, StatusName: true, RequestName: true, MountsName: true, DeletedName: true,
	DiffName: true, DevShmName: true, DumpLogName: true, StatsName: true,
}

// Pack writes a container's checkpoint as an archive.
func Pack(ctx context.Context, dir string, w io.Writer) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || file == dir {
			return err
		}
		return packOne(tw, dir, file, e)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func packOne(tw *tar.Writer, dir, file string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	name, err := filepath.Rel(dir, file)
	if err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: info.ModTime(), Format: tar.FormatPAX}
	switch {
	case info.IsDir():
		h.Typeflag, h.Name, h.Size = tar.TypeDir, name+"/", 0
		return tw.WriteHeader(h)
	case !info.Mode().IsRegular():
		return nil
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}

// maxEntries bounds the files in an archive.
const maxEntries = 1 << 20

// Extract unpacks an archive into dir, which is empty. It makes only those files
// that a checkpoint has, under names that it knows: what else is in the archive is
// ignored, and what pretends to be one of these files and is a link is an error.
func Extract(ctx context.Context, r io.Reader, dir string) error {
	for _, folder := range folders {
		if err := os.Mkdir(filepath.Join(dir, folder), 0o700); err != nil {
			return err
		}
	}
	tr := tar.NewReader(r)
	for range maxEntries {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = extractOne(tr, h, dir)
		}
		if err != nil {
			return fmt.Errorf("checkpoint: archive: %w", classify(err))
		}
	}
	return fmt.Errorf("checkpoint: archive: it has more than %d entries: %w", maxEntries, errdefs.ErrInvalidArgument)
}

func extractOne(tr *tar.Reader, h *tar.Header, dir string) error {
	name := path.Clean(strings.TrimPrefix(h.Name, "./"))
	folder, base := path.Split(name)
	switch {
	case !known[name] && !slices.Contains(folders, strings.TrimSuffix(folder, "/")):
		return nil
	case folder != "" && (base == "" || base == "." || base == ".."):
		return nil
	case h.Typeflag != tar.TypeReg:
		return fmt.Errorf("entry %q is no regular file: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("entry %q is there twice: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(f, tr)
	return errors.Join(err, f.Close())
}

// classify gives errors of reading an archive and writing files a class.
func classify(err error) error {
	switch {
	case errdefs.IsInvalidArgument(err):
		return err
	case errors.Is(err, tar.ErrHeader), errors.Is(err, unix.ENAMETOOLONG):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("it is cut short: %w", errdefs.ErrDataLoss)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}
