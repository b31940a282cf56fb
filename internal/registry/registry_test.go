package registry

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

const manifestBody = `{"schemaVersion":2}`

// fake is a registry with one manifest, for every name, and some blobs.
type fake struct {
	*httptest.Server
	requests atomic.Int32
}

// newFake starts a registry. Requests go through gate, which reports whether it
// has answered.
func newFake(t *testing.T, gate func(http.ResponseWriter, *http.Request) bool, blobs ...string) *fake {
	t.Helper()
	f := &fake{}
	f.Server = httptest.NewServer(f.handler(gate, blobs))
	t.Cleanup(f.Close)
	return f
}

func (f *fake) handler(gate func(http.ResponseWriter, *http.Request) bool, blobs []string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		if gate != nil && gate(w, r) {
			return
		}
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", MediaTypeManifest)
			io.WriteString(w, manifestBody)
			return
		}
		for _, b := range blobs {
			if strings.HasSuffix(r.URL.Path, "/blobs/"+digest.FromString(b).String()) {
				http.ServeContent(w, r, "", time.Time{}, strings.NewReader(b))
				return
			}
		}
		http.NotFound(w, r)
	})
}

func (f *fake) host() string {
	return strings.TrimPrefix(strings.TrimPrefix(f.URL, "http://"), "https://")
}

// client returns a Client whose hosts.toml for a.test is the given text.
func client(t *testing.T, hosts string) *Client {
	t.Helper()
	dir := t.TempDir()
	writeHosts(t, dir, "a.test", hosts)
	c := New(Config{Dir: dir})
	c.timing.retry = time.Millisecond
	return c
}

