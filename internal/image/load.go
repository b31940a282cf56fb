package image

import (
	"context"
	"io"
)

// LoadOptions adjusts Load.
type LoadOptions struct {
	// Name is given to the one image of an archive that does not name it.
	Name string
}

// Load reads images from an archive.
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]Image, error) { panic("soon") }
