package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/layer"
)

// LoadOptions adjusts Load.
type LoadOptions struct {
	// Name names the one image of the archive, in place of what the archive
	// calls it.
	Name string
}

// Load reads images from an archive: an OCI image layout in a tar stream, or
// what docker save writes, plain or compressed with gzip or zstd. It returns
// when they are on disk. On error no image of the archive has been added.
//
// Errors are ErrInvalidArgument for an archive that is none of these,
// ErrNotFound for one that lacks a part or a variant for this machine,
// ErrDataLoss for a damaged one, ErrResourceExhausted for a full disk.
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]Image, error) {
	images, err := s.loadArchive(ctx, r, o)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", noSpace(err))
	}
	return images, nil
}

func (s *Store) loadArchive(ctx context.Context, r io.Reader, o LoadOptions) ([]Image, error) {
	dir, err := os.MkdirTemp(s.path("tmp"), "load-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	plain, err := layer.Decompress(r)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	a, err := spool(ctx, dir, plain)
	if err != nil {
		return nil, err
	}
	found, err := a.images()
	if err != nil {
		return nil, err
	}
	if err := rename(found, o.Name); err != nil {
		return nil, err
	}

	for _, f := range found { // all of them, before one is added
		defer s.lease(f.config.RootFS.DiffIDs)()
		if err := s.unpackAll(ctx, f); err != nil {
			return nil, err
		}
	}
	var images []Image
	for _, f := range found {
		img, err := s.install(f.newImage)
		if err != nil {
			return nil, err
		}
		images = append(images, img)
	}
	return images, s.sync()
}

// rename gives the one image found another name.
func rename(found []archived, name string) error {
	if name == "" {
		return nil
	}
	if len(found) != 1 {
		return fmt.Errorf("one name for the %d images of the archive: %w", len(found), errdefs.ErrInvalidArgument)
	}
	named, err := parseReference(name)
	if err != nil {
		return err
	}
	if _, ok := named.(reference.Digested); ok {
		return fmt.Errorf("name %q: a digest cannot be given: %w", name, errdefs.ErrInvalidArgument)
	}
	found[0].names = []string{named.String()}
	return nil
}

// unpackAll brings the layers of an archived image into the layer store.
func (s *Store) unpackAll(ctx context.Context, f archived) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(layersAtOnce())
	for i, id := range f.config.RootFS.DiffIDs {
		g.Go(func() error {
			_, err := s.layers.Apply(ctx, id, s.slotted(func(context.Context) (io.ReadCloser, error) { return f.layers[i]() }))
			return err
		})
	}
	return g.Wait()
}

