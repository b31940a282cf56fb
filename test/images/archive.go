package images

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// WriteLayout writes the image of dir that has a name as an OCI layout in a tar
// archive, and returns the digest of its config.
func WriteLayout(w io.Writer, dir, name string) (digest.Digest, error) {
	s := &store{dir: dir}
	m, doc, err := s.image(name)
	if err != nil {
		return "", err
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{MediaType: m.MediaType, Digest: digest.FromBytes(m.Body), Size: int64(len(m.Body))}},
	}
	files := []archived{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{"blobs/sha256/" + digest.FromBytes(m.Body).Encoded(), m.Body},
	}
	for _, d := range append([]ocispec.Descriptor{doc.Config}, doc.Layers...) {
		data, err := s.read(d)
		if err != nil {
			return "", err
		}
		files = append(files, archived{"blobs/sha256/" + d.Digest.Encoded(), data})
	}
	text, err := json.Marshal(index)
	if err != nil {
		return "", err
	}
	return doc.Config.Digest, writeArchive(w, append(files, archived{"index.json", text}))
}

// WriteDocker writes the image of dir that has a name as `docker save` did
// before it knew OCI, tagged with tag.
func WriteDocker(w io.Writer, dir, name, tag string) (digest.Digest, error) {
	s := &store{dir: dir}
	_, doc, err := s.image(name)
	if err != nil {
		return "", err
	}
	config, err := s.read(doc.Config)
	if err != nil {
		return "", err
	}
	var list struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	list.Config, list.RepoTags = doc.Config.Digest.Encoded()+".json", []string{tag}
	files := []archived{{list.Config, config}}
	for _, d := range doc.Layers {
		data, err := s.read(d)
		if err != nil {
			return "", err
		}
		list.Layers = append(list.Layers, d.Digest.Encoded()+"/layer.tar")
		files = append(files, archived{d.Digest.Encoded() + "/layer.tar", data})
	}
	text, err := json.Marshal([]any{list})
	if err != nil {
		return "", err
	}
	return doc.Config.Digest, writeArchive(w, append(files, archived{"manifest.json", text}))
}

// image finds a manifest that is no index.
func (s *store) image(name string) (manifest, ocispec.Manifest, error) {
	if err := s.load(); err != nil {
		return manifest{}, ocispec.Manifest{}, err
	}
	at := slices.IndexFunc(s.manifests, func(m manifest) bool { return slices.Contains(m.Names, name) })
	if at < 0 {
		return manifest{}, ocispec.Manifest{}, fmt.Errorf("image %s: not among the test images", name)
	}
	var doc ocispec.Manifest
	err := json.Unmarshal(s.manifests[at].Body, &doc)
	return s.manifests[at], doc, err
}

func (s *store) read(d ocispec.Descriptor) ([]byte, error) {
	return os.ReadFile(filepath.Join(s.dir, "sha256", d.Digest.Encoded()))
}

type archived struct {
	name string
	data []byte
}

func writeArchive(w io.Writer, files []archived) error {
	out := tar.NewWriter(w)
	for _, f := range files {
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.data)), ModTime: epoch}); err != nil {
			return err
		}
		if _, err := out.Write(f.data); err != nil {
			return err
		}
	}
	return out.Close()
}
