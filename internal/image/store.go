package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/flight"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/registry"
)

// Store holds the images under one root:
//
//	HEX/config    an image's configuration, byte for byte: its SHA-256 is HEX
//	HEX/record    its names and where it came from
//	tmp/          images being written or removed, archives being loaded
//
// Every layer in the layer store belongs to an image, or to a pull or load that
// is under way. Reads come from a view in memory and wait for nothing.
type Store struct {
	root   string
	log    *slog.Logger
	layers *layer.Store
	client *registry.Client
	pinned globs
	slots  chan struct{} // one for each layer that may be unpacked at a time, by all pulls
	pulls  flight.Group[pullKey, Image]

	figures *Figures

	view atomic.Pointer[view]

	mu      sync.Mutex // guards what follows, and the records on disk
	images  map[string]*entry
	torn    map[string]*entry          // images that lack a layer, see Mend
	holders map[string]map[string]bool // holder → ids
	leases  map[digest.Digest]int      // layers of pulls and loads under way
	seq     uint64                     // of the last name given
}

// view is what Get and List see. It is replaced, never changed.
type view struct {
	byID   map[string]Image
	byName map[string]string // tag or digest reference → id
	list   []Image
}

// Open opens the images, making the directories if there are none. Images whose
// layers did not survive an unclean end of an earlier boot are dropped, so that
// they are pulled again.
func Open(c Config) (*Store, error) {
	logger := c.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	pinned, err := compileGlobs(c.Pinned)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(c.Root, "tmp"), 0o700); err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	layers, err := layer.Open(layer.Config{Root: c.LayerRoot, Logger: logger})
	if err != nil {
		return nil, err
	}
	s := &Store{
		root:    c.Root,
		log:     logger,
		layers:  layers,
		client:  registry.New(c.Registry),
		pinned:  pinned,
		figures: c.Figures,
		slots:   make(chan struct{}, 3*layersAtOnce()),
		images:  make(map[string]*entry),
		torn:    make(map[string]*entry),
		holders: make(map[string]map[string]bool),
		leases:  make(map[digest.Digest]int),
	}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	return s, nil
}

// layersAtOnce is how many layers one pull unpacks at a time. All pulls together
// unpack some more, so that one that has to wait for its registry does not hold
// up the others, but not so many that their buffers would add up.
func layersAtOnce() int { return min(max(4, runtime.NumCPU()), 8) }

// Close waits until what was removed is gone, or ctx ends.
func (s *Store) Close(ctx context.Context) error { return s.layers.Close(ctx) }

// Layers returns the store of layers, for mounting them.
func (s *Store) Layers() *layer.Store { return s.layers }

// Get returns the image that ref stands for: a reference, an id with or without
// its algorithm, or the start of an id that no other image shares.
func (s *Store) Get(ref string) (Image, error) {
	v := s.view.Load()
	digits, isID := idPrefix(ref)
	if img, ok := v.byID["sha256:"+digits]; isID && ok {
		return img, nil
	}
	named, err := parseReference(ref)
	if err == nil {
		if id, ok := v.byName[named.String()]; ok {
			return v.byID[id], nil
		}
	}
	if isID {
		return v.byPrefix(ref, digits)
	}
	if err != nil {
		return Image{}, err
	}
	return Image{}, fmt.Errorf("image %s: %w", named, errdefs.ErrNotFound)
}

func (v *view) byPrefix(ref, digits string) (Image, error) {
	var found []Image
	for _, img := range v.list {
		if strings.HasPrefix(img.ID, "sha256:"+digits) {
			found = append(found, img)
		}
	}
	switch len(found) {
	case 0:
		return Image{}, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return Image{}, fmt.Errorf("image %s: %d ids start like this: %w", ref, len(found), errdefs.ErrInvalidArgument)
}

// List returns all images, ordered by id.
func (s *Store) List() []Image { return s.view.Load().list }

// FsInfo returns where images take their space, and how much: each layer counts
// once, however many images have it.
func (s *Store) FsInfo() (path string, bytes, inodes uint64, err error) {
	for _, l := range s.layers.List() {
		bytes += l.Bytes
		inodes += l.Inodes
	}
	return s.layers.Root(), bytes, inodes, nil
}

// Acquire keeps the image called id from going away while holder needs it.
// Acquiring again is no error. An image that was removed but still has a holder
// can be acquired by its id.
func (s *Store) Acquire(id, holder string) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.images[id]
	if !ok {
		return Image{}, fmt.Errorf("image %s: %w", id, errdefs.ErrNotFound)
	}
	if s.holders[holder] == nil {
		s.holders[holder] = make(map[string]bool)
	}
	s.holders[holder][id] = true
	return s.snapshot(e), nil
}

// Release ends all that holder has acquired.
func (s *Store) Release(holder string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.holders, holder)
	s.dropReleased()
}

// RetainOnly releases every holder that live does not know. It is to be called
// once all holders of an earlier run have acquired their images again: until
// then, removed images are kept for them.
func (s *Store) RetainOnly(live func(holder string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.holders, func(holder string, _ map[string]bool) bool { return !live(holder) })
	s.dropReleased()
}

