// Package span says what a request is spending its time on, in OpenTelemetry's
// terms. A span belongs to the one in its context; where there is none, because
// nobody collects spans, it costs next to nothing.
package span

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// Scope is the name that all spans are made under.
const Scope = "sampan.dev/sampan"

// Start begins a part of the work that ctx is for. End is called once, with the
// part's error.
func Start(ctx context.Context, name string, attributes ...attribute.KeyValue) (_ context.Context, end func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, func(error) {}
	}
	ctx, s := parent.TracerProvider().Tracer(Scope).Start(ctx, name, trace.WithAttributes(attributes...))
	return ctx, func(err error) { End(s, err) }
}

// End ends a span and says whether it has failed.
func End(s trace.Span, err error) {
	if err != nil {
		s.SetStatus(codes.Error, err.Error())
	}
	s.End()
}
