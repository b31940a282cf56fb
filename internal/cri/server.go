// Package cri serves the Container Runtime Interface. A handler validates its
// request, calls one verb of the domain, and turns the answer into the protocol's
// words. Everything that is the same for every call (panics, error codes, logs)
// is in one interceptor.
//
// The package does no I/O of its own and holds no lock. Errors get their gRPC
// codes here and nowhere else.
package cri

import (
	"context"
	"log/slog"
	"path"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/handler"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/image"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/stats"
)

// Config is what the services are made of.
type Config struct {
	Pods    *pod.Pods
	Images  *image.Store
	Network network.Network
	Stats   *stats.Collector
	Streams Streams

	Version        string // of Sampan
	Handlers       *handler.Handlers
	DefaultHandler string
	Facts          host.Facts
	// AppArmor is nil, or why containers run without the default profile. It is
	// only asked where there is AppArmor.
	AppArmor      func() error
	SystemdCgroup bool
	Root, State   string
	Logger        *slog.Logger
	Tracer        trace.Tracer // of calls; nil if nobody collects spans
	Figures       *Figures     // of calls; nil if nobody asks for them
}

// maxMessage bounds a message in both directions, in bytes: what the kubelet's
// client accepts.
const maxMessage = 16 << 20

// NewServer returns a gRPC server with both CRI services registered, in v1 and in
// v1alpha2.
func NewServer(cfg Config) *grpc.Server {
	edge := edge{log: cfg.Logger, tracer: cfg.Tracer, figures: cfg.Figures}
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(edge.unary), grpc.StreamInterceptor(edge.stream),
	)
	runtime, images := &runtimeService{cfg: cfg}, &imageService{images: cfg.Images, handlers: cfg.Handlers}
	runtimeapi.RegisterRuntimeServiceServer(s, runtime)
	runtimeapi.RegisterImageServiceServer(s, images)
	registerV1alpha2(s, runtime, images)
	return s
}

type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	cfg Config
}

type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	images   *image.Store
	handlers *handler.Handlers
}

// edge is what every call passes through.
type edge struct {
	log     *slog.Logger
	tracer  trace.Tracer
	figures *Figures
}

// begin is called for each call; finish when it ends, with what it has panicked
// with or nil, and its error. Finish returns what the client gets.
func (e edge) begin(ctx context.Context, method string) (_ context.Context, finish func(panicked any, err error) error) {
	start, verb := time.Now(), path.Base(method)
	e.figures.begin(verb)
	ctx, span := e.trace(ctx, method)
	return ctx, func(panicked any, err error) error {
		err = e.finish(ctx, method, start, panicked, err)
		e.figures.end(verb, time.Since(start), err)
		endSpan(span, err)
		return err
	}
}

func (e edge) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ctx, finish := e.begin(ctx, info.FullMethod)
	defer func() { err = finish(recover(), err) }()
	return handler(ctx, req)
}

func (e edge) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx, finish := e.begin(stream.Context(), info.FullMethod)
	defer func() { err = finish(recover(), err) }()
	return handler(srv, tracedStream{stream, ctx})
}
