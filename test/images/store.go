package images

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types; the documents have the same shape as OCI's.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// store is a set of images on disk: dir/sha256/<hex> has the layers and
// configs, dir/manifests.json the manifests and what names them.
type store struct {
	dir       string
	manifests []manifest
	packed    map[string][]byte
}

// manifest is one manifest or index with the names it is served under.
type manifest struct {
	MediaType string
	Body      []byte
	Names     []string // repository:tag, or a bare repository
}

func (s *store) blob(mediaType string, data []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	path := filepath.Join(s.dir, "sha256", d.Digest.Encoded())
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return d, err
	}
	return d, os.WriteFile(path, data, 0o644)
}

func (s *store) save() error {
	data, err := json.Marshal(s.manifests)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.dir, "manifests.json"), data, 0o644)
}

func (s *store) load() error {
	data, err := os.ReadFile(filepath.Join(s.dir, "manifests.json"))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, &s.manifests)
}

// name adds a manifest. Each name is a repository with a tag, or without one for
// a manifest that only an index names, by its digest.
func (s *store) name(mediaType string, document any, names ...string) (ocispec.Descriptor, error) {
	body, err := json.Marshal(document)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	s.manifests = append(s.manifests, manifest{MediaType: mediaType, Body: body, Names: names})
	return d, nil
}

// form is how an image is written down: whose media types, how its layers are
// compressed, and whether there is an index above it.
type form struct {
	docker bool
	layers string // "gzip", "zstd" or "" for plain
	index  string // "" none, "flat", "nested"
}

// image is an image before it has a form.
type image struct {
	layers [][]byte // tar archives, bottom first
	config ocispec.ImageConfig
}

// put writes an image in a form, with its repository:tag names.
func (s *store) put(img image, f form, names ...string) error {
	if f.index == "" {
		_, err := s.putManifest(img, f, "amd64", names...)
		return err
	}
	// What a build tool pushes: a manifest for each platform, and one that is no
	// image at all (a build attestation) and that a client must pass over.
	var entries []ocispec.Descriptor
	repositories := make([]string, len(names))
	for i, n := range names {
		repositories[i] = repository(n)
	}
	for _, arch := range []string{"arm64", "amd64"} {
		d, err := s.putManifest(img, f, arch, repositories...)
		if err != nil {
			return err
		}
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		if arch == "arm64" {
			d.Platform.Variant = "v8"
		}
		entries = append(entries, d)
	}
	mediaType := ocispec.MediaTypeImageIndex
	if f.docker {
		mediaType = dockerList
	} else {
		attestation, err := s.putAttestation(repositories)
		if err != nil {
			return err
		}
		entries = append([]ocispec.Descriptor{attestation}, entries...)
	}
	if f.index == "nested" {
		inner, err := s.name(mediaType, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Manifests: entries}, repositories...)
		if err != nil {
			return err
		}
		entries = []ocispec.Descriptor{inner}
	}
	_, err := s.name(mediaType, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Manifests: entries}, names...)
	return err
}

func (s *store) putManifest(img image, f form, arch string, names ...string) (ocispec.Descriptor, error) {
	types := [3]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayer}
	switch {
	case f.docker:
		types = [3]string{dockerManifest, dockerConfig, dockerLayer}
	case f.layers == "gzip":
		types[2] = ocispec.MediaTypeImageLayerGzip
	case f.layers == "zstd":
		types[2] = ocispec.MediaTypeImageLayerZstd
	}
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		Created:  &epoch,
		Config:   img.config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	doc := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: types[0]}
	for _, layer := range img.layers {
		packed, err := s.compress(layer, f.layers)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		d, err := s.blob(types[2], packed)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		doc.Layers = append(doc.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer))
		config.History = append(config.History, ocispec.History{Created: &epoch, CreatedBy: "sampan test images"})
	}
	body, err := json.Marshal(config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if doc.Config, err = s.blob(types[1], body); err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.name(types[0], doc, names...)
}

func (s *store) putAttestation(repositories []string) (ocispec.Descriptor, error) {
	statement := []byte(`{"_type":"https://in-toto.io/Statement/v0.1","subject":[]}`)
	layer, err := s.blob("application/vnd.in-toto+json", statement)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := s.blob(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"unknown","os":"unknown","config":{},"rootfs":{"type":"layers","diff_ids":["`+layer.Digest.String()+`"]}}`))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := s.name(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{layer},
	}, repositories...)
	d.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	d.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	return d, err
}

// compress packs a layer. Images share layers: pack each once.
func (s *store) compress(layer []byte, how string) ([]byte, error) {
	if how == "" {
		return layer, nil
	}
	key := how + " " + digest.FromBytes(layer).String()
	if packed, ok := s.packed[key]; ok {
		return packed, nil
	}
	var out bytes.Buffer
	var w io.WriteCloser
	switch how {
	case "gzip":
		w = gzip.NewWriter(&out)
	case "zstd":
		z, err := zstd.NewWriter(&out)
		if err != nil {
			return nil, err
		}
		w = z
	default:
		return nil, fmt.Errorf("no such compression: %s", how)
	}
	if _, err := w.Write(layer); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if s.packed == nil {
		s.packed = map[string][]byte{}
	}
	s.packed[key] = out.Bytes()
	return out.Bytes(), nil
}
