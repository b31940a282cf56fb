package images

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
)

// Hosts are the registries whose names the tests use. All of them, and any
// other, are mapped to the one on loopback; none is ever asked.
var Hosts = []string{"docker.io", "registry.k8s.io", "k8s.gcr.io", "gcr.io", "quay.io", "ghcr.io", "_default"}

// Handler serves the images that Build made in dir. It speaks the registry
// protocol for every host at once, since the repositories have distinct names.
func Handler(dir string) (http.Handler, error) {
	s := store{dir: dir}
	if err := s.load(); err != nil {
		return nil, err
	}
	h := registry.New(
		registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)),
		registry.Logger(log.New(io.Discard, "", 0)),
	)
	for _, m := range s.manifests {
		for _, name := range m.Names {
			repo, tag := repository(name), strings.TrimPrefix(strings.TrimPrefix(name, repository(name)), ":")
			if tag == "" {
				tag = digest.FromBytes(m.Body).String()
			}
			req := httptest.NewRequest(http.MethodPut, "/v2/"+repo+"/manifests/"+tag, bytes.NewReader(m.Body))
			req.Header.Set("Content-Type", m.MediaType)
			w := httptest.NewRecorder()
			h.ServeHTTP(w, req)
			if w.Code != http.StatusCreated {
				return nil, fmt.Errorf("push %s: %d %s", name, w.Code, w.Body)
			}
		}
	}
	return h, nil
}

// Serve answers on a loopback address until the listener is closed.
func Serve(l net.Listener, h http.Handler) *http.Server {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	go srv.Serve(l) //nolint:errcheck // ends with the listener
	return srv
}

// WriteHosts writes a hosts.toml for each of the hosts that sends their clients
// to url and nowhere else.
func WriteHosts(dir, url string, hosts ...string) error {
	text := fmt.Sprintf("server = %q\n\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", url, url)
	for _, host := range hosts {
		if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// repository is a name without its tag.
func repository(name string) string {
	repo, _, _ := strings.Cut(name, ":")
	return repo
}
