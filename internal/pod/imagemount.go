package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"sampan.dev/sampan/internal/layer"
)

// MountImage is the image that is mounted in a container as a volume.
type MountImage struct {
	ID string `json:"id"`
}

// imagesToMount finds the images that a container wants as volumes. What it finds
// is recorded: names may mean another image by the time of a restart.
func (s *Pods) imagesToMount(config *runtimeapi.ContainerConfig) (map[int]MountImage, error) {
	var found map[int]MountImage
	for i, m := range config.GetMounts() {
		ref := m.GetImage().GetImage()
		if ref == "" {
			continue
		}
		image, err := s.cfg.Images.Get(ref)
		if err != nil {
			return nil, imageMountError(fmt.Sprintf("mounts[%d].image", i), err)
		}
		if found == nil {
			found = make(map[int]MountImage)
		}
		found[i] = MountImage{ID: image.ID}
	}
	return found, nil
}

// imageMountError says it in the word that the CRI has for it.
func imageMountError(field string, err error) error {
	return fmt.Errorf("%w: %s: %w", crierrors.ErrImageVolumeMountFailed, field, err)
}

// images lists the ids of all images that the container needs.
func (c *Container) images() []string {
	var ids []string
	if c.ImageID != "" { // of an unreadable one nobody knows it
		ids = append(ids, c.ImageID)
	}
	for _, m := range c.MountImages {
		ids = append(ids, m.ID)
	}
	return ids
}

// mountImages mounts the container's image volumes, each in a place of its own,
// and returns the source of each of the container's mounts that is one. Their files
// belong to the users of the pod's user namespace.
func (s *Pods) mountImages(ctx context.Context, p *Pod, c *Container, label string) ([]string, error) {
	sources := make([]string, len(c.Config.GetMounts()))
	for i, m := range c.Config.GetMounts() {
		want, ok := c.MountImages[i]
		if !ok {
			continue
		}
		field := fmt.Sprintf("mounts[%d].image", i)
		target := filepath.Join(s.paths.images(c.ID), strconv.Itoa(i))
		if err := s.mountImage(ctx, c.ID, want.ID, layer.MountSpec{Target: target, ReadOnly: true, UserNS: s.namespaces(p).User, Label: label}); err != nil {
			return nil, imageMountError(field, err)
		}
		var err error
		if sources[i], err = pathInImage(target, m.GetImageSubPath()); err != nil {
			return nil, imageMountError(field+"_sub_path", err)
		}
	}
	return sources, nil
}

func (s *Pods) mountImage(ctx context.Context, holder, id string, m layer.MountSpec) error {
	image, err := s.cfg.Images.Acquire(id, holder)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.Target, 0o711); err != nil {
		return err
	}
	m.Layers = image.Layers
	return s.cfg.Layers.Mount(ctx, m)
}

// pathInImage follows a path, and the links in it, inside a mounted image. Nobody
// can change a link meanwhile: the image is read-only.
func pathInImage(root, sub string) (string, error) {
	path, err := securejoin.SecureJoin(root, sub)
	if err != nil {
		return "", fmt.Errorf("%q cannot be followed inside the image: %w: %w", sub, err, errdefs.ErrInvalidArgument)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return "", fmt.Errorf("%q does not exist in the image: %w", sub, errdefs.ErrInvalidArgument)
	case err != nil:
		return "", err
	case !info.IsDir() && !info.Mode().IsRegular():
		return "", fmt.Errorf("%q is neither a directory nor a regular file in the image: %w", sub, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

func (s *Pods) unmountImages(id string) error {
	entries, err := os.ReadDir(s.paths.images(id))
	if err != nil {
		return ignoreAbsent(err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, s.cfg.Layers.Unmount(filepath.Join(s.paths.images(id), e.Name())))
	}
	return errors.Join(errs...)
}
