package abuse

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

// loadHostile loads busybox with one more layer and a changed configuration under
// the name, and returns what to call it in requests.
func loadHostile(t *testing.T, l *lab.Lab, ref string, layer []tar.Header, change func(*v1.Config)) string {
	t.Helper()
	base := filepath.Join(l.Dir, "busybox.tar")
	f, err := os.Create(base)
	must(t, err)
	defer f.Close()
	_, err = images.WriteDocker(f, os.Getenv(lab.Images), "sampan/variants:oci-plain", "busybox:latest")
	must(t, err)
	image, err := tarball.ImageFromPath(base, nil)
	must(t, err)
	archive := archiveOf(t, layer)
	added, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil })
	must(t, err)
	image, err = mutate.AppendLayers(image, added)
	must(t, err)
	file, err := image.ConfigFile()
	must(t, err)
	file = file.DeepCopy()
	if change != nil {
		change(&file.Config)
	}
	image, err = mutate.ConfigFile(image, file)
	must(t, err)
	tag, err := name.NewTag("localhost/hostile/" + ref + ":latest")
	must(t, err)
	path := filepath.Join(l.Dir, ref+".tar")
	must(t, tarball.WriteToFile(path, tag, image))
	out, err := exec.Command(os.Getenv(lab.Binary), "image", "load", "--endpoint", "unix://"+l.Socket, path).CombinedOutput()
	if err != nil {
		t.Fatalf("load %s: %v: %s", ref, err, out)
	}
	return tag.String()
}

func archiveOf(t *testing.T, entries []tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		must(t, w.WriteHeader(&h))
	}
	must(t, w.Close())
	return b.Bytes()
}

func link(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
