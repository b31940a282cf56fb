package layer

import (
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/state"
)

// Sync returns when all layers committed before the call are on disk, and
// records that they are.
func (s *Store) Sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	unsynced := s.unsynced()
	if len(unsynced) == 0 {
		return nil
	}
	f, err := os.Open(s.root)
	if err != nil {
		return fmt.Errorf("sync layers: %w", err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync layers: %w", err)
	}
	fault.Point("layer.synced")
	for _, id := range unsynced {
		if err := s.markSynced(id); err != nil {
			return fmt.Errorf("sync layer %s: %w", id, err)
		}
	}
	return nil
}

// SyncSoon starts a Sync in the background.
func (s *Store) SyncSoon() {
	s.background.Go(func() {
		if err := s.Sync(); err != nil {
			s.log.Error("layers may be lost if the machine goes down now", "op", "sync layers", "err", err)
		}
	})
}

func (s *Store) unsynced() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []digest.Digest
	for id, r := range s.layers {
		if !r.Synced {
			ids = append(ids, id)
		}
	}
	return ids
}

// markSynced records that a layer is on disk, unless it is gone.
func (s *Store) markSynced(id digest.Digest) error {
	s.placing.Lock()
	defer s.placing.Unlock()
	r, err := s.get(id)
	if err != nil {
		return nil
	}
	r.Synced = true
	if err := state.Write(s.recordPath(id), recordKind, r, state.Volatile); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[id] = r
	return nil
}
