package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/attribute"
	"golang.org/x/sync/errgroup"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/registry"
	"sampan.dev/sampan/internal/span"
)

// pullKey tells pulls apart: the same reference with the same credentials is the
// same pull.
type pullKey struct {
	ref  string
	auth [sha256.Size]byte
}

// Pull fetches the image that ref names and returns it. Pulls of the same image
// at the same time join; the work goes on while one of them waits. On error
// nothing that was fetched stays.
//
// Errors have the classes of package registry, and further ErrNotFound for an
// image that has no variant for this machine, ErrInvalidArgument for an image
// that is none, ErrDataLoss for layers that are not what their image says, and
// ErrResourceExhausted for a full disk.
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (Image, error) {
	named, err := parseReference(ref)
	if err != nil {
		return Image{}, fmt.Errorf("pull: %w", err)
	}
	key, err := newPullKey(named, auth)
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", named, err)
	}
	img, err := s.pulls.Do(ctx, key, func(ctx context.Context) (Image, error) {
		start := time.Now()
		ctx, end := span.Start(ctx, "pull", attribute.String("sampan.image", named.String()))
		img, err := s.pull(ctx, named, auth)
		end(err)
		s.figures.pulled(time.Since(start), err)
		s.log.Debug("pull ended", "op", "pull", "image", named.String(), "dur", time.Since(start), "err", err)
		return img, err
	})
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", named, err)
	}
	return img, nil
}

func newPullKey(named reference.Named, auth *Auth) (pullKey, error) {
	text, err := json.Marshal(auth)
	return pullKey{ref: named.String(), auth: sha256.Sum256(text)}, err
}

func (s *Store) pull(ctx context.Context, named reference.Named, auth *Auth) (Image, error) {
	repo, err := s.client.Repository(ctx, named, auth)
	if err != nil {
		return Image{}, err
	}
	defer repo.Close()
	resolving, end := span.Start(ctx, "pull: resolve")
	m, digests, err := resolve(resolving, repo, object(named))
	end(err)
	if err != nil {
		return Image{}, err
	}
	raw, err := fetchConfig(ctx, repo, *m.Config)
	if err != nil {
		return Image{}, err
	}
	config, err := parseConfig(raw)
	if err != nil {
		return Image{}, err
	}
	if err := checkConfig(config, len(*m.Layers)); err != nil {
		return Image{}, err
	}

	defer s.lease(config.RootFS.DiffIDs)()
	fault.Point("image.leased")
	if err := s.fetchLayers(ctx, repo, config.RootFS.DiffIDs, *m.Layers); err != nil {
		return Image{}, err
	}
	fault.Point("image.layers-fetched")
	n := newImage{id: m.Config.Digest.String(), raw: raw, config: config, checkpoint: m.checkpointed()}
	for _, d := range digests {
		n.digests = append(n.digests, digestName(named, d))
	}
	if tagged, ok := named.(reference.Tagged); ok {
		n.names = []string{tagged.String()}
	}
	for _, l := range *m.Layers {
		n.blobs = append(n.blobs, blob{Digest: l.Digest, Size: l.Size})
	}
	defer s.layers.SyncSoon()
	return s.install(n)
}

// resolve fetches the manifest for this machine that tagOrDigest leads to. It
// also returns the digests the image can be asked for by: of what the reference
// points to.
func resolve(ctx context.Context, repo *registry.Repository, tagOrDigest string) (document, []digest.Digest, error) {
	var named []digest.Digest
	for range maxNested {
		m, err := repo.Manifest(ctx, tagOrDigest)
		if err != nil {
			return document{}, nil, err
		}
		if named == nil {
			named = []digest.Digest{m.Digest}
		}
		d, err := parseDocument(m.Body, m.MediaType)
		if err != nil {
			return document{}, nil, err
		}
		if !d.isIndex() {
			return d, named, nil
		}
		chosen, err := d.choose()
		if err != nil {
			return document{}, nil, err
		}
		tagOrDigest = chosen.Digest.String()
	}
	return document{}, nil, fmt.Errorf("manifest: more than %d indexes in each other: %w", maxNested, errdefs.ErrInvalidArgument)
}

// fetchConfig fetches an image's configuration.
func fetchConfig(ctx context.Context, repo *registry.Repository, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > maxConfig {
		return nil, fmt.Errorf("image configuration of %d bytes: more than %d: %w", d.Size, maxConfig, errdefs.ErrInvalidArgument)
	}
	if d.Digest.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("image configuration %s: only sha256 makes an image id: %w", d.Digest, errdefs.ErrNotImplemented)
	}
	var raw []byte
	err := retryLiars(repo, func() error {
		r, err := repo.Blob(ctx, d.Digest, d.Size)
		if err != nil {
			return err
		}
		defer r.Close()
		raw, err = io.ReadAll(r)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("image configuration: %w", err)
	}
	return raw, nil
}

// fetchLayers brings all layers of an image into the layer store, several at a
// time.
func (s *Store) fetchLayers(ctx context.Context, repo *registry.Repository, diffIDs []digest.Digest, blobs []ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(layersAtOnce())
	for i, id := range diffIDs {
		g.Go(func() error {
			ctx, end := span.Start(ctx, "pull: layer", attribute.String("sampan.layer", blobs[i].Digest.String()), attribute.Int64("sampan.bytes", blobs[i].Size))
			err := retryLiars(repo, func() error {
				_, err := s.layers.Apply(ctx, id, s.slotted(func(ctx context.Context) (io.ReadCloser, error) {
					r, err := repo.Blob(ctx, blobs[i].Digest, blobs[i].Size)
					if err != nil {
						return nil, err
					}
					return s.figures.counting(r), nil
				}))
				return err
			})
			end(err)
			return err
		})
	}
	return g.Wait()
}

// maxLiars bounds how many endpoints are given up one after the other.
const maxLiars = 8

// retryLiars calls fetch again when an endpoint has sent a blob with a wrong
// digest, as long as there are other endpoints.
func retryLiars(repo *registry.Repository, fetch func() error) error {
	var err error
	for range maxLiars {
		err = fetch()
		var liar *registry.LiarError
		if !errors.As(err, &liar) || !repo.Others() {
			break
		}
	}
	return err
}

// slotted opens a source when there is a slot for it, and gives the slot back
// when it is closed.
func (s *Store) slotted(open layer.Source) layer.Source {
	return func(ctx context.Context) (io.ReadCloser, error) {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		r, err := open(ctx)
		if err != nil {
			<-s.slots
			return nil, err
		}
		return &slotReader{ReadCloser: r, slots: s.slots}, nil
	}
}

type slotReader struct {
	io.ReadCloser
	slots chan struct{}
}

func (r *slotReader) Close() error {
	err := r.ReadCloser.Close()
	if r.slots != nil {
		<-r.slots
		r.slots = nil
	}
	return err
}
