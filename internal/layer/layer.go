// Package layer keeps committed layers, the read-only parts of images, and
// mounts root file systems on top of them.
//
// A layer is known by its diff id, the digest of its uncompressed tar stream. It
// is unpacked once, into a directory of its own that does not depend on the
// layers below it: what a layer deletes is kept in the form overlayfs
// understands. A layer is visible to others only when it is complete and its
// digest is verified.
//
// The package knows nothing of registries, of image references and of the CRI,
// and does not decide when a layer may go: its owner, package image, does.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/flight"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/state"
)

// Info describes a committed layer.
type Info struct {
	DiffID digest.Digest
	Bytes  uint64 // of file content
	Inodes uint64
	Synced bool // known to be on disk
}

// Config says where layers live.
type Config struct {
	Root   string // a directory of the Store's own
	Logger *slog.Logger
}

// Store holds the layers under one root:
//
//	tree/NAME     the layer's files
//	record/NAME   what it is; written last, so a tree without one is garbage
//	tmp/          trees being unpacked or removed
//	empty/        directories with nothing in them, for overlayfs
//	places/       what every container has something mounted on; see MountSpec.Places
//
// NAME is the start of the hexadecimal diff id; see nameLength.
type Store struct {
	root   string
	log    *slog.Logger
	flight flight.Group[digest.Digest, Info]
	mounts mounter
	graves atomic.Bool // files of layers that are none any more are mounted somewhere

	placing sync.Mutex // held while a layer's files and record change on disk
	mu      sync.Mutex // guards layers; taken after placing
	layers  map[digest.Digest]record

	syncing    sync.Mutex     // held by the one Sync at work
	background sync.WaitGroup // removals and syncs
}

// recordKind is the record of one layer. Boot says in which boot the tree was
// written, and Synced whether it has reached the disk: a tree that was not
// synced in an earlier boot may be torn.
var recordKind = state.Kind{Name: "layer", Version: 1}

type record struct {
	DiffID digest.Digest `json:"diffID"`
	Bytes  uint64        `json:"bytes"`
	Inodes uint64        `json:"inodes"`
	Sum    string        `json:"sum,omitempty"` // of the files' content, see contentSum; older builds wrote none
	Boot   string        `json:"boot"`
	Synced bool          `json:"synced"`
	// OpaqueRoot says that nothing of the layers below is to be seen.
	OpaqueRoot bool `json:"opaqueRoot,omitempty"`
	// Implicit lists directories that the layer's archive puts files into
	// without saying what the directories themselves are like.
	Implicit []string `json:"implicit,omitempty"`
}

// Open opens the layers under root, making it if there is none. What a killed
// process left unfinished is removed, and so are layers that an unclean end of
// an earlier boot may have torn.
func Open(c Config) (*Store, error) {
	s := &Store{root: c.Root, log: c.Logger, layers: make(map[digest.Digest]record)}
	s.flight.Linger = true
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	for _, dir := range []string{"tree", "record", "tmp", "empty/0", "empty/1", "places/dev", "places/etc", "places/proc", "places/sys"} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			return nil, fmt.Errorf("open layers: %w", err)
		}
	}
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		f, err := os.OpenFile(s.path("places/etc/"+name), os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open layers: %w", err)
		}
		f.Close()
	}
	// Layers have set-user-id programs that no user of this machine may reach.
	// Overlayfs does: it looks into them with the rights of who mounted it.
	if err := os.Chmod(s.root, 0o700); err != nil {
		return nil, fmt.Errorf("open layers: %w", err)
	}
	host.Spread(s.path("tmp"))
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("open layers: %w", err)
	}
	return s, nil
}

// Get returns the layer called diffID.
func (s *Store) Get(diffID digest.Digest) (Info, error) {
	r, err := s.get(diffID)
	return r.info(), err
}

func (s *Store) get(diffID digest.Digest) (record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.layers[diffID]
	if !ok {
		return record{}, fmt.Errorf("layer %s: %w", diffID, errdefs.ErrNotFound)
	}
	return r, nil
}

// List returns all committed layers, in no order.
func (s *Store) List() []Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Info, 0, len(s.layers))
	for _, r := range s.layers {
		list = append(list, r.info())
	}
	return list
}

// Root returns the directory that everything is in.
func (s *Store) Root() string { return s.root }

// Path returns the directory that holds a committed layer's files. Nobody may
// write there.
func (s *Store) Path(diffID digest.Digest) string { return s.path("tree", name(diffID)) }

// Remove takes a layer away. Its name is free at once; its files go in the
// background. A layer that is absent is no error. Nothing may be mounted on it.
func (s *Store) Remove(diffID digest.Digest) error {
	s.placing.Lock()
	defer s.placing.Unlock()
	s.mu.Lock()
	_, known := s.layers[diffID]
	delete(s.layers, diffID)
	s.mu.Unlock()
	if !known {
		return nil
	}
	if err := state.Remove(s.recordPath(diffID)); err != nil {
		return fmt.Errorf("remove layer %s: %w", diffID, err)
	}
	fault.Point("layer.record-removed")
	if err := s.discard(s.Path(diffID)); err != nil {
		return fmt.Errorf("remove layer %s: %w", diffID, err)
	}
	return nil
}

