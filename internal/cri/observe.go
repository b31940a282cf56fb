package cri

import (
	"context"
	"path"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sampan.dev/sampan/internal/metrics"
	"sampan.dev/sampan/internal/span"
)

// Figures count calls; nil counts nothing.
type Figures struct {
	duration *metrics.Histogram
	failed   *metrics.Counter
	inFlight *metrics.Gauge
}

// NewFigures adds the figures of calls to a registry.
func NewFigures(r *metrics.Registry) *Figures {
	return &Figures{
		duration: r.Histogram("sampan_rpc_duration_seconds", "How long calls took, by method; those that failed too.", metrics.Seconds, "method"),
		failed:   r.Counter("sampan_rpc_errors_total", "Calls that failed, by method and gRPC code.", "method", "code"),
		inFlight: r.Gauge("sampan_rpcs_in_flight", "Calls under way, by method.", "method"),
	}
}

func (f *Figures) begin(method string) {
	if f != nil {
		f.inFlight.Add(1, method)
	}
}

func (f *Figures) end(method string, took time.Duration, err error) {
	if f == nil {
		return
	}
	f.inFlight.Add(-1, method)
	f.duration.Observe(took.Seconds(), method)
	if code := status.Code(err); code != codes.OK {
		f.failed.Add(1, method, code.String())
	}
}

// trace begins the span of a call, as part of its client's if that has sent one.
func (e edge) trace(ctx context.Context, method string) (context.Context, trace.Span) {
	if e.tracer == nil {
		return ctx, trace.SpanFromContext(ctx)
	}
	md, _ := metadata.FromIncomingContext(ctx)
	ctx = propagation.TraceContext{}.Extract(ctx, carrier(md))
	name := strings.TrimPrefix(method, "/")
	service, verb := path.Split(name)
	return e.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", strings.TrimSuffix(service, "/")), attribute.String("rpc.method", verb)))
}

func endSpan(s trace.Span, err error) {
	s.SetAttributes(attribute.Int("rpc.grpc.status_code", int(status.Code(err))))
	span.End(s, err)
}

// carrier is what a call's metadata has of its client's span.
type carrier metadata.MD

func (c carrier) Get(key string) string {
	if v := metadata.MD(c).Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}

// tracedStream is a stream whose context has the call's span.
type tracedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s tracedStream) Context() context.Context { return s.ctx }
