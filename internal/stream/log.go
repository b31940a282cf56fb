package stream

import (
	"context"
	"log/slog"
)

// ForDebugging returns a handler that takes every record for a debugging aid,
// however bad it calls itself. What goes wrong in a session is logged with it;
// the libraries call it unhandled.
func ForDebugging(h slog.Handler) slog.Handler { return forDebugging{h} }

type forDebugging struct{ slog.Handler }

func (f forDebugging) Enabled(ctx context.Context, _ slog.Level) bool {
	return f.Handler.Enabled(ctx, slog.LevelDebug)
}

func (f forDebugging) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return f.Handler.Handle(ctx, r)
}

func (f forDebugging) WithAttrs(attrs []slog.Attr) slog.Handler {
	return forDebugging{f.Handler.WithAttrs(attrs)}
}

func (f forDebugging) WithGroup(name string) slog.Handler {
	return forDebugging{f.Handler.WithGroup(name)}
}
