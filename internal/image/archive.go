package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// archive is a tar archive of images, spooled to disk: what its files mean is
// said by one of them, which may come last.
type archive struct {
	files map[string]string // name in the archive → file on disk
	links map[string]string // name → name
}

// maxFiles bounds how many files an archive may have.
const maxFiles = 100_000

// spool copies the files of a tar stream into dir, under names of its own.
func spool(ctx context.Context, dir string, r io.Reader) (*archive, error) {
	a := &archive{files: make(map[string]string), links: make(map[string]string)}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return a, nil
		case errors.Is(err, tar.ErrHeader):
			return nil, fmt.Errorf("not a tar archive: %w: %w", err, errdefs.ErrInvalidArgument)
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fmt.Errorf("the archive is cut short: %w", errdefs.ErrDataLoss)
		case err != nil:
			return nil, err
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case n >= maxFiles:
			return nil, fmt.Errorf("the archive has more than %d files: %w", maxFiles, errdefs.ErrInvalidArgument)
		}
		name := memberName(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			file := filepath.Join(dir, strconv.Itoa(n))
			if err := spoolFile(file, tr); err != nil {
				return nil, fmt.Errorf("%q of the archive: %w", h.Name, err)
			}
			a.files[name] = file
		case tar.TypeLink:
			a.links[name] = memberName(h.Linkname)
		case tar.TypeSymlink: // docker save, for a layer that two images share
			a.links[name] = memberName(path.Join(path.Dir(name), h.Linkname))
		}
	}
}

func spoolFile(file string, r io.Reader) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("the archive is cut short: %w", errdefs.ErrDataLoss)
	}
	return errors.Join(err, f.Close())
}

// memberName makes different spellings of a name one. It is a key only, never a
// path on disk.
func memberName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// maxLinks bounds a chain of links.
const maxLinks = 8

// find returns the file on disk that has the content of name.
func (a *archive) find(name string) (string, bool) {
	name = memberName(name)
	for range maxLinks {
		if file, ok := a.files[name]; ok {
			return file, true
		}
		name = a.links[name]
	}
	return "", false
}

func (a *archive) has(name string) bool {
	_, ok := a.find(name)
	return ok
}

func (a *archive) open(name string) (io.ReadCloser, error) {
	file, ok := a.find(name)
	if !ok {
		return nil, fmt.Errorf("%s is missing in the archive: %w", name, errdefs.ErrNotFound)
	}
	return os.Open(file)
}

// read returns a small file of the archive.
func (a *archive) read(name string) ([]byte, error) {
	f, err := a.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		err = fmt.Errorf("%s has more than %d bytes: %w", name, maxConfig, errdefs.ErrInvalidArgument)
	}
	return data, err
}
