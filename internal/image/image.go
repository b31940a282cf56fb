// Package image keeps the node's images: what they are called, what they are
// made of, who uses them.
//
// An image is known by its id, the digest of its configuration. References are
// names that point to an id and may move. The package pulls images from
// registries, loads them from archives, and removes layers that nobody needs
// any more. It knows nothing of the CRI, and leaves transport to package
// registry and files to package layer.
package image

import (
	"log/slog"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"sampan.dev/sampan/internal/registry"
)

// Image is a snapshot of one image. It does not change, and its slices must not
// be changed.
type Image struct {
	ID          string          // "sha256:..." of the configuration
	RepoTags    []string        // docker.io/library/busybox:latest
	RepoDigests []string        // docker.io/library/busybox@sha256:...
	Size        uint64          // bytes its layers take on disk, unpacked
	Pinned      bool            // by configuration; garbage collection leaves it alone
	Layers      []digest.Digest // diff ids, bottom first
	Config      ocispec.Image
	User        string // Config.Config.User, as it stands in the image
	Checkpoint  string // the name of the container that it is a checkpoint of, or empty
}

// Auth carries credentials in any of the forms the CRI has.
type Auth = registry.Auth

// Config says where images live and where they come from.
type Config struct {
	Root      string // directory of image records
	LayerRoot string // directory of layers
	Registry  registry.Config
	Pinned    []string // references; * matches anything, slashes included
	Logger    *slog.Logger
	Figures   *Figures // of pulls; nil if nobody asks for them
}
