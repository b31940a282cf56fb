package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/registry"
	"sampan.dev/sampan/internal/state"
)

func openStore(t *testing.T, root string, change ...func(*Config)) *Store {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files of a layer their owners")
	}
	c := Config{Root: filepath.Join(root, "images"), LayerRoot: filepath.Join(root, "layers")}
	for _, f := range change {
		f(&c)
	}
	s, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

// made is an image as a registry has it.
type made struct {
	config, manifest []byte
	blobs            map[digest.Digest][]byte // without the manifest
	layers           []ocispec.Descriptor
	plain            [][]byte
}

func (m made) id() string                { return digest.FromBytes(m.config).String() }
func (m made) digest() digest.Digest     { return digest.FromBytes(m.manifest) }
func (m made) mediaType() string         { return typeOf(m.manifest) }
func (m made) layer(i int) digest.Digest { return m.layers[i].Digest }

func typeOf(manifest []byte) string {
	var d document
	json.Unmarshal(manifest, &d)
	return d.MediaType
}

// tarball returns a layer with one file for each pair of name and content.
func tarball(t *testing.T, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, files[i+1])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type format struct{ manifest, config, layer string }

var (
	oci    = format{registry.MediaTypeManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayer}
	docker = format{registry.MediaTypeDockerManifest, "application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar"}
)

// build makes an image of plain layers, packed in turn as plain, gzip and zstd.
func build(t *testing.T, f format, change func(*ocispec.Image), layers ...[]byte) made {
	t.Helper()
	m := made{blobs: make(map[digest.Digest][]byte), plain: layers}
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux"}}
	c.Config.User = "1000:www"
	c.RootFS.Type = "layers"
	for i, plain := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(plain))
		packed, suffix := plain, ""
		switch i % 3 {
		case 1:
			packed, suffix = gz(plain), "+gzip"
		case 2:
			packed, suffix = zst(plain), "+zstd"
		}
		m.layers = append(m.layers, m.add(f.layer+suffix, packed))
	}
	if change != nil {
		change(&c)
	}
	m.config, _ = json.Marshal(c)
	m.manifest, _ = json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: f.manifest,
		Config:    m.add(f.config, m.config),
		Layers:    append([]ocispec.Descriptor{}, m.layers...),
	})
	return m
}

func (m *made) add(mediaType string, data []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	m.blobs[d.Digest] = data
	return d
}

func gz(data []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(data)
	w.Close()
	return buf.Bytes()
}

func zst(data []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(data, nil)
}

// serve starts a registry and returns its host. Requests go through wrap first.
func serve(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		handler = wrap(handler)
	}
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// push puts an image into a registry and returns its reference.
func push(t *testing.T, host, repo, tag string, m made) string {
	t.Helper()
	for d, data := range m.blobs {
		put(t, http.MethodPost, fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?digest=%s", host, repo, d), "", data)
	}
	putManifest(t, host, repo, tag, m.manifest)
	return fmt.Sprintf("%s/%s:%s", host, repo, tag)
}

func putManifest(t *testing.T, host, repo, tag string, manifest []byte) {
	t.Helper()
	put(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", host, repo, tag), typeOf(manifest), manifest)
}

func put(t *testing.T, method, url, mediaType string, data []byte) {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("%s %s: %s", method, url, resp.Status)
	}
}

func index(m ...ocispec.Descriptor) []byte {
	raw, _ := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: registry.MediaTypeIndex, Manifests: m})
	return raw
}

func (m made) descriptor(os, arch string) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: m.mediaType(), Digest: m.digest(), Size: int64(len(m.manifest))}
	if arch != "" {
		d.Platform = &ocispec.Platform{OS: os, Architecture: arch}
	}
	return d
}

// checkClean makes sure that a store has nothing on disk but the directories it
// starts with.
func checkClean(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{s.path("tmp"), s.layers.Root() + "/tree", s.layers.Root() + "/record", s.layers.Root() + "/tmp"} {
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", filepath.Base(dir), left, err)
		}
	}
	if left, err := os.ReadDir(s.root); err != nil || len(left) != 1 {
		t.Errorf("left among images: %v, %v", left, err)
	}
	if len(s.List()) != 0 {
		t.Errorf("images: %v", s.List())
	}
	if len(s.leases) != 0 {
		t.Errorf("layers still leased: %v", s.leases)
	}
}