func writeHosts(t *testing.T, dir, host, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func server(f *fake) string { return fmt.Sprintf("server = %q\n", f.URL) }

func mirrors(fakes ...*fake) string {
	text := server(fakes[len(fakes)-1])
	for _, f := range fakes[:len(fakes)-1] {
		text += fmt.Sprintf("[host.%q]\n", f.URL)
	}
	return text
}

func repository(t *testing.T, c *Client, auth *Auth) (*Repository, error) {
	t.Helper()
	named, err := reference.ParseNormalizedNamed("a.test/some/repo")
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Repository(t.Context(), named, auth)
	if err == nil {
		t.Cleanup(r.Close)
	}
	return r, err
}

func manifest(t *testing.T, c *Client, auth *Auth) error {
	t.Helper()
	r, err := repository(t, c, auth)
	if err != nil {
		return err
	}
	m, err := r.Manifest(t.Context(), "v1")
	if err == nil && (string(m.Body) != manifestBody || m.Digest != digest.FromString(manifestBody) || m.MediaType != MediaTypeManifest) {
		t.Errorf("manifest %+v", m)
	}
	return err
}

func readBlob(t *testing.T, c *Client, body string) (string, error) {
	t.Helper()
	r, err := repository(t, c, nil)
	if err != nil {
		return "", err
	}
	rc, err := r.Blob(t.Context(), digest.FromString(body), int64(len(body)))
	if err != nil {
		return "", err
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	return string(data), err
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func TestBasicAuth(t *testing.T) {
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == basic("joe", "s:ecret") {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	c := client(t, server(f))
	encoded := base64.StdEncoding.EncodeToString([]byte("joe:s:ecret"))
	for _, tc := range []struct {
		name string
		auth *Auth
		want error
	}{
		{"user and password", &Auth{Username: "joe", Password: "s:ecret"}, nil},
		{"auth", &Auth{Auth: encoded}, nil},
		{"for this server", &Auth{Auth: encoded, ServerAddress: f.URL + "/v2/"}, nil},
		{"for another server", &Auth{Auth: encoded, ServerAddress: "b.test"}, errdefs.ErrPermissionDenied},
		{"none", nil, errdefs.ErrPermissionDenied},
		{"empty", &Auth{}, errdefs.ErrPermissionDenied},
		{"wrong", &Auth{Username: "joe", Password: "guess"}, errdefs.ErrPermissionDenied},
		{"no base64", &Auth{Auth: "%s3cret%"}, errdefs.ErrInvalidArgument},
		{"no colon", &Auth{Auth: base64.StdEncoding.EncodeToString([]byte("s3cret"))}, errdefs.ErrInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := manifest(t, c, tc.auth)
			if !errors.Is(err, tc.want) {
				t.Errorf("err = %v, want %v", err, tc.want)
			}
			for _, secret := range []string{"s:ecret", "s3cret", "guess", encoded} {
				if strings.Contains(fmt.Sprint(err), secret) {
					t.Errorf("the error shows a secret: %v", err)
				}
			}
		})
	}
}

// A token server as Docker and OAuth 2 have them, in front of a registry.
func TestTokenAuth(t *testing.T) {
	const scope = "repository:some/repo:pull"
	token := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		r.ParseForm()
		ok := r.Form.Get("scope") == scope && r.Form.Get("service") == "reg"
		switch {
		case r.Method == http.MethodGet: // anonymous
		case r.Form.Get("grant_type") == "password":
			ok = ok && r.Form.Get("username") == "joe" && r.Form.Get("password") == "pw"
		case r.Form.Get("grant_type") == "refresh_token":
			ok = ok && r.Form.Get("refresh_token") == "idtoken"
		}
		if !ok {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		kind := "anonymous"
		if r.Method == http.MethodPost {
			kind = r.Form.Get("grant_type")
		}
		json.NewEncoder(w).Encode(map[string]any{"token": kind, "access_token": kind, "expires_in": 60})
		return true
	})
	accept := map[string]bool{"Bearer password": true, "Bearer refresh_token": true, "Bearer fixed": true}
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if accept[r.Header.Get("Authorization")] {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="reg",scope=%q`, token.URL, scope))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	c := client(t, server(f))
	for _, tc := range []struct {
		name string
		auth *Auth
		want error
	}{
		{"password", &Auth{Username: "joe", Password: "pw"}, nil},
		{"identity token", &Auth{IdentityToken: "idtoken"}, nil},
		{"identity token before password", &Auth{IdentityToken: "idtoken", Username: "joe", Password: "old"}, nil},
		{"registry token", &Auth{RegistryToken: "fixed", Username: "joe", Password: "old"}, nil},
		{"wrong password", &Auth{Username: "joe", Password: "nope"}, errdefs.ErrPermissionDenied},
		{"wrong identity token", &Auth{IdentityToken: "nope"}, errdefs.ErrPermissionDenied},
		{"wrong registry token", &Auth{RegistryToken: "nope"}, errdefs.ErrPermissionDenied},
		{"registry token for another server", &Auth{RegistryToken: "fixed", ServerAddress: "b.test"}, errdefs.ErrPermissionDenied},
		{"anonymous", nil, errdefs.ErrPermissionDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := manifest(t, c, tc.auth); !errors.Is(err, tc.want) {
				t.Errorf("err = %v, want %v", err, tc.want)
			}
		})
	}
	accept["Bearer anonymous"] = true
	if err := manifest(t, c, nil); err != nil {
		t.Errorf("anonymous, where that is enough: %v", err)
	}
}

func TestTokenServerBroken(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		body   string
		want   error
	}{
		"down":     {500, "", errdefs.ErrUnavailable},
		"html":     {200, "<html>", errdefs.ErrUnavailable},
		"no token": {200, "{}", errdefs.ErrPermissionDenied},
		"busy":     {429, "", errdefs.ErrResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					w.WriteHeader(tc.status)
					io.WriteString(w, tc.body)
					return true
				}
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token"`, r.Host))
				w.WriteHeader(http.StatusUnauthorized)
				return true
			})
			if err := manifest(t, client(t, server(f)), nil); !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), "token server") {
				t.Errorf("err = %v, want %v of the token server", err, tc.want)
			}
		})
	}
}