// Remove takes an image away, with all its names, by any of them. Its space is
// free when the last holder has released it. An image that does not exist is no
// error.
func (s *Store) Remove(ctx context.Context, ref string) error {
	img, err := s.Get(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.images[img.ID]
	if !ok {
		return nil
	}
	if err := s.remove(e); err != nil {
		return fmt.Errorf("remove image %s: %w", img.ID, err)
	}
	return nil
}

// remove drops an image, or only hides it if it is held. The caller holds s.mu.
func (s *Store) remove(e *entry) error {
	if !s.held(e.ID) {
		return s.drop(e)
	}
	hidden := e.record
	hidden.Names, hidden.Digests, hidden.Removed = nil, nil, true
	if err := s.write(hidden); err != nil {
		return err
	}
	e.record = hidden
	s.refresh()
	return nil
}

// drop removes an image from the table and from disk, and its layers if nobody
// else needs them. The caller holds s.mu.
func (s *Store) drop(e *entry) error {
	grave, err := os.MkdirTemp(s.path("tmp"), "removed-")
	if err != nil {
		return err
	}
	if err := os.Rename(s.path(e.hex()), filepath.Join(grave, "image")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, os.Remove(grave))
	}
	fault.Point("image.discarded")
	delete(s.images, e.ID)
	s.refresh()
	return errors.Join(os.RemoveAll(grave), s.dropLayers(e.layers()))
}

// dropReleased drops the removed images that nobody holds any more. The caller
// holds s.mu.
func (s *Store) dropReleased() {
	for _, e := range slices.Collect(maps.Values(s.images)) {
		if e.Removed && !s.held(e.ID) {
			if err := s.drop(e); err != nil {
				s.log.Warn("removed image stays until the next start", "op", "remove image", "image", e.ID, "err", err)
			}
		}
	}
}

func (s *Store) held(id string) bool {
	for _, ids := range s.holders {
		if ids[id] {
			return true
		}
	}
	return false
}

// dropLayers removes those of the given layers that no image and no pull needs.
// The caller holds s.mu.
func (s *Store) dropLayers(ids []digest.Digest) error {
	needed := make(map[digest.Digest]bool)
	for _, images := range []map[string]*entry{s.images, s.torn} {
		for _, e := range images {
			for _, id := range e.layers() {
				needed[id] = true
			}
		}
	}
	var errs []error
	for _, id := range ids {
		if !needed[id] && s.leases[id] == 0 {
			errs = append(errs, s.layers.Remove(id))
		}
	}
	return errors.Join(errs...)
}

// lease keeps layers, existing or yet to come, until the returned function is
// called; then those that belong to no image go.
func (s *Store) lease(ids []digest.Digest) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.leases[id]++
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, id := range ids {
			if s.leases[id]--; s.leases[id] == 0 {
				delete(s.leases, id)
			}
		}
		if err := s.dropLayers(ids); err != nil {
			s.log.Warn("layers of no image stay until the next start", "op", "remove layers", "err", err)
		}
	}
}

// install makes an image known under the given names, taking them from the image
// that had them. Its layers are there, and leased.
func (s *Store) install(n newImage) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, known := s.images[n.id]
	if !known {
		e, known = s.torn[n.id]
	}
	if !known {
		e = &entry{record: record{ID: n.id}, config: n.config}
	}
	next := e.record
	next.Removed = false
	next.Blobs, next.Checkpoint = n.blobs, n.checkpoint
	next.Digests = union(next.Digests, n.digests)
	next.Names = slices.Clone(next.Names)
	for _, name := range n.names {
		s.seq++
		next.Names = append(slices.DeleteFunc(next.Names, func(o owned) bool { return o.Name == name }), owned{name, s.seq})
	}
	if err := s.store(next, n.raw, known); err != nil {
		return Image{}, fmt.Errorf("record image %s: %w", n.id, noSpace(err))
	}
	e.record = next
	s.images[n.id] = e
	delete(s.torn, n.id)
	fault.Point("image.installed")
	s.disown(e, n.names)
	s.refresh()
	return s.snapshot(e), nil
}

// disown takes names from all images but e. Should that not reach the disk, the
// higher number of e's claim decides at the next start.
func (s *Store) disown(e *entry, names []string) {
	for _, other := range s.images {
		if other == e || !other.owns(names) {
			continue
		}
		other.Names = slices.DeleteFunc(slices.Clone(other.Names), func(o owned) bool { return slices.Contains(names, o.Name) })
		if err := s.write(other.record); err != nil {
			s.log.Warn("image keeps a name on disk that it has lost", "op", "name image", "image", other.ID, "err", err)
		}
	}
}

// refresh replaces the view. The caller holds s.mu.
func (s *Store) refresh() {
	v := &view{byID: make(map[string]Image), byName: make(map[string]string)}
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		e := s.images[id]
		if e.Removed {
			continue
		}
		img := s.snapshot(e)
		v.byID[id] = img
		v.list = append(v.list, img)
		for _, name := range img.RepoTags {
			v.byName[name] = id
		}
		for _, name := range img.RepoDigests {
			v.byName[name] = id
		}
	}
	s.view.Store(v)
}

// snapshot describes an image as it is now. The caller holds s.mu.
func (s *Store) snapshot(e *entry) Image {
	img := Image{
		ID:          e.ID,
		RepoDigests: e.Digests,
		Layers:      e.layers(),
		Config:      e.config,
		User:        e.config.Config.User,
		Checkpoint:  e.Checkpoint,
	}
	for _, o := range e.Names {
		img.RepoTags = append(img.RepoTags, o.Name)
	}
	img.Pinned = s.pinned.match(img.RepoTags, img.RepoDigests)
	seen := make(map[digest.Digest]bool)
	for _, id := range img.Layers {
		if l, err := s.layers.Get(id); err == nil && !seen[id] {
			img.Size += l.Bytes
			seen[id] = true
		}
	}
	return img
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// union returns a with those of b that it lacks.
func union(a, b []string) []string {
	a = slices.Clone(a)
	for _, x := range b {
		if !slices.Contains(a, x) {
			a = append(a, x)
		}
	}
	return a
}

// noSpace classifies an error of a full disk.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}