func TestPull(t *testing.T) {
	host := serve(t, nil)
	layers := [][]byte{tarball(t, "a", "1"), tarball(t, "b", "22"), tarball(t, "c", "333"), tarball(t)}
	for name, f := range map[string]format{"oci": oci, "docker": docker} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			m := build(t, f, nil, layers...)
			ref := push(t, host, "some/"+name, "v1", m)
			img, err := s.Pull(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := Image{
				ID:          m.id(),
				RepoTags:    []string{ref},
				RepoDigests: []string{host + "/some/" + name + "@" + m.digest().String()},
				Size:        6,
				User:        "1000:www",
				Layers:      img.Config.RootFS.DiffIDs,
				Config:      img.Config,
			}
			if diff := cmp.Diff(want, img); diff != "" {
				t.Errorf("image (-want +got):\n%s", diff)
			}
			if got, _ := os.ReadFile(filepath.Join(s.Layers().Path(img.Layers[2]), "c")); string(got) != "333" {
				t.Errorf("c = %q", got)
			}
			again, err := s.Pull(t.Context(), ref, nil)
			if err != nil || again.ID != img.ID {
				t.Errorf("second pull: %v, %v", again.ID, err)
			}
			path, bytes, inodes, err := s.FsInfo()
			if path == "" || bytes != 6 || inodes != 7 || err != nil {
				t.Errorf("FsInfo = %q, %d, %d, %v", path, bytes, inodes, err)
			}
		})
	}
}

func TestPullIndex(t *testing.T) {
	host := serve(t, nil)
	arch := hostArch()
	mine := build(t, oci, func(c *ocispec.Image) { c.Architecture = arch }, tarball(t, "mine", ""))
	other := build(t, oci, func(c *ocispec.Image) { c.Architecture = "s390x" }, tarball(t, "other", ""))
	push(t, host, "multi", "mine", mine)
	push(t, host, "multi", "other", other)
	attestation := other.descriptor("unknown", "unknown")
	both := index(other.descriptor("linux", "s390x"), mine.descriptor("linux", arch), attestation)
	putManifest(t, host, "multi", "both", both)
	nested := index(ocispec.Descriptor{MediaType: registry.MediaTypeIndex, Digest: digest.FromBytes(both), Size: int64(len(both))})
	putManifest(t, host, "multi", "nested", nested)
	putManifest(t, host, "multi", "foreign", index(other.descriptor("linux", "s390x")))

	for tag, manifest := range map[string][]byte{"both": both, "nested": nested} {
		t.Run(tag, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			img, err := s.Pull(t.Context(), host+"/multi:"+tag, nil)
			if err != nil {
				t.Fatal(err)
			}
			byDigest := host + "/multi@" + digest.FromBytes(manifest).String()
			if img.ID != mine.id() || !slices.Equal(img.RepoDigests, []string{byDigest}) {
				t.Errorf("image %s, digests %v", img.ID, img.RepoDigests)
			}
			img, err = s.Pull(t.Context(), byDigest, nil)
			if err != nil || img.ID != mine.id() {
				t.Errorf("pull by the digest of the index: %v, %v", img.ID, err)
			}
		})
	}
	for _, tag := range []string{"foreign", "other"} {
		t.Run(tag, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			_, err := s.Pull(t.Context(), host+"/multi:"+tag, nil)
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "s390x") {
				t.Errorf("err = %v, want not found, naming the platform", err)
			}
			checkClean(t, s)
		})
	}
}