// Credentials stay with the endpoints they are for, whoever redirects where.
func TestRedirect(t *testing.T) {
	var leaked atomic.Value
	elsewhere := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if h := r.Header.Get("Authorization") + r.Header.Get("X-Secret"); h != "" {
			leaked.Store(h)
		}
		return false
	}, "blob")
	thief := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if h := r.Header.Get("Authorization") + r.Header.Get("X-Secret"); h != "" {
			leaked.Store(h)
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="give"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	target := elsewhere
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("X-Secret") != "h" {
			t.Error("the endpoint did not get its header")
		}
		// localhost and 127.0.0.1 are different hosts to a client.
		http.Redirect(w, r, strings.Replace(target.URL, "127.0.0.1", "localhost", 1)+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	})
	c := client(t, server(f)+"[header]\nX-Secret = \"h\"\n")
	for _, auth := range []*Auth{{Username: "joe", Password: "pw"}, {RegistryToken: "fixed"}} {
		target = elsewhere
		if err := manifest(t, c, auth); err != nil {
			t.Error(err)
		}
		target = thief
		if err := manifest(t, c, auth); !errdefs.IsPermissionDenied(err) {
			t.Errorf("err = %v, want permission denied", err)
		}
	}
	if h := leaked.Load(); h != nil {
		t.Errorf("another host was shown %q", h)
	}
}

func TestMirrors(t *testing.T) {
	reply := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(status); return true }
	}
	good := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("ns") != "a.test" {
			t.Errorf("the mirror is not told whose repository is meant: %s", r.URL)
		}
		return false
	}, "blob")
	missing, broken, denied := newFake(t, reply(404)), newFake(t, reply(500)), newFake(t, reply(403))
	liar := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		io.WriteString(w, "evil")
		return true
	})
	down := newFake(t, nil)
	down.Close()

	for name, m := range map[string]*fake{"404": missing, "500": broken, "403": denied, "lies": liar, "down": down} {
		if err := manifest(t, client(t, mirrors(m, good)), nil); err != nil {
			t.Errorf("first mirror %s: %v", name, err)
		}
		if got, err := readBlob(t, client(t, mirrors(m, good)), "blob"); got != "blob" && name != "lies" {
			t.Errorf("blob, first mirror %s: %q, %v", name, got, err)
		}
	}
	err := manifest(t, client(t, mirrors(broken, down, missing)), nil)
	if !errdefs.IsNotFound(err) {
		t.Errorf("err = %v, want the registry's own not found", err)
	}
	for _, f := range []*fake{broken, down, missing} {
		if !strings.Contains(fmt.Sprint(err), f.host()) {
			t.Errorf("the error does not name %s: %v", f.host(), err)
		}
	}
	before := good.requests.Load()
	onlyPull := fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", missing.URL, good.URL)
	if err := manifest(t, client(t, onlyPull), nil); !errdefs.IsNotFound(err) || good.requests.Load() != before {
		t.Errorf("a mirror that may not resolve tags was asked for one, or: %v", err)
	}
	if got, err := readBlob(t, client(t, onlyPull), "blob"); got != "blob" {
		t.Errorf("blob from a mirror that may only pull: %q, %v", got, err)
	}
}

// A mirror that sends wrong blobs is not asked again while there is another.
func TestLiar(t *testing.T) {
	liar := newFake(t, func(w http.ResponseWriter, r *http.Request) bool { io.WriteString(w, "evil"); return true })
	good := newFake(t, nil, "blob")
	r, err := repository(t, client(t, mirrors(liar, good)), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "blob"} {
		rc, err := r.Blob(t.Context(), digest.FromString("blob"), 4)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(rc)
		rc.Close()
		var lie *LiarError
		if i == 0 && (!errors.As(err, &lie) || !errdefs.IsDataLoss(err) || !r.Others()) {
			t.Errorf("first time: %q, %v", data, err)
		}
		if i == 1 && (string(data) != want || err != nil) {
			t.Errorf("second time: %q, %v", data, err)
		}
	}
}

