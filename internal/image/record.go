package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/state"
)

// recordKind is what is written beside an image's configuration.
var recordKind = state.Kind{Name: "image", Version: 1}

type record struct {
	ID      string   `json:"id"`
	Names   []owned  `json:"names,omitempty"`   // tags
	Digests []string `json:"digests,omitempty"` // repository@digest of manifests and indexes
	Blobs   []blob   `json:"blobs,omitempty"`   // its layers as they were fetched, bottom first
	// Checkpoint is the name of the container that the image is a checkpoint of.
	Checkpoint string `json:"checkpoint,omitempty"`
	// Removed says that the image is gone for everybody but its holders.
	Removed bool `json:"removed,omitempty"`
}

// owned is a name that points to an image. When two images claim a name, the
// higher number has it.
type owned struct {
	Name string `json:"name"`
	Seq  uint64 `json:"seq"`
}

// blob is a layer's archive.
type blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// entry is an image in the Store's table.
type entry struct {
	record
	config ocispec.Image
}

// newImage is what install records.
type newImage struct {
	id      string
	raw     []byte // of the configuration
	config  ocispec.Image
	names   []string
	digests []string
	blobs   []blob

	checkpoint string // see record
}

func (r record) hex() string { return strings.TrimPrefix(r.ID, "sha256:") }

func (e *entry) layers() []digest.Digest { return e.config.RootFS.DiffIDs }

func (e *entry) owns(names []string) bool {
	return slices.ContainsFunc(e.Names, func(o owned) bool { return slices.Contains(names, o.Name) })
}

// write replaces the record of an image that is on disk.
func (s *Store) write(r record) error {
	return state.Write(s.path(r.hex(), "record"), recordKind, r, state.Volatile)
}

// store writes an image: its record only, if it is on disk already.
func (s *Store) store(r record, config []byte, known bool) error {
	if known {
		return s.write(r)
	}
	tmp, err := os.MkdirTemp(s.path("tmp"), "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.WriteFile(filepath.Join(tmp, "config"), config, 0o600); err != nil {
		return err
	}
	if err := state.Write(filepath.Join(tmp, "record"), recordKind, r, state.Volatile); err != nil {
		return err
	}
	fault.Point("image.written")
	place := s.path(r.hex())
	if err := os.RemoveAll(place); err != nil { // of no image in the table
		return err
	}
	fault.Point("image.place-free")
	return os.Rename(tmp, place)
}

// load fills the table from disk and removes what belongs to no image.
func (s *Store) load() error {
	if err := removeContent(s.path("tmp")); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, f := range entries {
		if f.Name() == "tmp" {
			continue
		}
		e, err := s.loadOne(f.Name())
		if errors.Is(err, state.ErrVersion) {
			return err // a newer Sampan was here; its images are not ours to remove
		}
		if e != nil && err != nil && len(e.Digests) > 0 {
			s.log.Warn("image lacks a layer, which is fetched again", "op", "open images", "image", e.ID, "err", err)
			s.torn[e.ID] = e
			continue
		}
		if err != nil {
			s.log.Warn("image is dropped; it has to be pulled again", "op", "open images", "image", f.Name(), "err", err)
			if err := os.RemoveAll(s.path(f.Name())); err != nil {
				return err
			}
			continue
		}
		s.images[e.ID] = e
	}
	s.settleNames()
	var stored []digest.Digest
	for _, l := range s.layers.List() {
		stored = append(stored, l.DiffID)
	}
	if err := s.dropLayers(stored); err != nil {
		return err
	}
	s.refresh()
	return nil
}

// loadOne reads an image and checks that all of it is there. If nothing but layers
// is missing, it returns the image with the error.
func (s *Store) loadOne(hex string) (*entry, error) {
	var r record
	if err := state.Read(s.path(hex, "record"), recordKind, &r); err != nil {
		return nil, err
	}
	if r.hex() != hex {
		return nil, fmt.Errorf("its record is about %q", r.ID)
	}
	raw, err := os.ReadFile(s.path(hex, "config"))
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(raw); got.String() != r.ID {
		return nil, fmt.Errorf("its configuration has the digest %s", got)
	}
	config, err := parseConfig(raw)
	if err != nil {
		return nil, err
	}
	if err := state.SweepTemporary(s.path(hex)); err != nil {
		return nil, err
	}
	e := &entry{record: r, config: config}
	for _, id := range config.RootFS.DiffIDs {
		if _, err := s.layers.Get(id); err != nil {
			return e, err
		}
	}
	return e, nil
}

// settleNames gives each name to the image with the newest claim to it.
func (s *Store) settleNames() {
	newest := make(map[string]uint64)
	for _, e := range s.images {
		for _, o := range e.Names {
			newest[o.Name] = max(newest[o.Name], o.Seq)
			s.seq = max(s.seq, o.Seq)
		}
	}
	for _, e := range s.images {
		e.Names = slices.DeleteFunc(e.Names, func(o owned) bool { return o.Seq < newest[o.Name] })
	}
}

// removeContent empties a directory.
func removeContent(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