func TestNames(t *testing.T) {
	host := serve(t, nil)
	root := t.TempDir()
	s := openStore(t, root, func(c *Config) { c.Pinned = []string{"*/keep*"} })
	one := build(t, oci, nil, tarball(t, "shared", ""), tarball(t, "one", ""))
	two := build(t, oci, nil, tarball(t, "shared", ""), tarball(t, "two", ""))
	ref := push(t, host, "x", "v", one)
	if _, err := s.Pull(t.Context(), ref, nil); err != nil {
		t.Fatal(err)
	}
	img, err := s.Pull(t.Context(), push(t, host, "keep", "a", one), nil)
	if err != nil || !img.Pinned || len(img.RepoTags) != 2 || len(img.RepoDigests) != 2 {
		t.Errorf("image with two names: %+v, %v", img, err)
	}
	// The tag moves to another image.
	push(t, host, "x", "v", two)
	if _, err := s.Pull(t.Context(), ref, nil); err != nil {
		t.Fatal(err)
	}
	byDigest := host + "/x@" + one.digest().String()
	check := func(s *Store) {
		t.Helper()
		hex := strings.TrimPrefix(two.id(), "sha256:")
		for _, tc := range []struct{ ref, id string }{
			{ref, two.id()},
			{host + "/keep:a", one.id()},
			{byDigest, one.id()},
			{host + "/x:other@" + one.digest().String(), one.id()},
			{two.id(), two.id()}, {hex, two.id()}, {hex[:13], two.id()}, {"sha256:" + hex[:7], two.id()},
		} {
			if img, err := s.Get(tc.ref); err != nil || img.ID != tc.id {
				t.Errorf("Get(%q) = %s, %v; want %s", tc.ref, img.ID, err, tc.id)
			}
		}
		for ref, want := range map[string]error{
			"nope": errdefs.ErrNotFound, host + "/x": errdefs.ErrNotFound, hex[:3]: errdefs.ErrNotFound,
			"sha256:0000000": errdefs.ErrNotFound, "": errdefs.ErrInvalidArgument, "x/UPPER": errdefs.ErrInvalidArgument, "a:b:c": errdefs.ErrInvalidArgument,
		} {
			if _, err := s.Get(ref); !errors.Is(err, want) {
				t.Errorf("Get(%q): %v, want %v", ref, err, want)
			}
		}
		if len(s.List()) != 2 {
			t.Errorf("List: %+v", s.List())
		}
	}
	check(s)
	// A daemon that died before it could take the tag from the first image.
	e := s.images[one.id()]
	stale := e.record
	stale.Names = append(slices.Clone(stale.Names), owned{ref, 1})
	if err := state.Write(s.path(e.hex(), "record"), recordKind, stale, state.Volatile); err != nil {
		t.Fatal(err)
	}
	s.Close(t.Context())
	s = openStore(t, root)
	check(s)

	for _, ref := range []string{byDigest, byDigest, host + "/keep:a"} {
		if err := s.Remove(t.Context(), ref); err != nil {
			t.Errorf("Remove(%q): %v", ref, err)
		}
	}
	if _, err := s.Get(host + "/keep:a"); !errdefs.IsNotFound(err) {
		t.Errorf("an image removed by one of its names has another left: %v", err)
	}
	if err := s.Remove(t.Context(), "a:b:c"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Remove of nonsense: %v", err)
	}
	if n := len(s.Layers().List()); n != 2 {
		t.Errorf("%d layers left, want the two of the other image", n)
	}
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	checkClean(t, s)
}