// hosts.toml is read anew for each repository, and must be right.
func TestHostsLive(t *testing.T) {
	one, two := newFake(t, nil), newFake(t, nil)
	c := client(t, server(one))
	if err := manifest(t, c, nil); err != nil || one.requests.Load() != 1 {
		t.Errorf("%v, %d requests", err, one.requests.Load())
	}
	writeHosts(t, c.config.Dir, "a.test", server(two))
	if err := manifest(t, c, nil); err != nil || two.requests.Load() != 1 {
		t.Errorf("after a change: %v, %d requests", err, two.requests.Load())
	}
	for text, want := range map[string]string{
		"server = ":                                        "hosts.toml",
		server(one) + "skip_verfy = true\n":                `line 2: unknown key "skip_verfy"`,
		server(one) + "capabilities = [\"fly\"]\n":         `unknown capability "fly"`,
		"[host.\"http://x\"]\ncapabilities = [\"swim\"]\n": `unknown capability "swim"`,
		"[host.\"http://x\"]\nca = 7\n":                    "ca is 7",
		"[host.\"http://x\"]\nclient = [[[\"x\"]]]\n":      "client is",
		"[host.\"http://x\"]\ndial_timeout = \"soon\"\n":   "dial_timeout",
		"[header]\nx = 1\n":                                `header "x"`,
		"server = \"http://[\"\n":                          "missing ']'",
	} {
		writeHosts(t, c.config.Dir, "a.test", text)
		if err := manifest(t, c, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("hosts.toml %q: %v, want failed precondition with %q", text, err, want)
		}
	}
	if one.requests.Load() != 1 {
		t.Error("a registry was asked though hosts.toml is wrong")
	}
	os.RemoveAll(filepath.Join(c.config.Dir, "a.test"))
	writeHosts(t, c.config.Dir, "_default", server(one))
	if err := manifest(t, c, nil); err != nil {
		t.Errorf("_default: %v", err)
	}
}

func TestTLS(t *testing.T) {
	f := &fake{}
	f.Server = httptest.NewUnstartedServer(f.handler(nil, nil))
	f.Config.ErrorLog = nil
	f.TLS = &tls.Config{}
	f.StartTLS()
	t.Cleanup(f.Close)
	c := client(t, server(f))
	if err := manifest(t, c, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("unknown authority: %v", err)
	}
	ca := filepath.Join(c.config.Dir, "a.test", "ca.pem")
	os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw}), 0o644)
	for _, extra := range []string{"ca = \"ca.pem\"\n", "skip_verify = true\n"} {
		writeHosts(t, c.config.Dir, "a.test", server(f)+extra)
		if err := manifest(t, c, nil); err != nil {
			t.Errorf("with %s: %v", extra, err)
		}
	}
}

func TestRetry(t *testing.T) {
	for name, tc := range map[string]struct {
		status   int
		header   string
		failures int32
		want     error
		requests int32
	}{
		"500 once":            {500, "", 1, nil, 2},
		"503 thrice":          {503, "", 3, nil, 4},
		"500 for ever":        {500, "", 99, errdefs.ErrUnavailable, maxAttempts},
		"429 once":            {429, "0", 1, nil, 2},
		"429, come back late": {429, "3600", 99, errdefs.ErrResourceExhausted, 1},
		"404":                 {404, "", 99, errdefs.ErrNotFound, 1},
		"403":                 {403, "", 99, errdefs.ErrPermissionDenied, 1},
		"400":                 {400, "", 99, errdefs.ErrInvalidArgument, 1},
		"410":                 {410, "", 99, errdefs.ErrFailedPrecondition, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var seen atomic.Int32
			f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
				if seen.Add(1) > tc.failures {
					return false
				}
				w.Header().Set("Retry-After", tc.header)
				w.WriteHeader(tc.status)
				return true
			})
			if err := manifest(t, client(t, server(f)), nil); !errors.Is(err, tc.want) {
				t.Errorf("err = %v, want %v", err, tc.want)
			}
			if seen.Load() != tc.requests {
				t.Errorf("%d requests, want %d", seen.Load(), tc.requests)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	for value, want := range map[string]time.Duration{"0": 0, "7": 7 * time.Second, "Thu, 01 Jan 1970 00:00:00 GMT": 0} {
		if got, ok := retryAfter(value); !ok || got != want {
			t.Errorf("retryAfter(%q) = %v, %v", value, got, ok)
		}
	}
	for _, value := range []string{"", "-1", "soon", "99999999999999999999"} {
		if got, ok := retryAfter(value); ok {
			t.Errorf("retryAfter(%q) = %v", value, got)
		}
	}
	if got, _ := retryAfter(time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)); got < 59*time.Minute {
		t.Errorf("an hour from now: %v", got)
	}
}

