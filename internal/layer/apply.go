package layer

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
)

// Source opens a layer's archive: a tar stream, plain or compressed with gzip
// or zstd.
type Source func(context.Context) (io.ReadCloser, error)

// Apply returns the layer called diffID. If it is not there yet, it is unpacked
// from what open returns; callers who ask for the same layer at the same time
// join. On error nothing of the layer stays.
func (s *Store) Apply(ctx context.Context, diffID digest.Digest, open Source) (Info, error) {
	panic("soon")
}