func TestHolders(t *testing.T) {
	host := serve(t, nil)
	root := t.TempDir()
	s := openStore(t, root)
	m := build(t, oci, nil, tarball(t, "x", "1"))
	ref := push(t, host, "x", "v", m)
	pull := func() {
		t.Helper()
		if _, err := s.Pull(t.Context(), ref, nil); err != nil {
			t.Fatal(err)
		}
	}
	pull()
	acquire := func(holder string) {
		t.Helper()
		if img, err := s.Acquire(m.id(), holder); err != nil || len(img.Layers) != 1 {
			t.Fatalf("Acquire: %+v, %v", img, err)
		}
	}
	held := func(want bool) {
		t.Helper()
		if _, err := s.Layers().Get(digest.FromBytes(m.plain[0])); (err == nil) != want {
			t.Errorf("layer: %v, want there: %v", err, want)
		}
	}
	acquire("one")
	acquire("one")
	acquire("two")
	for range 2 {
		if err := s.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Get(m.id()); !errdefs.IsNotFound(err) || len(s.List()) != 0 {
		t.Errorf("a removed image is still to be seen: %v, %v", err, s.List())
	}
	s.Release("one")
	held(true)

	// After a restart the image waits for its holders to come back.
	s.Close(t.Context())
	s = openStore(t, root)
	if len(s.List()) != 0 {
		t.Errorf("a removed image is back after a restart: %v", s.List())
	}
	acquire("two")
	acquire("dead")
	s.RetainOnly(func(holder string) bool { return holder == "two" })
	held(true)

	// Pulled again, it is there again, and released holders do not matter.
	pull()
	s.Release("two")
	held(true)
	if _, err := s.Get(ref); err != nil {
		t.Error(err)
	}
	acquire("three")
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	s.RetainOnly(func(string) bool { return false })
	held(false)
	if _, err := s.Acquire(m.id(), "four"); !errdefs.IsNotFound(err) {
		t.Errorf("Acquire of a removed image: %v", err)
	}
	checkClean(t, s)
}

// Two pulls of the same image are one; it goes on for the one who stays, and ends
// with nothing left when nobody waits.
func TestPullJoin(t *testing.T) {
	release := make(chan struct{})
	var manifests atomic.Int32
	host := serve(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/") {
				manifests.Add(1)
			}
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				select {
				case <-release:
				case <-r.Context().Done():
					return
				}
			}
			next.ServeHTTP(w, r)
		})
	})
	m := build(t, oci, nil, tarball(t, "x", "1"))
	ref := push(t, host, "x", "v", m)
	s := openStore(t, t.TempDir())

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Pull(ctx, ref, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a pull past its deadline: %v", err)
	}
	waitFor(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.leases) == 0 })
	checkClean(t, s)

	manifests.Store(0)
	first, leave := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.Pull(first, ref, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("the one who left: %v", err)
		}
	})
	waitFor(t, func() bool { return manifests.Load() == 1 })
	for range 3 {
		wg.Go(func() {
			if img, err := s.Pull(t.Context(), ref, nil); err != nil || img.ID != m.id() {
				t.Errorf("one who joined: %v, %v", img.ID, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	leave()
	time.Sleep(20 * time.Millisecond)
	close(release)
	wg.Wait()
	if n := manifests.Load(); n != 1 {
		t.Errorf("the manifest was fetched %d times, want once", n)
	}
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited for five seconds in vain")
		}
	}
}

// What a registry can do wrong ends in an error that says so, with nothing left.
func TestPullBad(t *testing.T) {
	good := build(t, oci, nil, tarball(t, "x", strings.Repeat("1", 5000)), tarball(t, "y", strings.Repeat("2", 5000)))
	blob := "/blobs/" + good.layer(1).String()
	answer := func(status int, header, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if k, v, ok := strings.Cut(header, ": "); ok {
				w.Header().Set(k, v)
			}
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	garbage := strings.Repeat("x", len(good.blobs[good.layer(1)]))
	for _, tc := range []struct {
		name, path string // requests with path are answered by
		by         http.HandlerFunc
		want       error
		text       string
	}{
		{"401", "/manifests/", answer(401, "", ""), errdefs.ErrPermissionDenied, "401 Unauthorized"},
		{"403", "/manifests/", answer(403, "", `{"errors":[{"code":"DENIED","message":"not for you"}]}`), errdefs.ErrPermissionDenied, "403 Forbidden: DENIED: not for you"},
		{"404", "/manifests/", answer(404, "", `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`), errdefs.ErrNotFound, "404 Not Found: MANIFEST_UNKNOWN"},
		{"429", "/manifests/", answer(429, "Retry-After: 3600", ""), errdefs.ErrResourceExhausted, "try again after 3600"},
		{"500", "/manifests/", answer(500, "", "<html>oops"), errdefs.ErrUnavailable, "500 Internal Server Error"},
		{"html", "/manifests/", answer(200, "Content-Type: text/html", "<html>Log in"), errdefs.ErrUnavailable, `text/html that starts with "<html>Log in"`},
		{"empty manifest", "/manifests/", answer(200, "", ""), errdefs.ErrUnavailable, "empty body"},
		{"other json", "/manifests/", answer(200, "Content-Type: application/json", `{"hello":1}`), errdefs.ErrInvalidArgument, "schema version 0"},
		{"announced digest", "/manifests/", answer(200, "Docker-Content-Digest: "+digest.FromString("x").String(), string(good.manifest)), errdefs.ErrDataLoss, "announced"},
		{"huge manifest", "/manifests/", answer(200, "", "{"+strings.Repeat(" ", registry.MaxManifest)+"}"), errdefs.ErrInvalidArgument, "larger than"},
		{"index and image", "/manifests/", answer(200, "", `{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}`), errdefs.ErrInvalidArgument, "both"},
		{"contradicting types", "/manifests/", answer(200, "Content-Type: "+registry.MediaTypeIndex, string(good.manifest)), errdefs.ErrInvalidArgument, "sent as"},
		{"schema 1", "/manifests/", answer(200, "", `{"schemaVersion":1}`), errdefs.ErrNotImplemented, "schema 1"},
		{"negative size", "/manifests/", answer(200, "", `{"schemaVersion":2,"config":{"digest":"`+digest.FromString("").String()+`","size":-1},"layers":[]}`), errdefs.ErrInvalidArgument, "-1 bytes"},
		{"path as digest", "/manifests/", answer(200, "", `{"schemaVersion":2,"config":{"digest":"sha256:../../etc","size":1},"layers":[]}`), errdefs.ErrInvalidArgument, "../../etc"},
		{"blob 404", blob, answer(404, "", ""), errdefs.ErrNotFound, "404"},
		{"blob 500", blob, answer(500, "", ""), errdefs.ErrUnavailable, "500"},
		{"wrong blob", blob, answer(200, "", garbage), errdefs.ErrDataLoss, "another digest"},
		{"long blob", blob, answer(200, "Transfer-Encoding: chunked", garbage+"more"), errdefs.ErrDataLoss, "bytes"},
		{"short blob", blob, answer(200, "", "short"), errdefs.ErrDataLoss, "5 bytes, the manifest says"},
		{"truncated blob", blob, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(garbage)))
			io.WriteString(w, garbage[:10])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, errdefs.ErrUnavailable, "at byte 10"},
		{"wrong config", "/blobs/" + good.id(), answer(200, "", strings.Repeat("x", len(good.config))), errdefs.ErrDataLoss, "another digest"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			host := serve(t, func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodGet && strings.Contains(r.URL.Path, tc.path) {
						tc.by(w, r)
						return
					}
					next.ServeHTTP(w, r)
				})
			})
			ref := push(t, host, "x", "v", good)
			s := openStore(t, t.TempDir())
			_, err := s.Pull(t.Context(), ref, nil)
			if !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("err = %v\nwant %v, with %q", err, tc.want, tc.text)
			}
			checkClean(t, s)
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		s := openStore(t, t.TempDir())
		_, err := s.Pull(t.Context(), "127.0.0.1:1/x:v", nil)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("err = %v, want unavailable, connection refused", err)
		}
		checkClean(t, s)
	})
}

