package image

import (
	"cmp"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"sampan.dev/sampan/internal/checkpoint"
	"sampan.dev/sampan/internal/registry"
)

// Bounds on what an image may look like.
const (
	maxLayers = 400 // overlayfs takes 500
	maxConfig = 8 << 20
	maxNested = 3 // indexes in indexes
)

// document is an index or a manifest: both have the fields that tell which.
type document struct {
	SchemaVersion int                   `json:"schemaVersion"`
	MediaType     string                `json:"mediaType"`
	Manifests     []ocispec.Descriptor  `json:"manifests"`
	Config        *ocispec.Descriptor   `json:"config"`
	Layers        *[]ocispec.Descriptor `json:"layers"`
	Annotations   map[string]string     `json:"annotations"`
}

// parseDocument reads an index or a manifest. A document that could be taken for
// both is refused, and so is one whose own media type contradicts the sender's:
// somebody may have signed the one and mean the other.
func parseDocument(body []byte, sent string) (document, error) {
	var d document
	if err := json.Unmarshal(body, &d); err != nil {
		return d, fmt.Errorf("manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	refuse := func(format string, args ...any) (document, error) {
		return document{}, fmt.Errorf("manifest: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	switch {
	case d.SchemaVersion == 1:
		return document{}, fmt.Errorf("manifest: schema 1 is too old to be supported; push the image again with a newer tool: %w", errdefs.ErrNotImplemented)
	case d.SchemaVersion != 2:
		return refuse("schema version %d", d.SchemaVersion)
	case d.MediaType != "" && isManifestType(sent) && d.MediaType != sent:
		return refuse("it was sent as %s but says it is %s", sent, d.MediaType)
	case d.isIndex() && (d.Config != nil || d.Layers != nil):
		return refuse("it is both an index and an image")
	case d.isIndex() != isIndexType(d.kind(sent)) && isManifestType(d.kind(sent)):
		return refuse("its content is not what its media type %s says", d.kind(sent))
	case d.isIndex():
		return d, nil
	case d.Config == nil || d.Layers == nil:
		return refuse("it has neither manifests nor config and layers")
	case len(*d.Layers) > maxLayers:
		return refuse("%d layers are more than the %d that can be mounted", len(*d.Layers), maxLayers)
	}
	for _, blob := range append([]ocispec.Descriptor{*d.Config}, *d.Layers...) {
		if err := blob.Digest.Validate(); err != nil || blob.Size < 0 {
			return refuse("blob %q of %d bytes", blob.Digest, blob.Size)
		}
	}
	return d, nil
}

// checkpointed returns the container that an image is a checkpoint of, or "".
func (d document) checkpointed() string {
	return cmp.Or(d.Annotations[checkpoint.AnnotationName], d.Annotations[checkpoint.OldAnnotationName])
}

func (d document) isIndex() bool { return d.Manifests != nil }

// kind returns the media type a document has by its own word, or its sender's.
func (d document) kind(sent string) string {
	if d.MediaType != "" {
		return d.MediaType
	}
	return sent
}

func isIndexType(t string) bool {
	return t == registry.MediaTypeIndex || t == registry.MediaTypeDockerList
}

func isManifestType(t string) bool {
	return isIndexType(t) || t == registry.MediaTypeManifest || t == registry.MediaTypeDockerManifest
}

// choose returns the manifest of an index that suits this machine best.
func (d document) choose() (ocispec.Descriptor, error) {
	here := platforms.Default()
	var best *ocispec.Descriptor
	for i, m := range d.Manifests {
		if m.Platform == nil || !here.Match(*m.Platform) {
			continue
		}
		if best == nil || here.Less(*m.Platform, *best.Platform) {
			best = &d.Manifests[i]
		}
	}
	if best == nil && len(d.Manifests) == 1 && d.Manifests[0].Platform == nil {
		best = &d.Manifests[0] // its configuration will tell
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("the index has no image for %s, only for %s: %w", platforms.Format(platforms.DefaultSpec()), d.platforms(), errdefs.ErrNotFound)
	}
	if err := best.Digest.Validate(); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest: digest %q: %w", best.Digest, errdefs.ErrInvalidArgument)
	}
	return *best, nil
}

// platforms lists what an index has images for.
func (d document) platforms() []string {
	var list []string
	for _, m := range d.Manifests {
		if m.Platform != nil && m.Platform.OS != "unknown" {
			list = append(list, platforms.Format(*m.Platform))
		}
	}
	return list
}

// parseConfig reads an image's configuration.
func parseConfig(raw []byte) (ocispec.Image, error) {
	var c ocispec.Image
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("image configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, id := range c.RootFS.DiffIDs {
		if err := id.Validate(); err != nil || id.Algorithm() != digest.SHA256 {
			return c, fmt.Errorf("image configuration: diff id %q: %w", id, errdefs.ErrInvalidArgument)
		}
	}
	return c, nil
}

// checkConfig makes sure that a configuration belongs to an image of so many
// layers that can run here.
func checkConfig(c ocispec.Image, layers int) error {
	if len(c.RootFS.DiffIDs) != layers {
		return fmt.Errorf("not a container image: its manifest has %d layers, its configuration %d: %w", layers, len(c.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	if c.Architecture == "" && c.OS == "" {
		return nil // made by hand
	}
	p := ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	if p.OS == "" {
		p.OS = "linux"
	}
	if p.Architecture == "" {
		p.Architecture = platforms.DefaultSpec().Architecture
	}
	if !platforms.Default().Match(p) {
		return fmt.Errorf("the image is for %s, this machine is %s: %w", platforms.Format(p), platforms.Format(platforms.DefaultSpec()), errdefs.ErrNotFound)
	}
	return nil
}