// Close waits until removals and syncs under way are done or ctx ends. What is not
// removed by then is removed by the next Open.
func (s *Store) Close(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.background.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// load fills the table from the records and sweeps everything else.
func (s *Store) load() error {
	leftovers, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return err
	}
	used, err := usedNames()
	if err != nil {
		return err
	}
	for _, e := range leftovers {
		if !isGrave(e.Name()) || !used(e.Name()) {
			s.removeInBackground(s.path("tmp", e.Name()))
		} else {
			s.graves.Store(true)
		}
	}
	if err := state.SweepTemporary(s.path("record")); err != nil {
		return err
	}
	records, err := os.ReadDir(s.path("record"))
	if err != nil {
		return err
	}
	named := make(map[string]bool, len(records))
	for _, e := range records {
		r, err := s.loadOne(e.Name())
		if errors.Is(err, state.ErrVersion) {
			return err // a newer Sampan was here; its layers are not ours to remove
		}
		if err != nil {
			s.log.Warn("layer is dropped", "op", "open layers", "layer", e.Name(), "err", err)
			if err := state.Remove(s.path("record", e.Name())); err != nil {
				return err
			}
			continue
		}
		named[e.Name()] = true
		s.layers[r.DiffID] = r
	}
	trees, err := os.ReadDir(s.path("tree"))
	if err != nil {
		return err
	}
	for _, e := range trees {
		if !named[e.Name()] && !used(e.Name()) {
			if err := s.discard(s.path("tree", e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// loadOne reads one record and decides whether its tree can be trusted.
func (s *Store) loadOne(file string) (record, error) {
	var r record
	if err := state.Read(s.path("record", file), recordKind, &r); err != nil {
		return record{}, err
	}
	if err := r.DiffID.Validate(); err != nil || name(r.DiffID) != file {
		return record{}, fmt.Errorf("its record is about %q", r.DiffID)
	}
	if _, err := os.Lstat(s.path("tree", file)); err != nil {
		return record{}, err
	}
	if !r.Synced && r.Boot != host.BootID() {
		return record{}, errors.New("the machine went down before its files were on disk")
	}
	return r, nil
}

func (r record) info() Info {
	return Info{DiffID: r.DiffID, Bytes: r.Bytes, Inodes: r.Inodes, Synced: r.Synced}
}

// discard renames dir out of sight and removes it in the background.
func (s *Store) discard(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	grave, err := os.MkdirTemp(s.path("tmp"), gravePrefix+filepath.Base(dir)+"-")
	if err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(grave, "tree")); err != nil {
		return errors.Join(err, os.Remove(grave))
	}
	fault.Point("layer.discarded")
	used, err := usedNames()
	if err == nil && used(filepath.Base(dir)) {
		s.graves.Store(true)
		s.log.Warn("files of a layer stay until no container has them mounted", "op", "remove layer", "layer", filepath.Base(dir))
		return nil
	}
	s.removeInBackground(grave)
	return nil
}

// gravePrefix begins the names of directories in tmp with the files of layers that
// are none any more; then comes the layer's name.
const gravePrefix = "removed-"

// usedNames tells of layers' names, and of their graves', whether their files are
// part of a root file system that is mounted now.
func usedNames() (func(name string) bool, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var options strings.Builder
	for _, m := range mounts {
		options.WriteString(m.VFSOptions)
	}
	return func(name string) bool {
		name = strings.TrimPrefix(name, gravePrefix)
		return len(name) >= nameLength && strings.Contains(options.String(), name[:nameLength])
	}, nil
}

func isGrave(name string) bool { return strings.HasPrefix(name, gravePrefix) }

// sweepGraves removes what nothing that is mounted needs any more.
func (s *Store) sweepGraves() error {
	used, err := usedNames()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(s.path("tmp"))
	left := false
	for _, e := range entries {
		if !isGrave(e.Name()) {
			continue
		}
		if used(e.Name()) {
			left = true
			continue
		}
		s.removeInBackground(s.path("tmp", e.Name()))
	}
	s.graves.Store(left)
	return err
}

func (s *Store) removeInBackground(dir string) {
	s.background.Go(func() {
		if err := os.RemoveAll(dir); err != nil {
			s.log.Warn("files of a removed layer stay until the next start", "op", "remove layer", "err", err)
		}
	})
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

func (s *Store) recordPath(diffID digest.Digest) string { return s.path("record", name(diffID)) }

// nameLength keeps the names of 128 layers and the mount options around them
// within the one page that mount(2) takes, and is still 96 bits of the digest.
const nameLength = 24

// name returns what a layer's files are called on disk.
func name(diffID digest.Digest) string { return diffID.Encoded()[:nameLength] }
