package images

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// largeRecipe changes when the large images change.
const largeRecipe = "1"

// Names of the large images.
const (
	LargeGzip = "bench/large:gzip"  // 5 layers, 40,000 files, 1 GB
	LargeZstd = "bench/large:zstd"  // the same
	Layers    = "bench/layers:many" // 60 layers of one small file
)

// BuildLarge makes images of the size that benchmarks pull below cache, unless
// they are there, and returns their directory, for Handler. It takes 3 GiB of
// memory and a minute.
func BuildLarge(cache string) (string, error) {
	dir := filepath.Join(cache, "images", "large-"+largeRecipe)
	if _, err := os.Stat(filepath.Join(dir, "manifests.json")); err == nil {
		return dir, nil
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return "", err
	}
	s := &store{dir: tmp}
	if err := s.large(); err != nil {
		return "", err
	}
	if err := s.save(); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

func (s *store) large() error {
	random := rand.New(rand.NewPCG(1, 2))
	var big, small image
	for i := range 5 {
		layer, err := largeLayer(random, i, 8000)
		if err != nil {
			return err
		}
		big.layers = append(big.layers, layer)
	}
	for i := range 60 {
		t := newTree()
		t.file(fmt.Sprintf("etc/layer.d/%d", i), 0o644, fmt.Sprintf("layer %d\n", i))
		layer, err := t.tar()
		if err != nil {
			return err
		}
		small.layers = append(small.layers, layer)
	}
	big.config = ocispec.ImageConfig{Cmd: []string{"/none"}}
	small.config = big.config
	for _, put := range []struct {
		image image
		form  form
		name  string
	}{{big, form{layers: "gzip"}, LargeGzip}, {big, form{layers: "zstd"}, LargeZstd}, {small, form{layers: "gzip"}, Layers}} {
		if err := s.put(put.image, put.form, put.name); err != nil {
			return err
		}
	}
	return nil
}

// largeLayer has files like those of a distribution with a language or two:
// small ones mostly, a few large ones, of text and of what does not compress.
func largeLayer(random *rand.Rand, layer, files int) ([]byte, error) {
	words := make([]string, 3000)
	for i := range words {
		words[i] = fmt.Sprintf("%x", random.Uint64()>>random.UintN(40))
	}
	t := newTree()
	for i := range files {
		var body strings.Builder
		size := 200 + random.IntN(30000)
		if i%400 == 0 {
			size = 4 << 20
		}
		solid := size / 7 // of it does not compress
		for body.Len() < solid {
			var b [8]byte
			for j, v := 0, random.Uint64(); j < 8; j, v = j+1, v>>8 {
				b[j] = byte(v)
			}
			body.Write(b[:])
		}
		// Text repeats itself: a phrase of words, and again.
		for body.Len() < size {
			at, n := random.IntN(len(words)-8), 2+random.IntN(6)
			for _, w := range words[at : at+n] {
				body.WriteString(w)
				body.WriteByte(' ')
			}
		}
		t.add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib%d/d%d/f%d", layer, i/20, i), Mode: 0o644}, []byte(body.String()))
	}
	return t.tar()
}
