package api

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// classes pairs the classes of errors with their codes on the wire.
var classes = []struct {
	err  error
	code codes.Code
}{
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// Code returns the code under which err travels.
func Code(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return codes.Unknown
}

// ToWire makes err ready to travel: its class becomes a code, its text stays.
func ToWire(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(Code(err), err.Error())
}

// FromWire turns an error that travelled back into one of its class, with the
// text it had. Errors that did not travel are returned as they are.
func FromWire(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	return Remote(s.Code(), s.Message())
}

// Remote returns the error that the other side described by code and message.
func Remote(code codes.Code, message string) error {
	e := &remoteError{message: message}
	for _, c := range classes {
		if c.code == code {
			e.class = c.err
		}
	}
	return e
}

// IsRemote tells whether err is, or wraps, an error of the other side.
func IsRemote(err error) bool {
	var e *remoteError
	return errors.As(err, &e)
}

// remoteError is an error of the other side: its text names its class already.
type remoteError struct {
	message string
	class   error // nil if unknown
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.class }
