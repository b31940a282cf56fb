package image

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/layer"
)

// Store holds the images.
type Store struct{ layers *layer.Store }

// Open opens the images.
func Open(c Config) (*Store, error) {
	return nil, fmt.Errorf("open images: %w", errdefs.ErrNotImplemented)
}
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (Image, error)       { panic("soon") }
func (s *Store) Get(ref string) (Image, error)                                         { panic("soon") }
func (s *Store) List() []Image                                                         { panic("soon") }
func (s *Store) Remove(ctx context.Context, ref string) error                          { panic("soon") }
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]Image, error) { panic("soon") }
func (s *Store) Acquire(id, holder string) (Image, error)                              { panic("soon") }
func (s *Store) Release(holder string)                                                 { panic("soon") }
func (s *Store) RetainOnly(live func(holder string) bool)                              { panic("soon") }
func (s *Store) FsInfo() (path string, bytes, inodes uint64, err error)                { panic("soon") }
func (s *Store) Layers() *layer.Store                                                  { return s.layers }
func (s *Store) Close(ctx context.Context) error                                       { return nil }