// Images that are wrong in themselves, though their registry is honest.
func TestPullUnsound(t *testing.T) {
	host := serve(t, nil)
	layers := [][]byte{tarball(t, "x", "1")}
	for _, tc := range []struct {
		name string
		m    made
		want error
		text string
	}{
		{"other diff id", build(t, oci, func(c *ocispec.Image) { c.RootFS.DiffIDs[0] = digest.FromString("x") }, layers...), errdefs.ErrDataLoss, "has the digest"},
		{"no diff ids", build(t, oci, func(c *ocispec.Image) { c.RootFS.DiffIDs = nil }, layers...), errdefs.ErrInvalidArgument, "not a container image"},
		{"bad diff id", build(t, oci, func(c *ocispec.Image) { c.RootFS.DiffIDs[0] = "sha256:.." }, layers...), errdefs.ErrInvalidArgument, "diff id"},
		{"hostile layer", build(t, oci, nil, tarball(t, "../../x", "1")), errdefs.ErrInvalidArgument, "leads upwards"},
		{"layer that is no archive", build(t, oci, nil, bytes.Repeat([]byte("no tar "), 100)), errdefs.ErrInvalidArgument, "not a tar archive"},
		{"windows", build(t, oci, func(c *ocispec.Image) { c.OS, c.Architecture = "windows", hostArch() }, layers...), errdefs.ErrNotFound, "windows"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, t.TempDir())
			_, err := s.Pull(t.Context(), push(t, host, "x", "v", tc.m), nil)
			if !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("err = %v\nwant %v, with %q", err, tc.want, tc.text)
			}
			checkClean(t, s)
		})
	}
}

func TestPullBadReference(t *testing.T) {
	s := openStore(t, t.TempDir())
	for _, ref := range []string{"", "UPPER", "a b", "x@sha256:123", "http://x/y", "x:" + strings.Repeat("t", 200)} {
		if _, err := s.Pull(t.Context(), ref, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Pull(%q): %v, want invalid argument", ref, err)
		}
	}
}

func TestPullDiskFull(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	s := openStore(t, root)
	host := serve(t, nil)
	fits := build(t, oci, nil, tarball(t, "x", strings.Repeat("x", 1<<20)))
	big := build(t, oci, nil, fits.plain[0], tarball(t, "y", strings.Repeat("y", 3<<20), "z", strings.Repeat("z", 3<<20)))
	_, err := s.Pull(t.Context(), push(t, host, "big", "v", big), nil)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("err = %v, want resource exhausted", err)
	}
	checkClean(t, s)
	if _, err := s.Pull(t.Context(), push(t, host, "fits", "v", fits), nil); err != nil {
		t.Errorf("a pull that fits, after one that did not: %v", err)
	}
}

