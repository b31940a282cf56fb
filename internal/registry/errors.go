package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// endpointErrors is what each endpoint failed with, in the order they were
// tried. It is of the class of the last one.
type endpointErrors []error

func (e endpointErrors) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return fmt.Sprintf("all %d endpoints failed: %s", len(e), strings.Join(texts, "; "))
}

func (e endpointErrors) Unwrap() error { return e[len(e)-1] }

// LiarError says that an endpoint sent a blob whose content has another digest.
type LiarError struct {
	Host string
	Err  error
}

func (e *LiarError) Error() string { return e.Err.Error() }
func (e *LiarError) Unwrap() error { return e.Err }

// statusError is an answer with a status that is no success.
type statusError struct {
	status     int
	text       string // "404 Not Found"
	detail     string // what the registry says about it
	retryAfter string
}

func (e *statusError) Error() string {
	s := e.text
	if e.detail != "" {
		s += ": " + e.detail
	}
	if e.retryAfter != "" {
		s += fmt.Sprintf(" (try again after %s)", e.retryAfter)
	}
	if e.status == http.StatusUnauthorized {
		s += " (the repository does not exist, or needs other credentials)"
	}
	return s
}

func (e *statusError) Unwrap() error { return statusClass(e.status) }

// temporary reports whether the same request may succeed a little later.
func (e *statusError) temporary() bool {
	switch e.status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

func statusClass(status int) error {
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case status == http.StatusNotFound:
		return errdefs.ErrNotFound
	case status == http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case status == http.StatusBadRequest:
		return errdefs.ErrInvalidArgument
	case status == http.StatusRequestTimeout, status >= 500,
		status == http.StatusRequestedRangeNotSatisfiable: // it does not have what it began to send
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrFailedPrecondition
}

// maxErrorBody bounds how much of an error's body is read.
const maxErrorBody = 16 << 10

// newStatusError reads the registry's explanation from an answer.
func newStatusError(resp *http.Response) *statusError {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	return &statusError{
		status:     resp.StatusCode,
		text:       fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode)),
		detail:     explanation(body),
		retryAfter: printable(resp.Header.Get("Retry-After")),
	}
}

// explanation finds the words in the JSON error of the distribution
// specification, or returns nothing.
func explanation(body []byte) string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	first := doc.Errors[0]
	return strings.Trim(printable(first.Code)+": "+printable(first.Message), ": ")
}

// printable makes text from a stranger fit for an error message.
func printable(s string) string {
	const limit = 200
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// transportError classifies an error below HTTP. Its text has no URL: that may
// have been redirected to one with a secret in it.
func transportError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the connection ended before the answer did: %w", errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// authError classifies what went wrong while getting the right to ask.
func authError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.As(err, &status):
		class := statusClass(status.StatusCode)
		if status.StatusCode == http.StatusBadRequest || status.StatusCode == http.StatusNotFound {
			class = errdefs.ErrPermissionDenied
		}
		return fmt.Errorf("the token server answered %s: %w", strings.Trim(printable(status.Status)+": "+explanation(status.Body), ": "), class)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, auth.ErrNoToken):
		return fmt.Errorf("token server: %w: %w", err, errdefs.ErrPermissionDenied)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return fmt.Errorf("token server: %w: %w", err, errdefs.ErrUnavailable)
}

func mediaType(h http.Header) string {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

func looksLikeJSON(body []byte) bool {
	return json.Valid(body) && strings.HasPrefix(strings.TrimSpace(string(body)), "{")
}

// describe says in a few words what came instead of a manifest.
func describe(mediaType string, body []byte) string {
	if len(body) == 0 {
		return "an empty body"
	}
	if mediaType == "" {
		mediaType = "something of unknown type"
	}
	start := strings.TrimSpace(string(body[:min(len(body), 40)]))
	return fmt.Sprintf("%s that starts with %q", mediaType, start)
}
