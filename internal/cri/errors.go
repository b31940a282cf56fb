package cri

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errorCodes maps classes of errors to codes; the first match counts.
var errorCodes = []struct {
	class error
	code  codes.Code
}{
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{unix.ENOSPC, codes.ResourceExhausted},
	{unix.EDQUOT, codes.ResourceExhausted},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrUnauthenticated, codes.Unauthenticated},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
}

// grpcError gives an error its code. One that has a code keeps it.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, e := range errorCodes {
		if errors.Is(err, e.class) {
			return status.Error(e.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// finish turns what came of a call into what its client gets, and logs it; calls
// that succeed only for debugging, since the kubelet makes many of them.
func (e edge) finish(ctx context.Context, method string, start time.Time, panicked any, err error) error {
	if panicked != nil {
		e.log.Error("panic", "op", path.Base(method), "err", panicked, "stack", string(debug.Stack()))
		err = status.Error(codes.Internal, fmt.Sprintf("%s: the daemon hit a bug: %v", path.Base(method), panicked))
	}
	err = grpcError(err)
	dur := time.Since(start).Round(10 * time.Microsecond)
	switch status.Code(err) {
	case codes.OK:
		e.log.DebugContext(ctx, "call", "op", path.Base(method), "dur", dur)
	case codes.NotFound, codes.Canceled, codes.Unimplemented:
		e.log.InfoContext(ctx, "call", "op", path.Base(method), "dur", dur, "err", err)
	default:
		e.log.WarnContext(ctx, "call failed", "op", path.Base(method), "dur", dur, "err", err)
	}
	return err
}