// What a newer version wrote is not touched.
func TestReopenNewer(t *testing.T) {
	host := serve(t, nil)
	for _, kind := range []string{"image", "layer"} {
		t.Run(kind, func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root)
			m := build(t, oci, nil, tarball(t, "x", kind))
			if _, err := s.Pull(t.Context(), push(t, host, "x", kind, m), nil); err != nil {
				t.Fatal(err)
			}
			s.Close(t.Context())
			path := s.path(strings.TrimPrefix(m.id(), "sha256:"), "record")
			if kind == "layer" {
				list, _ := filepath.Glob(s.Layers().Root() + "/record/*")
				path = list[0]
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			os.WriteFile(path, bytes.Replace(data, []byte(" v1 "), []byte(" v9 "), 1), 0o600)
			c := Config{Root: s.root, LayerRoot: s.Layers().Root()}
			if _, err := Open(c); !errors.Is(err, state.ErrVersion) {
				t.Errorf("Open: %v, want a version error", err)
			}
			os.WriteFile(path, data, 0o600)
			if s, err = Open(c); err != nil || len(s.List()) != 1 {
				t.Errorf("back with the newer version: %v", err)
			}
		})
	}
}

// Images whose layers did not survive are gone after a restart, and the rest of
// the store is not touched by rubbish beside it.
func TestReopenDamaged(t *testing.T) {
	host := serve(t, nil)
	root := t.TempDir()
	s := openStore(t, root)
	shared := tarball(t, "shared", "")
	kept := build(t, oci, nil, shared)
	lost := build(t, oci, nil, shared, tarball(t, "lost", ""))
	torn := build(t, oci, nil, tarball(t, "torn", ""))
	for tag, m := range map[string]made{"kept": kept, "lost": lost, "torn": torn} {
		if _, err := s.Pull(t.Context(), push(t, host, "x", tag, m), nil); err != nil {
			t.Fatal(err)
		}
	}
	s.Close(t.Context())
	if err := os.RemoveAll(s.Layers().Path(digest.FromBytes(lost.plain[1]))); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.path(strings.TrimPrefix(torn.id(), "sha256:"), "config"), 10); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(s.path("tmp", "load-1"), 0o700)
	os.MkdirAll(s.path("rubbish"), 0o700)

	s = openStore(t, root)
	if list := s.List(); len(list) != 1 || list[0].ID != kept.id() {
		t.Errorf("images: %+v, want only %s", list, kept.id())
	}
	if n := len(s.Layers().List()); n != 1 {
		t.Errorf("%d layers, want one", n)
	}
	if _, err := s.Pull(t.Context(), host+"/x:lost", nil); err != nil {
		t.Errorf("pulling a lost image again: %v", err)
	}
}

// An image that has lost a layer gets only that one again, and keeps its names.
func TestMend(t *testing.T) {
	host := serve(t, nil)
	root := t.TempDir()
	s := openStore(t, root)
	m := build(t, oci, nil, tarball(t, "kept", "same"), tarball(t, "lost", "content"))
	ref := push(t, host, "x", "latest", m)
	if _, err := s.Pull(t.Context(), ref, nil); err != nil {
		t.Fatal(err)
	}
	s.Close(t.Context())
	kept, lost := s.Layers().Path(digest.FromBytes(m.plain[0])), s.Layers().Path(digest.FromBytes(m.plain[1]))
	before, err := os.Stat(kept)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(lost, "lost"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	findings, _, err := layer.Check(t.Context(), s.Layers().Root(), true)
	if err != nil || len(findings) != 1 || !findings[0].Lost {
		t.Fatalf("check: %+v, %v; want the one layer whose content has changed", findings, err)
	}
	if err := layer.Drop(s.Layers().Root(), findings[0]); err != nil {
		t.Fatal(err)
	}

	s = openStore(t, root)
	if list := s.List(); len(list) != 0 {
		t.Errorf("before it is mended: %+v", list)
	}
	var pulled sync.WaitGroup
	pulled.Go(func() { // who needs it does not wait
		if _, err := s.Pull(t.Context(), ref, nil); err != nil {
			t.Error(err)
		}
	})
	s.Mend(t.Context())
	img, err := s.Get(ref)
	if err != nil || img.ID != m.id() {
		t.Errorf("mended: %+v, %v", img, err)
	}
	pulled.Wait()
	if after, err := os.Stat(kept); err != nil || !os.SameFile(before, after) {
		t.Errorf("the layer that was not lost was fetched again: %v", err)
	}
	s.Close(t.Context()) // waits for what is removed
	if findings, _, err := layer.Check(t.Context(), s.Layers().Root(), true); err != nil || len(findings) != 0 {
		t.Errorf("check afterwards: %+v, %v", findings, err)
	}
}