// A transfer that breaks off goes on where it stopped, with or without the
// server's help, and at the next endpoint when the first one gives up.
func TestResume(t *testing.T) {
	body := strings.Repeat("0123456789", 50_000)
	breaking := func(ranges bool, step int) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			start := 0
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &start); err == nil && ranges {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(body)-1, len(body)))
				w.Header().Set("Content-Length", fmt.Sprint(len(body)-start))
				w.WriteHeader(http.StatusPartialContent)
				io.WriteString(w, body[start:min(start+step, len(body))])
			} else {
				w.Header().Set("Content-Length", fmt.Sprint(len(body)))
				io.WriteString(w, body[:min(start+step, len(body))])
			}
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
	}
	for name, hosts := range map[string]string{
		"with ranges":    server(newFake(t, breaking(true, 120_000))),
		"without ranges": server(newFake(t, breaking(false, 120_000))),
		"at the next":    mirrors(newFake(t, breaking(false, 0)), newFake(t, nil, body)),
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := readBlob(t, client(t, hosts), body); got != body || err != nil {
				t.Errorf("%d bytes of %d, %v", len(got), len(body), err)
			}
		})
	}
}

func TestStall(t *testing.T) {
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, "x")
		w.(http.Flusher).Flush()
		for { // one byte now and then is no progress
			select {
			case <-time.After(10 * time.Millisecond):
				if _, err := io.WriteString(w, "x"); err != nil {
					return true
				}
				w.(http.Flusher).Flush()
			case <-release:
				return true
			case <-r.Context().Done():
				return true
			}
		}
	})
	c := client(t, server(f))
	c.timing.stall = 50 * time.Millisecond
	start := time.Now()
	_, err := readBlob(t, c, strings.Repeat("y", 1000))
	if err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("err = %v after %v", err, time.Since(start))
	}
}

func TestCancel(t *testing.T) {
	hang := newFake(t, func(w http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	r, err := repository(t, client(t, mirrors(hang, hang)), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := r.Manifest(ctx, "v1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v, want the caller's deadline", err)
	}
	if hang.requests.Load() != 1 {
		t.Errorf("%d requests, want no second endpoint after the deadline", hang.requests.Load())
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31mb\nc\xff" + strings.Repeat("x", 500)); strings.ContainsAny(got, "\x1b\n") || len(got) > 220 {
		t.Errorf("printable = %q", got)
	}
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("server = \"x\"\n[host.\"http://y\"]\ncapabilities = [\"pull\"]\nheader = {a = \"b\"}\n"))
	f.Fuzz(func(t *testing.T, data []byte) { parseHosts(data) })
}

// Close ends a Read that waits for the server.
func TestCloseWhileReading(t *testing.T) {
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, "x")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	r, err := repository(t, client(t, server(f)), nil)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := r.Blob(t.Context(), digest.FromString("x"), 1000)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { rc.Close() })
	if _, err := io.ReadAll(rc); !errors.Is(err, errClosed) {
		t.Errorf("err = %v, want the end of the blob", err)
	}
}
