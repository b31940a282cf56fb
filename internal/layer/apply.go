package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/state"
)

// Source opens a layer's archive: a tar stream, plain or compressed with gzip
// or zstd. The context ends when nobody wants the layer any more; reads must
// end then too. A Source that checks what it delivers reports that as an error
// of the last Read.
type Source func(context.Context) (io.ReadCloser, error)

// Apply returns the layer called diffID. If it is not there yet, it is unpacked
// from what open returns; callers who ask for the same layer at the same time
// join. On error, a cancelled context included, nothing of the layer stays.
//
// The error wraps ErrDataLoss when the content is not what diffID says,
// ErrInvalidArgument when the archive cannot be a layer, and
// ErrResourceExhausted when the disk is full.
func (s *Store) Apply(ctx context.Context, diffID digest.Digest, open Source) (Info, error) {
	if err := diffID.Validate(); err != nil || diffID.Algorithm() != digest.SHA256 {
		return Info{}, fmt.Errorf("layer %q: not a sha256 digest: %w", diffID, errdefs.ErrInvalidArgument)
	}
	return s.flight.Do(ctx, diffID, func(ctx context.Context) (Info, error) {
		if info, err := s.Get(diffID); err == nil {
			return info, nil
		}
		info, err := s.unpack(ctx, diffID, open)
		if err != nil {
			return Info{}, fmt.Errorf("unpack layer %s: %w", diffID, classify(err))
		}
		return info, nil
	})
}

// unpack brings one layer from its archive to its place.
func (s *Store) unpack(ctx context.Context, diffID digest.Digest, open Source) (Info, error) {
	tmp, err := os.MkdirTemp(s.path("tmp"), "unpack-")
	if err != nil {
		return Info{}, err
	}
	defer os.RemoveAll(tmp)
	tree := filepath.Join(tmp, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return Info{}, err
	}

	fault.Point("layer.directory-made")
	content, got, err := extract(ctx, tree, open)
	if err != nil {
		return Info{}, err
	}
	fault.Point("layer.unpacked")
	if got != diffID {
		return Info{}, fmt.Errorf("its content has the digest %s: %w", got, errdefs.ErrDataLoss)
	}
	return s.commit(ctx, tree, record{
		DiffID:     diffID,
		Bytes:      content.bytes,
		Inodes:     content.inodes,
		Sum:        content.sum.String(),
		Boot:       host.BootID(),
		OpaqueRoot: content.opaqueRoot,
		Implicit:   slices.Sorted(maps.Keys(content.implicit)),
	})
}

// extract unpacks the archive that open returns into dir and tells the digest of
// its plain stream.
func extract(ctx context.Context, dir string, open Source) (content, digest.Digest, error) {
	src, err := open(ctx)
	if err != nil {
		return content{}, "", err
	}
	download := readAhead(src, nil)
	defer download.Close()
	defer src.Close() // first, to end a Read that download may be in

	c, got, err := extractStream(ctx, dir, download)
	if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) {
		return content{}, "", err
	}
	// Whatever the content is like: if it is not the content that was asked for,
	// that is what went wrong, and only the end of the source tells.
	if _, verdict := io.Copy(io.Discard, download); verdict != nil {
		return content{}, "", verdict
	}
	return c, got, err
}

// extractStream decompresses, digests and unpacks r, each in its own goroutine.
func extractStream(ctx context.Context, dir string, r io.Reader) (content, digest.Digest, error) {
	plain, err := Decompress(r)
	if err != nil {
		return content{}, "", err
	}
	defer plain.Close()
	inflated := readAhead(plain, nil)
	hash := digest.SHA256.Digester()
	hashed := readAhead(inflated, hash.Hash())
	defer hashed.Close()
	defer inflated.Close() // first: hashed reads from it

	c, err := untar(ctx, dir, hashed)
	if err != nil {
		return content{}, "", err
	}
	if err := drain(hashed); err != nil {
		return content{}, "", err
	}
	return c, hash.Digest(), nil
}

// maxPadding bounds what may follow the end of a tar archive.
const maxPadding = 64 << 20

// drain reads r to its end: the padding counts for the digest.
func drain(r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxPadding+1))
	if err == nil && n > maxPadding {
		err = fmt.Errorf("more than %d MiB follow the end of the archive: %w", maxPadding>>20, errdefs.ErrInvalidArgument)
	}
	return err
}

// commit moves a finished tree into place and makes it a layer by writing its
// record. A layer that nobody waits for any more is not committed: whoever
// abandoned it may clean up by Remove, and will not come back.
func (s *Store) commit(ctx context.Context, tree string, r record) (Info, error) {
	s.placing.Lock()
	defer s.placing.Unlock()
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	place := s.Path(r.DiffID)
	if other, err := s.recorded(r.DiffID); err == nil && other != r.DiffID {
		return Info{}, fmt.Errorf("it would have the same name as layer %s: %w", other, errdefs.ErrAlreadyExists)
	}
	if err := s.discard(place); err != nil {
		return Info{}, err
	}
	if err := os.Rename(tree, place); err != nil {
		return Info{}, err
	}
	fault.Point("layer.placed")
	if err := state.Write(s.recordPath(r.DiffID), recordKind, r, state.Volatile); err != nil {
		return Info{}, errors.Join(err, s.discard(place))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[r.DiffID] = r
	return r.info(), nil
}

// recorded returns the diff id of the layer that has diffID's name.
func (s *Store) recorded(diffID digest.Digest) (digest.Digest, error) {
	var r record
	err := state.Read(s.recordPath(diffID), recordKind, &r)
	return r.DiffID, err
}

// classify gives an error the class a caller can act on, if it has none yet.
func classify(err error) error {
	switch {
	case !errors.Is(errdefs.Resolve(err), errdefs.ErrUnknown):
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the archive is cut short: %w", errdefs.ErrDataLoss)
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}
