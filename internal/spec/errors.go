package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// FieldError says what is wrong with one field of a request and what to do
// about it. It wraps errdefs.ErrInvalidArgument if no host could serve the
// request, errdefs.ErrFailedPrecondition if only this one, or this handler, cannot.
type FieldError struct {
	Field  string // its path in the message, e.g. "linux.resources.cpu_quota"
	Value  any
	Cause  string
	Remedy string // may be empty where the cause says it

	kind error
}

// Error returns `field: "value": cause; remedy`.
func (e *FieldError) Error() string {
	text := e.Field + ": "
	switch v := e.Value.(type) {
	case nil:
	case string:
		text += fmt.Sprintf("%.256q: ", v)
	case fmt.Stringer:
		text += v.String() + ": "
	default:
		text += fmt.Sprintf("%v: ", v)
	}
	text += e.Cause
	if e.Remedy != "" {
		text += "; " + e.Remedy
	}
	return text
}

// Unwrap returns the errdefs sentinel.
func (e *FieldError) Unwrap() error { return e.kind }

func invalid(field string, value any, cause, remedy string) error {
	return &FieldError{Field: field, Value: value, Cause: cause, Remedy: remedy, kind: errdefs.ErrInvalidArgument}
}

func impossible(field string, value any, cause, remedy string) error {
	return &FieldError{Field: field, Value: value, Cause: cause, Remedy: remedy, kind: errdefs.ErrFailedPrecondition}
}
