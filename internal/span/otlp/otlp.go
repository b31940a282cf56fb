// Package otlp sends spans to a collector by OTLP over gRPC. It is only used when
// somebody has configured where to.
package otlp

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"sampan.dev/sampan/internal/span"
)

// Config says where spans go.
type Config struct {
	Endpoint string  // http://host:port, or https:// for TLS with the host's certificates
	Sampling float64 // share of the requests without a decision of their client's that are traced
	Version  string  // of Sampan
	Node     string  // the host's name
	Logger   *slog.Logger
}

// Sender makes spans and sends them in the background, in batches. When the
// collector is away, the queue of 2048 spans is all that is kept for it.
type Sender struct{ provider *sdktrace.TracerProvider }

// Open prepares to send. It does not wait for the collector, which may come later.
func Open(ctx context.Context, cfg Config) (*Sender, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(cfg.Endpoint))
	if err != nil {
		return nil, fmt.Errorf("tracing to %s: %w", cfg.Endpoint, err)
	}
	otel.SetErrorHandler(&complaints{log: cfg.Logger, endpoint: cfg.Endpoint})
	return &Sender{sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(cfg.Sampling))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "sampan"), attribute.String("service.version", cfg.Version), attribute.String("host.name", cfg.Node))),
	)}, nil
}

// Tracer makes the spans that others are parts of.
func (s *Sender) Tracer() trace.Tracer { return s.provider.Tracer(span.Scope) }

// Close sends what is left until ctx ends.
func (s *Sender) Close(ctx context.Context) error { return s.provider.Shutdown(ctx) }

// complaints logs that spans do not arrive, but not each time.
type complaints struct {
	log      *slog.Logger
	endpoint string

	mu   sync.Mutex
	last time.Time
}

const complainEvery = 5 * time.Minute

// Handle is called by the library.
func (c *complaints) Handle(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.last) < complainEvery {
		return
	}
	c.last = time.Now()
	c.log.Warn("spans are lost", "endpoint", c.endpoint, "err", err)
}
