package image

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
)

// Mend fetches again what images lack that have lost a layer: only that, since
// their other layers are there. Until then they do not show. An image that no
// registry has any more is dropped. One that cannot be fetched without credentials
// or network waits, with its layers, for a pull by somebody who has them, or the
// next start.
func (s *Store) Mend(ctx context.Context) {
	s.mu.Lock()
	torn := slices.Collect(maps.Values(s.torn))
	s.mu.Unlock()
	for _, e := range torn {
		err := s.mend(ctx, e)
		switch {
		case err == nil:
			s.log.Info("image is whole again", "op", "mend image", "image", e.ID)
		case errdefs.IsNotFound(err):
			s.log.Warn("image is dropped; it has to be pulled again", "op", "mend image", "image", e.ID, "err", err)
			s.dropTorn(e)
		default:
			s.log.Warn("image lacks a layer, and has to be pulled again", "op", "mend image", "image", e.ID, "err", err)
		}
	}
}

// mend pulls an image by the digests it is known by.
func (s *Store) mend(ctx context.Context, e *entry) error {
	err := fmt.Errorf("it has no name: %w", errdefs.ErrNotFound)
	for _, name := range e.Digests {
		s.mu.Lock()
		torn := s.torn[e.ID] == e
		s.mu.Unlock()
		if !torn {
			return nil // somebody has pulled it
		}
		if _, err = s.Pull(ctx, name, nil); err == nil {
			return nil
		}
	}
	return err
}

func (s *Store) dropTorn(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.torn[e.ID] != e {
		return // somebody has pulled it
	}
	delete(s.torn, e.ID)
	if err := s.drop(e); err != nil {
		s.log.Warn("torn image stays until the next start", "op", "mend image", "image", e.ID, "err", err)
	}
}
