package image

import (
	"context"
	"fmt"
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
	var all []torn
	for id, e := range s.torn {
		all = append(all, torn{e, id, slices.Clone(e.Digests)})
	}
	s.mu.Unlock()
	for _, t := range all {
		err := s.mend(ctx, t)
		switch {
		case err == nil:
			s.log.Info("image is whole again", "op", "mend image", "image", t.id)
		case errdefs.IsNotFound(err):
			s.log.Warn("image is dropped; it has to be pulled again", "op", "mend image", "image", t.id, "err", err)
			s.dropTorn(t)
		default:
			s.log.Warn("image lacks a layer, and has to be pulled again", "op", "mend image", "image", t.id, "err", err)
		}
	}
}

// torn is an image that lacks a layer, with what it is known by. A pull changes the
// entry at any time.
type torn struct {
	entry   *entry
	id      string
	digests []string
}

// mend pulls an image by the digests it is known by.
func (s *Store) mend(ctx context.Context, t torn) error {
	err := fmt.Errorf("it has no name: %w", errdefs.ErrNotFound)
	for _, name := range t.digests {
		s.mu.Lock()
		torn := s.torn[t.id] == t.entry
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

func (s *Store) dropTorn(t torn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.torn[t.id] != t.entry {
		return // somebody has pulled it
	}
	delete(s.torn, t.id)
	if err := s.drop(t.entry); err != nil {
		s.log.Warn("torn image stays until the next start", "op", "mend image", "image", t.id, "err", err)
	}
}
