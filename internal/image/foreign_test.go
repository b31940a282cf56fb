package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	dockerarchive "github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Archives made by somebody else's tool.
func TestForeign(t *testing.T) {
	img, err := random.Image(3000, 4)
	if err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference("a.test/random:v1")
	if err != nil {
		t.Fatal(err)
	}
	check := func(t *testing.T, got []Image, err error) {
		t.Helper()
		if err != nil || len(got) != 1 || got[0].ID != id.String() || len(got[0].Layers) != 4 {
			t.Errorf("images %+v, %v; want %s", got, err, id)
		}
	}
	t.Run("docker archive", func(t *testing.T) {
		var buf bytes.Buffer
		if err := dockerarchive.Write(ref, img, &buf); err != nil {
			t.Fatal(err)
		}
		got, err := openStore(t, t.TempDir()).Load(t.Context(), &buf, LoadOptions{})
		check(t, got, err)
		if len(got) == 1 && (len(got[0].RepoTags) != 1 || got[0].RepoTags[0] != ref.String()) {
			t.Errorf("tags %v", got[0].RepoTags)
		}
	})
	t.Run("layout", func(t *testing.T) {
		dir := t.TempDir()
		path, err := layout.Write(dir, empty.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := path.AppendImage(img); err != nil {
			t.Fatal(err)
		}
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		if err := w.AddFS(os.DirFS(filepath.Clean(dir))); err != nil {
			t.Fatal(err)
		}
		w.Close()
		got, err := openStore(t, t.TempDir()).Load(t.Context(), &buf, LoadOptions{Name: "x:1"})
		check(t, got, err)
	})
}
