package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/image"
)

// PullImage fetches an image and returns its id, the same that every other answer
// calls it by.
func (s *imageService) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref, err := imageReference(r.GetImage())
	if err != nil {
		return nil, err
	}
	if err := s.checkHandler(r.GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	img, err := s.images.Pull(ctx, ref, credentials(r.GetAuth()))
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: img.ID}, nil
}

// checkHandler refuses a handler that is not configured. All others run the same
// images.
func (s *imageService) checkHandler(name string) error {
	known := s.handlers.Names()
	if name == "" || slices.Contains(known, name) {
		return nil
	}
	return fmt.Errorf("image.runtime_handler %q: there is no such handler; this node has %s: %w", name, strings.Join(known, ", "), errdefs.ErrInvalidArgument)
}

func imageReference(spec *runtimeapi.ImageSpec) (string, error) {
	if spec.GetImage() == "" {
		return "", fmt.Errorf("image.image: it is empty; give a reference such as registry.k8s.io/pause:3.10 or an image id: %w", errdefs.ErrInvalidArgument)
	}
	return spec.GetImage(), nil
}

func credentials(a *runtimeapi.AuthConfig) *image.Auth {
	if a == nil {
		return nil
	}
	return &image.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(),
		ServerAddress: a.GetServerAddress(), IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
}

// ListImages lists all images, or the one the filter names.
func (s *imageService) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	items, err := s.list(r.GetFilter())
	return &runtimeapi.ListImagesResponse{Images: items}, err
}

// StreamImages is ListImages for a node with more images than one message can
// tell of.
func (s *imageService) StreamImages(r *runtimeapi.StreamImagesRequest, stream grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	items, err := s.list(r.GetFilter())
	if err != nil {
		return err
	}
	return sendBatches(items, func(items []*runtimeapi.Image) error {
		return stream.Send(&runtimeapi.StreamImagesResponse{Images: items})
	})
}

func (s *imageService) list(f *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	found := s.images.List()
	if ref := f.GetImage().GetImage(); ref != "" {
		img, err := s.images.Get(ref)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		found = []image.Image{img}
	}
	items := make([]*runtimeapi.Image, 0, len(found))
	for _, img := range found {
		items = append(items, imageItem(img))
	}
	return items, nil
}

// ImageStatus describes an image; an absent one is no error and no image.
func (s *imageService) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	ref, err := imageReference(r.GetImage())
	if err != nil {
		return nil, err
	}
	img, err := s.images.Get(ref)
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: imageItem(img)}
	if r.GetVerbose() {
		info, err := json.Marshal(map[string]any{"layers": img.Layers, "imageSpec": img.Config})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// RemoveImage removes an image with all its names.
func (s *imageService) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	ref, err := imageReference(r.GetImage())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveImageResponse{}, s.images.Remove(ctx, ref)
}

// ImageFsInfo tells how much of which file system images take. Containers write
// to the same one.
func (s *imageService) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	dir, bytes, inodes, err := s.images.FsInfo()
	if err != nil {
		return nil, err
	}
	now := time.Now().UnixNano()
	usage := func(mountpoint string, bytes, inodes uint64) *runtimeapi.FilesystemUsage {
		return &runtimeapi.FilesystemUsage{
			Timestamp: now, FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: mountpoint},
			UsedBytes: &runtimeapi.UInt64Value{Value: bytes}, InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
		}
	}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{usage(path.Clean(dir), bytes, inodes)}}, nil
}

func imageItem(img image.Image) *runtimeapi.Image {
	item := &runtimeapi.Image{
		Id: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Size: img.Size, Pinned: img.Pinned,
		Spec: &runtimeapi.ImageSpec{Image: img.ID},
	}
	item.Uid, item.Username = imageUser(img.User)
	return item
}

// imageUser splits an image's USER, which is user[:group], into a uid or a name.
func imageUser(user string) (*runtimeapi.Int64Value, string) {
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		return nil, ""
	}
	if uid, err := strconv.ParseInt(name, 10, 64); err == nil {
		return &runtimeapi.Int64Value{Value: uid}, ""
	}
	return nil, name
}
