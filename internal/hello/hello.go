// Package hello owns the first image: a web server of ours and nothing else,
// made into an archive on the spot, so that a first pod needs no registry. It
// must not talk to anybody.
package hello

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Reference is the image's name.
const Reference = "sampan.dev/hello:latest"

// Port is where the web server of the image listens.
const Port = 80

// made is the time of everything in the image, so that the same program gives
// the same image.
var made = time.Unix(0, 0).UTC()

// WriteArchive writes the image with the given web server, a static binary, as
// an OCI layout in a tar archive.
func WriteArchive(w io.Writer, program []byte) error {
	layer, err := archive(
		entry{name: "etc/", mode: 0o755},
		entry{name: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0:root:/:/sbin/nologin\nhello:x:1000:1000:hello:/:/sbin/nologin\n")},
		entry{name: "etc/group", mode: 0o644, content: []byte("root:x:0:\nhello:x:1000:\n")},
		entry{name: "hello", mode: 0o755, content: program},
	)
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	config, err := json.Marshal(ocispec.Image{
		Created:  &made,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: ocispec.ImageConfig{
			Entrypoint:   []string{"/hello"},
			ExposedPorts: map[string]struct{}{fmt.Sprintf("%d/tcp", Port): {}},
			WorkingDir:   "/",
		},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		History: []ocispec.History{{Created: &made, CreatedBy: "sampan image load --builtin"}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    describe(ocispec.MediaTypeImageConfig, config),
		Layers:    []ocispec.Descriptor{describe(ocispec.MediaTypeImageLayer, layer)},
	})
	if err != nil {
		return err
	}
	named := describe(ocispec.MediaTypeImageManifest, manifest)
	named.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	named.Annotations = map[string]string{
		ocispec.AnnotationRefName:  Reference,
		"io.containerd.image.name": Reference, // what others read
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{named},
	})
	if err != nil {
		return err
	}
	whole, err := archive(
		entry{name: ocispec.ImageLayoutFile, mode: 0o644, content: []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)},
		entry{name: ocispec.ImageIndexFile, mode: 0o644, content: index},
		entry{name: "blobs/", mode: 0o755},
		entry{name: "blobs/sha256/", mode: 0o755},
		blob(manifest), blob(config), blob(layer),
	)
	if err != nil {
		return err
	}
	_, err = w.Write(whole)
	return err
}

func describe(mediaType string, content []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

func blob(content []byte) entry {
	return entry{name: "blobs/sha256/" + digest.FromBytes(content).Encoded(), mode: 0o644, content: content}
}

// entry is a file, or with a name that ends in a slash a directory.
type entry struct {
	name    string
	mode    int64
	content []byte
}

func archive(entries ...entry) ([]byte, error) {
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), ModTime: made, Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.content); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return buffer.Bytes(), err
}