// sync returns when all images are on disk.
func (s *Store) sync() error {
	if err := s.layers.Sync(); err != nil {
		return err
	}
	f, err := os.Open(s.root)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// archived is an image found in an archive.
type archived struct {
	newImage
	layers []func() (io.ReadCloser, error) // bottom first
}

// dockerImage is an element of the manifest.json of docker save.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// images finds what is in the archive. Newer versions of Docker write an OCI
// layout with a manifest.json beside it: the layout says more.
func (a *archive) images() ([]archived, error) {
	var found []archived
	var err error
	switch {
	case a.has("oci-layout") && a.has("index.json"):
		found, err = a.layout()
	case a.has("manifest.json"):
		found, err = a.docker()
	default:
		err = fmt.Errorf("the archive has neither index.json nor manifest.json: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the archive has no image: %w", errdefs.ErrInvalidArgument)
	}
	return found, err
}

// docker reads the images of a docker save archive.
func (a *archive) docker() ([]archived, error) {
	raw, err := a.read("manifest.json")
	if err != nil {
		return nil, err
	}
	var list []dockerImage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var found []archived
	for _, d := range list {
		f, err := a.dockerOne(d)
		if err != nil {
			return nil, err
		}
		found = append(found, f)
	}
	return found, nil
}

func (a *archive) dockerOne(d dockerImage) (archived, error) {
	raw, err := a.read(d.Config)
	if err != nil {
		return archived{}, err
	}
	f, err := newArchived(raw, len(d.Layers))
	if err != nil {
		return archived{}, err
	}
	for _, tag := range d.RepoTags {
		named, err := parseReference(tag)
		if err != nil {
			return archived{}, err
		}
		f.names = append(f.names, named.String())
	}
	for _, name := range d.Layers {
		if !a.has(name) {
			return archived{}, fmt.Errorf("%s is missing in the archive: %w", name, errdefs.ErrNotFound)
		}
		f.layers = append(f.layers, func() (io.ReadCloser, error) { return a.open(name) })
	}
	return f, nil
}

func newArchived(config []byte, layers int) (archived, error) {
	c, err := parseConfig(config)
	if err != nil {
		return archived{}, err
	}
	if err := checkConfig(c, layers); err != nil {
		return archived{}, err
	}
	return archived{newImage: newImage{id: digest.FromBytes(config).String(), raw: config, config: c}}, nil
}

// layout reads the images of an OCI image layout.
func (a *archive) layout() ([]archived, error) {
	raw, err := a.read("index.json")
	if err != nil {
		return nil, err
	}
	var index document
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(index.Manifests) > 1 && !slices.ContainsFunc(index.Manifests, isNamed) {
		// One image for several platforms.
		chosen, err := index.choose()
		if err != nil {
			return nil, err
		}
		index.Manifests = []ocispec.Descriptor{chosen}
	}
	var found []archived
	for _, m := range index.Manifests {
		f, err := a.layoutOne(m)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(found, func(o archived) bool { return o.id == f.id })
		if i < 0 {
			found = append(found, f)
			continue
		}
		found[i].names = union(found[i].names, f.names)
		found[i].digests = union(found[i].digests, f.digests)
	}
	return found, nil
}

// Annotations that name an image of a layout.
const (
	annotationName = "io.containerd.image.name" // in full
	annotationRef  = ocispec.AnnotationRefName  // in full, or a tag only
)

func isNamed(d ocispec.Descriptor) bool {
	return d.Annotations[annotationName] != "" || d.Annotations[annotationRef] != ""
}

// layoutName returns what a layout calls an image, or nothing if it has a tag
// only: that leaves open of what.
func layoutName(d ocispec.Descriptor) (reference.Named, error) {
	name := d.Annotations[annotationName]
	if ref := d.Annotations[annotationRef]; name == "" && strings.ContainsAny(ref, ":/") {
		name = ref
	}
	if name == "" {
		return nil, nil
	}
	return parseReference(name)
}

// layoutOne reads the image that an entry of index.json leads to.
func (a *archive) layoutOne(top ocispec.Descriptor) (archived, error) {
	named, err := layoutName(top)
	if err != nil {
		return archived{}, err
	}
	m, err := a.resolve(top)
	if err != nil {
		return archived{}, err
	}
	raw, err := a.readBlob(*m.Config)
	if err != nil {
		return archived{}, err
	}
	f, err := newArchived(raw, len(*m.Layers))
	if err != nil {
		return archived{}, err
	}
	f.checkpoint = m.checkpointed()
	if named != nil {
		f.digests = []string{digestName(named, top.Digest)}
		if tagged, ok := named.(reference.Tagged); ok {
			f.names = []string{tagged.String()}
		}
	}
	for _, l := range *m.Layers {
		if !a.has(blobPath(l.Digest)) {
			return archived{}, fmt.Errorf("layer %s is missing in the archive: %w", l.Digest, errdefs.ErrNotFound)
		}
		f.blobs = append(f.blobs, blob{Digest: l.Digest, Size: l.Size})
		f.layers = append(f.layers, func() (io.ReadCloser, error) { return a.openBlob(l) })
	}
	return f, nil
}

// resolve follows indexes to the manifest for this machine.
func (a *archive) resolve(d ocispec.Descriptor) (document, error) {
	for range maxNested {
		raw, err := a.readBlob(d)
		if err != nil {
			return document{}, err
		}
		doc, err := parseDocument(raw, d.MediaType)
		if err != nil || !doc.isIndex() {
			return doc, err
		}
		if d, err = doc.choose(); err != nil {
			return document{}, err
		}
	}
	return document{}, fmt.Errorf("more than %d indexes in each other: %w", maxNested, errdefs.ErrInvalidArgument)
}

func (a *archive) readBlob(d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, errdefs.ErrInvalidArgument)
	}
	raw, err := a.read(blobPath(d.Digest))
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(raw); got != d.Digest {
		return nil, fmt.Errorf("blob %s has the digest %s: %w", d.Digest, got, errdefs.ErrDataLoss)
	}
	return raw, nil
}

// openBlob opens a blob whose last Read tells whether it is what d says.
func (a *archive) openBlob(d ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := a.open(blobPath(d.Digest))
	if err != nil {
		return nil, err
	}
	return &verified{ReadCloser: f, want: d.Digest, verifier: d.Digest.Verifier()}, nil
}

func blobPath(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// verified checks a blob's digest while it is read.
type verified struct {
	io.ReadCloser
	want     digest.Digest
	verifier digest.Verifier
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	v.verifier.Write(p[:n])
	if errors.Is(err, io.EOF) && !v.verifier.Verified() {
		err = fmt.Errorf("blob %s has another digest: %w", v.want, errdefs.ErrDataLoss)
	}
	return n, err
}
