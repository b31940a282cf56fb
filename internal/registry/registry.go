// Package registry fetches manifests and blobs from OCI distribution
// registries: which endpoints a repository has (hosts.toml), how to prove who
// is asking, what to retry and when to try the next endpoint.
//
// Everything it hands out is verified against its digest. It stores nothing, and
// does not know what a manifest or a blob is for.
//
// Endpoints are tried in the order of hosts.toml, mirrors first and the registry
// itself last. When all fail, the error names each of them with its cause, and
// is of the class of the last one, which is the registry's own word:
// ErrNotFound, ErrPermissionDenied (401, 403), ErrResourceExhausted (429),
// ErrDataLoss (what came is not what was asked for), ErrUnavailable (no or no
// sensible answer), ErrInvalidArgument, ErrFailedPrecondition (hosts.toml).
package registry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Config says how to reach registries.
type Config struct {
	// Dir holds a directory per registry with a hosts.toml, in containerd's
	// layout. It is read anew for each repository, so that a change needs no
	// restart. Empty means none.
	Dir    string
	Logger *slog.Logger
}

// Client reaches registries.
type Client struct {
	config Config
	log    *slog.Logger
	timing timing
}

// timing says how patient a Client is.
type timing struct {
	retry time.Duration // before the second attempt; later ones wait longer
	after time.Duration // the longest Retry-After that is waited for
	stall time.Duration // without progress, a transfer is given up
}

// New returns a Client.
func New(c Config) *Client {
	logger := c.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Client{config: c, log: logger, timing: timing{retry: 200 * time.Millisecond, after: 20 * time.Second, stall: 45 * time.Second}}
}

// Repository is one repository of a registry, as seen with certain credentials.
type Repository struct {
	name      reference.Named
	endpoints []endpoint
	timing    timing
	log       *slog.Logger

	mu    sync.Mutex
	liars map[string]bool // hosts that sent a blob with a wrong digest
}

// Repository prepares access to the repository of name. It reads hosts.toml, but
// contacts nobody. The caller closes the result.
func (c *Client) Repository(ctx context.Context, name reference.Named, auth *Auth) (*Repository, error) {
	endpoints, err := c.endpoints(ctx, name, auth)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", name.Name(), err)
	}
	return &Repository{name: reference.TrimNamed(name), endpoints: endpoints, timing: c.timing, log: c.log, liars: make(map[string]bool)}, nil
}

// Close drops the connections that are kept for the next request.
func (r *Repository) Close() {
	for _, e := range r.endpoints {
		e.Client.CloseIdleConnections()
	}
}

// Manifest is a manifest or an index, as a registry keeps it.
type Manifest struct {
	Digest    digest.Digest
	MediaType string
	Body      []byte
}

// MaxManifest bounds the size of a manifest.
const MaxManifest = 4 << 20

// manifestTimeout bounds how long one endpoint may take for a manifest, with all
// attempts.
const manifestTimeout = 90 * time.Second

// Media types of manifests.
const (
	MediaTypeIndex          = "application/vnd.oci.image.index.v1+json"
	MediaTypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// Manifest fetches the manifest called tagOrDigest. A manifest asked for by tag
// is what the first endpoint says that may resolve tags.
func (r *Repository) Manifest(ctx context.Context, tagOrDigest string) (Manifest, error) {
	need := docker.HostCapabilityPull
	want, err := digest.Parse(tagOrDigest)
	if err != nil {
		need |= docker.HostCapabilityResolve
		want = ""
	}
	var m Manifest
	err = r.each(need, func(e endpoint, last bool) error {
		var err error
		m, err = r.manifestFrom(ctx, e, last, tagOrDigest, want)
		return err
	})
	return m, err
}

func (r *Repository) manifestFrom(ctx context.Context, e endpoint, last bool, tagOrDigest string, want digest.Digest) (Manifest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, manifestTimeout, fmt.Errorf("no answer in %v: %w", manifestTimeout, errdefs.ErrUnavailable))
	defer cancel()
	req := r.request(e, http.MethodGet, "manifests/"+tagOrDigest)
	for _, t := range []string{MediaTypeIndex, MediaTypeManifest, MediaTypeDockerList, MediaTypeDockerManifest} {
		req.header.Add("Accept", t)
	}
	resp, err := r.send(ctx, req, last)
	if err != nil {
		return Manifest{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	if err != nil {
		return Manifest{}, req.fail(transportError(ctx, err))
	}
	m := Manifest{Digest: digest.FromBytes(body), MediaType: mediaType(resp.Header), Body: body}
	if want != "" && want.Algorithm() != digest.Canonical {
		m.Digest = want.Algorithm().FromBytes(body)
	}
	if err := m.check(want, digest.Digest(resp.Header.Get("Docker-Content-Digest"))); err != nil {
		return Manifest{}, req.fail(err)
	}
	return m, nil
}

// check holds a manifest against the digest it was asked for by, and the one its
// sender claims it has.
func (m Manifest) check(want, claimed digest.Digest) error {
	switch {
	case len(m.Body) > MaxManifest:
		return fmt.Errorf("the manifest is larger than %d bytes: %w", MaxManifest, errdefs.ErrInvalidArgument)
	case !looksLikeJSON(m.Body):
		return fmt.Errorf("the answer is no manifest but %s; is this a registry? %w", describe(m.MediaType, m.Body), errdefs.ErrUnavailable)
	case want != "" && m.Digest != want:
		return fmt.Errorf("the manifest that came has the digest %s, not %s: %w", m.Digest, want, errdefs.ErrDataLoss)
	case want == "" && claimed != "" && claimed.Validate() == nil && claimed.Algorithm() == digest.Canonical && claimed != m.Digest:
		return fmt.Errorf("the manifest is announced with the digest %s but has %s: %w", claimed, m.Digest, errdefs.ErrDataLoss)
	}
	return nil
}

// each tries endpoints in turn until one succeeds. What a cancelled context
// causes ends the turn.
func (r *Repository) each(need docker.HostCapabilities, try func(e endpoint, last bool) error) error {
	var able []endpoint
	for _, e := range r.endpoints {
		if e.Capabilities.Has(need) {
			able = append(able, e)
		}
	}
	if len(able) == 0 {
		return fmt.Errorf("repository %s: hosts.toml names no endpoint for this: %w", r.name.Name(), errdefs.ErrFailedPrecondition)
	}
	var failed endpointErrors
	for i, e := range able {
		err := try(e, i == len(able)-1)
		if err == nil {
			return nil
		}
		if errdefs.IsCanceled(err) || errdefs.IsDeadlineExceeded(err) {
			return err
		}
		failed = append(failed, err)
	}
	if len(failed) == 1 {
		return failed[0]
	}
	return failed
}
