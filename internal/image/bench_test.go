package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/registry"
)

// BenchmarkPull pulls an image of the size in SAMPAN_BENCH_FILES files (40000
// makes about a gigabyte) from a registry on loopback.
func BenchmarkPull(b *testing.B) {
	files := 2000
	fmt.Sscan(os.Getenv("SAMPAN_BENCH_FILES"), &files)
	for _, compression := range []string{"gzip", "zstd"} {
		blobs, manifest := benchImage(b, files, compression)
		mux := http.NewServeMux()
		var size int64
		for d, data := range blobs {
			size += int64(len(data))
			mux.HandleFunc("/v2/x/blobs/"+d.String(), func(w http.ResponseWriter, r *http.Request) {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
			})
		}
		mux.HandleFunc("/v2/x/manifests/v", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", registry.MediaTypeManifest)
			w.Write(manifest)
		})
		server := httptest.NewServer(mux)
		b.Cleanup(server.Close)
		host := strings.TrimPrefix(server.URL, "http://")
		b.Run(compression, func(b *testing.B) {
			b.SetBytes(size)
			var cpu time.Duration
			for b.Loop() {
				b.StopTimer()
				root := b.TempDir()
				s, err := Open(Config{Root: filepath.Join(root, "i"), LayerRoot: filepath.Join(root, "l")})
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				before := cpuTime()
				if _, err := s.Pull(b.Context(), host+"/x:v", nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				cpu += cpuTime() - before
				start := time.Now()
				if err := s.Remove(b.Context(), host+"/x:v"); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(time.Since(start).Microseconds()), "µs/remove")
				s.Close(b.Context())
				b.StartTimer()
			}
			b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
		})
	}
}

// cpuTime returns what this process, the registry included, has used. It tells
// more than the clock does on a machine that is busy with other things.
func cpuTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchImage makes an image of five layers with files of text that compresses to
// about a third.
func benchImage(b *testing.B, files int, compression string) (map[digest.Digest][]byte, []byte) {
	random := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 5000)
	for i := range words {
		words[i] = fmt.Sprintf("%x", random.Uint64()>>(random.UintN(40)))
	}
	blobs := make(map[digest.Digest][]byte)
	add := func(data []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
		blobs[d.Digest] = data
		return d
	}
	config := ocispec.Image{}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: registry.MediaTypeManifest}
	for layer := range 5 {
		var packed bytes.Buffer
		var z io.WriteCloser = gzip.NewWriter(&packed)
		if compression == "zstd" {
			z, _ = zstd.NewWriter(&packed)
		}
		plain := digest.SHA256.Digester()
		w := tar.NewWriter(io.MultiWriter(z, plain.Hash()))
		for i := range files / 5 {
			if i%20 == 0 {
				w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("l%d/d%d", layer, i/20), Mode: 0o755})
			}
			var body strings.Builder
			for n := random.IntN(7000); n > 0; n-- {
				body.WriteString(words[random.IntN(len(words))])
				body.WriteByte(' ')
			}
			w.WriteHeader(&tar.Header{Name: fmt.Sprintf("l%d/d%d/f%d", layer, i/20, i), Mode: 0o644, Size: int64(body.Len()), ModTime: time.Unix(1e9, 0)})
			io.WriteString(w, body.String())
		}
		w.Close()
		z.Close()
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, plain.Digest())
		m.Layers = append(m.Layers, add(packed.Bytes()))
	}
	m.Config = add(asJSON(config))
	return blobs, asJSON(m)
}
