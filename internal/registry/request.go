package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// request is one question to one endpoint. It may be sent several times.
type request struct {
	endpoint endpoint
	method   string
	url      string
	header   http.Header
}

func (r *Repository) request(e endpoint, method, object string) *request {
	u := url.URL{Scheme: e.Scheme, Host: e.Host, Path: path.Join("/", e.Path, reference.Path(r.name), object)}
	if domain := reference.Domain(r.name); canonicalHost(domain) != canonicalHost(e.Host) {
		u.RawQuery = url.Values{"ns": {domain}}.Encode() // tells a mirror whose repository is meant
	}
	header := e.Header.Clone()
	if header == nil {
		header = make(http.Header)
	}
	header.Set("User-Agent", "sampan")
	header.Set("Accept-Encoding", "identity") // the digest is of the bytes as they are
	return &request{endpoint: e, method: method, url: u.String(), header: header}
}

// fail says which request an error belongs to.
func (q *request) fail(err error) error {
	if errdefs.IsCanceled(err) || errdefs.IsDeadlineExceeded(err) {
		return err
	}
	return fmt.Errorf("%s %s: %w", q.method, q.url, err)
}

// maxAttempts bounds how often a request is sent to an endpoint that has no
// other behind it. An endpoint that has is asked once.
const maxAttempts = 4

// send asks until there is an answer with a successful status. The caller closes
// the body. Errors that may be temporary are waited for, longer each time.
func (r *Repository) send(ctx context.Context, q *request, last bool) (*http.Response, error) {
	ctx = docker.WithScope(quiet(ctx), "repository:"+reference.Path(r.name)+":pull")
	for attempt := 1; ; attempt++ {
		resp, err := q.sendOnce(ctx)
		if err == nil {
			return resp, nil
		}
		wait, ok := r.pause(err, attempt)
		if !last || !ok || attempt == maxAttempts {
			return nil, q.fail(err)
		}
		r.log.Debug("registry request is tried again", "op", q.method+" "+q.url, "dur", wait, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// pause tells how long to wait after err before the next attempt, and whether
// there should be one.
func (r *Repository) pause(err error, attempt int) (time.Duration, bool) {
	wait := r.timing.retry << (attempt - 1)
	wait += time.Duration(rand.Int64N(int64(wait)/2 + 1)) // so that nodes do not come back all at once
	var status *statusError
	if !errors.As(err, &status) {
		return wait, errdefs.IsUnavailable(err)
	}
	if !status.temporary() {
		return 0, false
	}
	asked, ok := retryAfter(status.retryAfter)
	if !ok {
		return wait, true
	}
	return max(wait, asked), asked <= r.timing.after
}

// retryAfter parses a Retry-After header: seconds, or a date.
func retryAfter(value string) (time.Duration, bool) {
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, true
	}
	if date, err := http.ParseTime(value); err == nil {
		return max(0, time.Until(date)), true
	}
	return 0, false
}

// maxChallenges bounds how often one attempt answers a request for credentials.
const maxChallenges = 2

// sendOnce asks once, proving who asks if the endpoint wants to know.
func (q *request) sendOnce(ctx context.Context) (*http.Response, error) {
	var refused []*http.Response
	for {
		resp, err := q.roundTrip(ctx)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode >= 200 && resp.StatusCode <= 299 {
			return resp, nil
		}
		status := newStatusError(resp)
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized || q.endpoint.Authorizer == nil {
			return nil, status
		}
		if refused = append(refused, resp); len(refused) > maxChallenges {
			return nil, status
		}
		if err := q.endpoint.Authorizer.AddResponses(ctx, refused); errdefs.IsNotImplemented(err) {
			return nil, status
		} else if err != nil {
			return nil, fmt.Errorf("%w: %w", status, authError(ctx, err))
		}
	}
}

func (q *request) roundTrip(ctx context.Context) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, q.method, q.url, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	req.Header = q.header.Clone()
	if q.endpoint.Authorizer != nil {
		if err := q.endpoint.Authorizer.Authorize(ctx, req); err != nil {
			return nil, authError(ctx, err)
		}
	}
	resp, err := q.endpoint.Client.Do(req)
	if err != nil {
		return nil, transportError(ctx, err)
	}
	return resp, nil
}
