package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
)

// endpoint is one server that has the repository, or a copy of it.
type endpoint struct{ docker.RegistryHost }

// endpoints returns the servers to ask about name, in order.
func (c *Client) endpoints(ctx context.Context, name reference.Named, auth *Auth) ([]endpoint, error) {
	username, secret, err := auth.secret()
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool) // hosts that may see the credentials
	options := config.HostOptions{
		UpdateClient: tuneTransport,
		Credentials: func(host string) (string, string, error) {
			if !known[host] {
				return "", "", nil
			}
			return username, secret, nil
		},
	}
	if c.config.Dir != "" {
		options.HostDir = hostDir(c.config.Dir)
	}
	hosts, err := config.ConfigureHosts(quiet(ctx), options)(reference.Domain(name))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	endpoints := make([]endpoint, 0, len(hosts))
	for _, h := range hosts {
		if auth != nil && auth.coversHost(h.Host) {
			known[h.Host] = true
		}
		client := *h.Client // endpoints may share one
		client.CheckRedirect = keepHeaderHome(h)
		h.Client = &client
		endpoints = append(endpoints, endpoint{h})
	}
	if auth != nil && auth.RegistryToken != "" {
		for i := range endpoints {
			endpoints[i].Authorizer = tokenAuthorizer{token: auth.RegistryToken, hosts: known}
		}
	}
	return endpoints, nil
}

// tuneTransport lets layers that are fetched side by side keep their connections.
func tuneTransport(client *http.Client) error {
	if t, ok := client.Transport.(*http.Transport); ok {
		t.MaxIdleConnsPerHost = 8
	}
	return nil
}

// keepHeaderHome follows redirects without the header fields that hosts.toml
// has for the endpoint.
func keepHeaderHome(h docker.RegistryHost) func(*http.Request, []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) >= 10 {
			return errors.New("more than 10 redirects")
		}
		if req.URL.Host != h.Host {
			for key := range h.Header {
				req.Header.Del(key)
			}
		}
		return nil
	}
}

// hostDir finds the directory for a host, and makes sure that its hosts.toml can
// be understood: the library would log an error and go on without it, and ask
// the wrong server.
func hostDir(root string) func(host string) (string, error) {
	find := config.HostDirFromRoot(root)
	return func(host string) (string, error) {
		dir, err := find(host)
		if err != nil {
			return dir, err
		}
		return dir, checkHosts(filepath.Join(dir, "hosts.toml"))
	}
}

// hostFields are the keys of a hosts.toml, for the server itself or for a host.
type hostFields struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// checkHosts reads a hosts.toml strictly. There need not be one.
func checkHosts(path string) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := parseHosts(data); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func parseHosts(data []byte) error {
	var doc struct {
		hostFields
		Server string                `toml:"server"`
		Hosts  map[string]hostFields `toml:"host"`
	}
	decoder := toml.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&doc); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			unknown := strict.Errors[0]
			line, _ := unknown.Position()
			return fmt.Errorf("line %d: unknown key %q", line, strings.Join(unknown.Key(), "."))
		}
		return err
	}
	if err := doc.hostFields.check(doc.Server); err != nil {
		return err
	}
	for host, fields := range doc.Hosts {
		if err := fields.check(host); err != nil {
			return fmt.Errorf("host %q: %w", host, err)
		}
	}
	return nil
}

// check finds what the library would stumble over.
func (f hostFields) check(server string) error {
	if !strings.HasPrefix(server, "http") {
		server = "https://" + server
	}
	if _, err := url.Parse(server); err != nil {
		return err
	}
	if !isStrings(f.CA, 1) {
		return fmt.Errorf("ca is %v: want a file name or a list of them", f.CA)
	}
	if !isStrings(f.Client, 2) {
		return fmt.Errorf("client is %v: want a file name, or a list of file names or pairs of them", f.Client)
	}
	if list, ok := f.Client.([]any); ok {
		for _, e := range list {
			if pair, ok := e.([]any); ok && len(pair) != 2 {
				return fmt.Errorf("client has %v: want a certificate and a key", pair)
			}
		}
	}
	for key, value := range f.Header {
		if !isStrings(value, 1) {
			return fmt.Errorf("header %q is %v: want a text or a list of them", key, value)
		}
	}
	if _, err := time.ParseDuration(f.DialTimeout); f.DialTimeout != "" && err != nil {
		return fmt.Errorf("dial_timeout: %w", err)
	}
	for _, c := range f.Capabilities {
		if !slices.Contains([]string{"pull", "resolve", "push", "referrers"}, strings.ToLower(c)) {
			return fmt.Errorf("unknown capability %q (there are pull, resolve, push, referrers)", c)
		}
	}
	return nil
}

// isStrings reports whether v is absent, a string, or a list of strings, with
// lists in each other up to the given depth.
func isStrings(v any, depth int) bool {
	switch v := v.(type) {
	case nil, string:
		return true
	case []any:
		return depth > 0 && !slices.ContainsFunc(v, func(e any) bool { return e == nil || !isStrings(e, depth-1) })
	}
	return false
}

// quiet keeps the library from writing to a log of its own.
func quiet(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(logger))
}
