package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"sampan.dev/sampan/internal/fsck"
	"sampan.dev/sampan/internal/state"
)

// Check looks at the images under root, and whether each layer of theirs is among
// those that are sound and each of those is one of theirs. It changes nothing and
// needs no Store.
func Check(root string, sound map[digest.Digest]bool) ([]fsck.Problem, error) {
	entries, err := os.ReadDir(root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	const again = "the daemon's next start drops it; pull it again"
	var problems []fsck.Problem
	needed := make(map[digest.Digest]bool)
	for _, e := range entries {
		if e.Name() == "tmp" {
			continue
		}
		object := "image " + e.Name()[:min(12, len(e.Name()))]
		r, config, err := checkOne(filepath.Join(root, e.Name()), e.Name())
		switch {
		case errors.Is(err, state.ErrVersion):
			problems = append(problems, fsck.Problem{Object: object, What: err.Error(), Remedy: "a newer sampan wrote it: use that one"})
			continue
		case err != nil:
			problems = append(problems, fsck.Problem{Object: object, What: err.Error(), Remedy: again})
			continue
		}
		if len(r.Names) > 0 {
			object = "image " + r.Names[0].Name
		}
		for _, id := range config {
			needed[id] = true
			if !sound[id] {
				problems = append(problems, fsck.Problem{Object: object, What: fmt.Sprintf("its layer %s is missing or damaged", id), Remedy: "pull it again: only what is missing is fetched"})
			}
		}
	}
	for id := range sound {
		if !needed[id] {
			problems = append(problems, fsck.Problem{Object: "layer " + id.String(), What: "it belongs to no image", Remedy: "the daemon's next start removes it"})
		}
	}
	return problems, nil
}

// checkOne reads an image's files and returns its record and layers.
func checkOne(dir, hex string) (record, []digest.Digest, error) {
	var r record
	if err := state.Read(filepath.Join(dir, "record"), recordKind, &r); err != nil {
		return r, nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "config"))
	if err != nil {
		return r, nil, err
	}
	if got := digest.FromBytes(raw); got.String() != r.ID || r.hex() != hex {
		return r, nil, fmt.Errorf("its configuration has the digest %s", got)
	}
	config, err := parseConfig(raw)
	return r, config.RootFS.DiffIDs, err
}
