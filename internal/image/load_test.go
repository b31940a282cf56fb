package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"sampan.dev/sampan/internal/registry"
)

func hostArch() string { return runtime.GOARCH }

// member is a file of an archive of images, or a symbolic link.
type member struct {
	name string
	data []byte
	link string
}

func pack(t *testing.T, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.data))}
		if m.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Write(m.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func asJSON(v any) []byte {
	raw, _ := json.Marshal(v)
	return raw
}

// layoutOf returns the members of an OCI layout with one image.
func layoutOf(m made, annotations map[string]string) []member {
	d := m.descriptor("", "")
	d.Annotations = annotations
	members := []member{{name: "oci-layout", data: []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	for id, data := range m.blobs {
		members = append(members, member{name: blobPath(id), data: data})
	}
	return append(members, member{name: blobPath(m.digest()), data: m.manifest}, member{name: "index.json", data: index(d)})
}

func TestLoad(t *testing.T) {
	m := build(t, oci, nil, tarball(t, "a", "1"), tarball(t, "b", "2"), tarball(t, "c", "3"))
	dockerSave := func(tags ...string) []member {
		return []member{
			{name: "one/layer.tar", data: m.plain[0]},
			{name: "two/layer.tar", data: gz(m.plain[1])},
			{name: "three/layer.tar", link: "../shared/layer.tar"},
			{name: "shared/layer.tar", data: m.plain[2]},
			{name: "config.json", data: m.config},
			{name: "./manifest.json", data: asJSON([]dockerImage{{Config: "config.json", RepoTags: tags, Layers: []string{"one/layer.tar", "two/layer.tar", "three/layer.tar"}}})},
		}
	}
	latest := "docker.io/library/web:latest"
	for _, tc := range []struct {
		name string
		data []byte
		o    LoadOptions
		want []string // tags
	}{
		{"docker", pack(t, dockerSave("web:latest", "quay.io/x/y:1")...), LoadOptions{}, []string{latest, "quay.io/x/y:1"}},
		{"docker in gzip", gz(pack(t, dockerSave("web")...)), LoadOptions{}, []string{latest}},
		{"docker without a tag", pack(t, dockerSave()...), LoadOptions{}, nil},
		{"docker, named", pack(t, dockerSave("other:1")...), LoadOptions{Name: "web"}, []string{latest}},
		{"layout", pack(t, layoutOf(m, map[string]string{annotationRef: "web:latest"})...), LoadOptions{}, []string{latest}},
		{"layout in zstd", zst(pack(t, layoutOf(m, map[string]string{annotationRef: "latest", annotationName: latest})...)), LoadOptions{}, []string{latest}},
		{"layout with a tag only", pack(t, layoutOf(m, map[string]string{annotationRef: "latest"})...), LoadOptions{}, nil},
		{"layout, named", pack(t, layoutOf(m, nil)...), LoadOptions{Name: "web"}, []string{latest}},
		{"both", pack(t, append(dockerSave("other"), layoutOf(m, map[string]string{annotationRef: "web:latest"})...)...), LoadOptions{}, []string{latest}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root)
			images, err := s.Load(t.Context(), bytes.NewReader(tc.data), tc.o)
			if err != nil {
				t.Fatal(err)
			}
			if len(images) != 1 || images[0].ID != m.id() || !slices.Equal(images[0].RepoTags, tc.want) {
				t.Errorf("images %+v, want %s with %v", images, m.id(), tc.want)
			}
			for _, l := range s.Layers().List() {
				if !l.Synced {
					t.Errorf("layer %s is not on disk", l.DiffID)
				}
			}
			s.Close(t.Context())
			s = openStore(t, root)
			if list := s.List(); len(list) != 1 || list[0].Size != 3 {
				t.Errorf("after a restart: %+v", list)
			}
			if err := s.Remove(t.Context(), m.id()); err != nil {
				t.Error(err)
			}
			checkClean(t, s)
		})
	}
}

// A layout may hold several images, and one image for several platforms.
func TestLoadLayouts(t *testing.T) {
	mine := build(t, oci, func(c *ocispec.Image) { c.Architecture = hostArch() }, tarball(t, "mine", ""))
	other := build(t, oci, func(c *ocispec.Image) { c.Architecture = "s390x" }, tarball(t, "other", ""))
	both := index(other.descriptor("linux", "s390x"), mine.descriptor("linux", hostArch()))
	nested := ocispec.Descriptor{MediaType: registry.MediaTypeIndex, Digest: digest.FromBytes(both), Annotations: map[string]string{annotationRef: "a.b/multi:1"}}
	named := func(m made, name string) ocispec.Descriptor {
		d := m.descriptor("", "")
		d.Annotations = map[string]string{annotationRef: name}
		return d
	}
	second := build(t, docker, nil, tarball(t, "second", ""))
	// The other platform's blobs need not be there.
	base := slices.Concat(layoutOf(mine, nil), layoutOf(second, nil), []member{{name: blobPath(digest.FromBytes(both)), data: both}})
	base = slices.DeleteFunc(base, func(m member) bool { return m.name == "index.json" })
	for _, tc := range []struct {
		name string
		top  []byte
		want map[string]string // tag → id
	}{
		{"platforms at the top", both, map[string]string{"": mine.id()}},
		{"platforms below", index(nested), map[string]string{"a.b/multi:1": mine.id()}},
		{"two images", index(named(mine, "x/one:1"), named(second, "x/two:2"), named(mine, "x/uno:1")),
			map[string]string{"docker.io/x/one:1": mine.id(), "docker.io/x/two:2": second.id(), "docker.io/x/uno:1": mine.id()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			images, err := s.Load(t.Context(), bytes.NewReader(pack(t, append(slices.Clone(base), member{name: "index.json", data: tc.top})...)), LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for tag, id := range tc.want {
				if tag == "" {
					tag = id
				}
				if img, err := s.Get(tag); err != nil || img.ID != id {
					t.Errorf("Get(%q) = %s, %v; want %s", tag, img.ID, err, id)
				}
			}
			if len(images) > len(tc.want) {
				t.Errorf("images: %+v", images)
			}
		})
	}
}

func TestLoadBad(t *testing.T) {
	m := build(t, oci, nil, tarball(t, "a", "1"), tarball(t, "b", strings.Repeat("2", 5000)))
	other := build(t, oci, func(c *ocispec.Image) { c.OS, c.Architecture = "linux", "s390x" }, tarball(t, "a", "1"))
	layout := layoutOf(m, nil)
	without := func(d digest.Digest) []member {
		return slices.DeleteFunc(slices.Clone(layout), func(m member) bool { return m.name == blobPath(d) })
	}
	with := func(d digest.Digest, data []byte) []member {
		return append(without(d), member{name: blobPath(d), data: data})
	}
	manifest := func(images ...dockerImage) member {
		return member{name: "manifest.json", data: asJSON(images)}
	}
	config := member{name: "c", data: m.config}
	whole := pack(t, layout...)
	for _, tc := range []struct {
		name string
		data []byte
		o    LoadOptions
		want error
		text string
	}{
		{"nothing", nil, LoadOptions{}, errdefs.ErrInvalidArgument, "neither index.json nor manifest.json"},
		{"text", []byte(strings.Repeat("hello ", 1000)), LoadOptions{}, errdefs.ErrInvalidArgument, "not a tar archive"},
		{"other archive", tarball(t, "x", "1"), LoadOptions{}, errdefs.ErrInvalidArgument, "neither index.json nor manifest.json"},
		{"cut short", whole[:len(whole)/1024*512+100], LoadOptions{}, errdefs.ErrDataLoss, "cut short"},
		{"gzip cut short", gz(whole)[:500], LoadOptions{}, errdefs.ErrDataLoss, "cut short"},
		{"no images", pack(t, manifest()), LoadOptions{}, errdefs.ErrInvalidArgument, "no image"},
		{"manifest.json is no json", pack(t, member{name: "manifest.json", data: []byte("<")}), LoadOptions{}, errdefs.ErrInvalidArgument, "manifest.json"},
		{"config missing", pack(t, manifest(dockerImage{Config: "c"})), LoadOptions{}, errdefs.ErrNotFound, "c is missing"},
		{"config outside", pack(t, manifest(dockerImage{Config: "../../../../etc/passwd"})), LoadOptions{}, errdefs.ErrNotFound, "missing"},
		{"link outside", pack(t, member{name: "c", link: "/etc/passwd"}, manifest(dockerImage{Config: "c"})), LoadOptions{}, errdefs.ErrNotFound, "missing"},
		{"links in a circle", pack(t, member{name: "c", link: "d"}, member{name: "d", link: "c"}, manifest(dockerImage{Config: "c"})), LoadOptions{}, errdefs.ErrNotFound, "missing"},
		{"layer missing", pack(t, config, manifest(dockerImage{Config: "c", Layers: []string{"x", "y"}})), LoadOptions{}, errdefs.ErrNotFound, "x is missing"},
		{"too few layers", pack(t, config, manifest(dockerImage{Config: "c"})), LoadOptions{}, errdefs.ErrInvalidArgument, "0 layers"},
		{"layers swapped", pack(t, config, member{name: "x", data: m.plain[1]}, member{name: "y", data: m.plain[0]}, manifest(dockerImage{Config: "c", Layers: []string{"x", "y"}})), LoadOptions{}, errdefs.ErrDataLoss, "has the digest"},
		{"bad tag", pack(t, config, member{name: "x", data: m.plain[0]}, member{name: "y", data: m.plain[1]}, manifest(dockerImage{Config: "c", Layers: []string{"x", "y"}, RepoTags: []string{"A B"}})), LoadOptions{}, errdefs.ErrInvalidArgument, "A B"},
		{"layout without manifest", pack(t, without(m.digest())...), LoadOptions{}, errdefs.ErrNotFound, "missing"},
		{"layout without layer", pack(t, without(m.layer(1))...), LoadOptions{}, errdefs.ErrNotFound, "missing"},
		{"layout with wrong layer", pack(t, with(m.layer(0), m.plain[1])...), LoadOptions{}, errdefs.ErrDataLoss, "another digest"},
		{"layout with wrong manifest", pack(t, with(m.digest(), other.manifest)...), LoadOptions{}, errdefs.ErrDataLoss, "has the digest"},
		{"other platform", pack(t, layoutOf(other, nil)...), LoadOptions{}, errdefs.ErrNotFound, "s390x"},
		{"bad name", whole, LoadOptions{Name: "A B"}, errdefs.ErrInvalidArgument, "A B"},
		{"digest as name", whole, LoadOptions{Name: "x@" + digest.FromString("").String()}, errdefs.ErrInvalidArgument, "digest"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			_, err := s.Load(t.Context(), bytes.NewReader(tc.data), tc.o)
			if !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("err = %v\nwant %v, with %q", err, tc.want, tc.text)
			}
			checkClean(t, s)
		})
	}
	t.Run("sender fails", func(t *testing.T) {
		s := openStore(t, t.TempDir())
		gone := errors.New("the client went away")
		_, err := s.Load(t.Context(), io.MultiReader(bytes.NewReader(whole[:3000]), failing{gone}), LoadOptions{})
		if !errors.Is(err, gone) {
			t.Errorf("err = %v, want the sender's", err)
		}
		checkClean(t, s)
	})
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func FuzzDocument(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},"layers":[]}`), registry.MediaTypeManifest)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"platform":{"os":"linux","architecture":"amd64"}}]}`), registry.MediaTypeIndex)
	f.Fuzz(func(t *testing.T, body []byte, mediaType string) {
		d, err := parseDocument(body, mediaType)
		switch {
		case err != nil:
		case d.isIndex():
			d.choose()
		case d.Config == nil || d.Layers == nil:
			t.Error("an image without config and layers was accepted")
		}
	})
}
