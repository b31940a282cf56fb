package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/config"
	"sampan.dev/sampan/internal/cri"
	"sampan.dev/sampan/internal/image"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/metrics"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/nri"
	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/span"
	"sampan.dev/sampan/internal/span/otlp"
)

// figures are those of the daemon itself; all nil if nobody is to ask for them.
type figures struct {
	registry *metrics.Registry
	calls    *cri.Figures
	pulls    *image.Figures
}

func openFigures(cfg config.Config) figures {
	if cfg.Metrics.Address == "" {
		return figures{}
	}
	r := new(metrics.Registry)
	r.Func("gauge", "sampan_build_info", "Always 1; the label tells the version of Sampan.", []string{"version"}, func() []metrics.Sample {
		return []metrics.Sample{{Labels: []string{version()}, Value: 1}}
	})
	addProcess(r)
	return figures{registry: r, calls: cri.NewFigures(r), pulls: image.NewFigures(r)}
}

// addProcess adds what programs in Go commonly show of themselves, by the common names.
func addProcess(r *metrics.Registry) {
	r.Func("gauge", "go_goroutines", "Goroutines of the daemon.", nil, one(runtime.NumGoroutine))
	r.Func("counter", "process_cpu_seconds_total", "CPU time of the daemon, of user and system.", nil, func() []metrics.Sample {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			return nil
		}
		return []metrics.Sample{{Value: float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9}}
	})
	r.Func("gauge", "process_open_fds", "Files that the daemon has open.", nil, func() []metrics.Sample {
		open, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return nil
		}
		return []metrics.Sample{{Value: float64(len(open) - 1)}} // but for the directory itself
	})
	r.Func("gauge", "process_resident_memory_bytes", "Memory of the daemon that is resident.", nil, func() []metrics.Sample {
		text, err := os.ReadFile("/proc/self/statm")
		var size, resident int64
		if _, bad := fmt.Sscan(string(text), &size, &resident); err != nil || bad != nil {
			return nil
		}
		return []metrics.Sample{{Value: float64(resident * int64(os.Getpagesize()))}}
	})
}

// serve shows the figures until the server is closed; nil if there are none.
func (f figures) serve(cfg config.Config, pods *pod.Pods, plugins *nri.Plugins, log *slog.Logger) (*metrics.Server, error) {
	if f.registry == nil {
		return nil, nil
	}
	f.addPods(pods)
	if plugins != nil {
		f.registry.Func("gauge", "sampan_nri_plugins", "NRI plugins that are connected.", nil, one(plugins.Connected))
	}
	s, err := metrics.Listen(cfg.Metrics.Address, f.registry)
	if err != nil {
		return nil, fmt.Errorf("metrics.address: %w", err)
	}
	log.Info("metrics", "address", s.Address())
	return s, nil
}

func (f figures) addPods(pods *pod.Pods) {
	r := f.registry
	r.Func("gauge", "sampan_pods", "Pods by state.", []string{"state"}, func() []metrics.Sample {
		n := pods.Figures()
		return []metrics.Sample{{Labels: []string{"ready"}, Value: float64(n.Ready)}, {Labels: []string{"not_ready"}, Value: float64(n.NotReady)}}
	})
	r.Func("gauge", "sampan_containers", "Containers by state.", []string{"state"}, func() []metrics.Sample {
		n := pods.Figures()
		return []metrics.Sample{
			{Labels: []string{"created"}, Value: float64(n.Created)}, {Labels: []string{"running"}, Value: float64(n.Running)},
			{Labels: []string{"exited"}, Value: float64(n.Exited)},
		}
	})
	r.Func("gauge", "sampan_operations_in_flight", "Changes of pods and containers under way, whoever waits for them.", nil,
		one(func() int { return pods.Figures().Operations }))
	r.Func("counter", "sampan_keeper_reconnects_total", "Times that the connection to a keeper was made again, as when its worker was replaced.", nil,
		one(func() int64 { return pods.Figures().KeeperReconnects }))
	r.Func("counter", "sampan_leaks_swept_total", "Things that belonged to no pod or container and were removed.", nil,
		one(func() int64 { return pods.Figures().LeaksSwept }))
}

func one[N int | int64](ask func() N) func() []metrics.Sample {
	return func() []metrics.Sample { return []metrics.Sample{{Value: float64(ask())}} }
}

// openTracing returns nil if no spans are to be sent.
func openTracing(ctx context.Context, cfg config.Config, log *slog.Logger) (*otlp.Sender, error) {
	if cfg.Tracing.Endpoint == "" {
		return nil, nil
	}
	node, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return otlp.Open(ctx, otlp.Config{Endpoint: cfg.Tracing.Endpoint, Sampling: cfg.Tracing.Sampling, Version: version(), Node: node, Logger: log})
}

func tracerOf(s *otlp.Sender) trace.Tracer {
	if s == nil {
		return nil
	}
	return s.Tracer()
}

// lastSpans bounds how long the daemon's end waits for a collector.
const lastSpans = time.Second

// closeTracing sends the last spans, if a collector takes them soon.
func closeTracing(s *otlp.Sender, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), lastSpans)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		log.Warn("the last spans are lost", "err", err)
	}
}

// traced makes the parts that pods are made of tell how long they take. It is
// only used when spans are sent.
func traced(c pod.Config) pod.Config {
	dial := c.Keeper
	c.Keeper = func(ctx context.Context, name string) (pod.Keeper, error) {
		ctx, end := span.Start(ctx, "keeper: connect", attribute.String("sampan.keeper", name))
		k, err := dial(ctx, name)
		end(err)
		if err != nil {
			return nil, err
		}
		return tracedKeeper{k}, nil
	}
	c.Network, c.Layers = tracedNetwork{c.Network}, tracedLayers{c.Layers}
	return c
}

type tracedNetwork struct{ network.Network }

func (n tracedNetwork) Attach(ctx context.Context, p network.Pod) (_ network.Result, err error) {
	ctx, end := span.Start(ctx, "network: attach", attribute.String("sampan.pod", p.ID))
	defer func() { end(err) }()
	return n.Network.Attach(ctx, p)
}

func (n tracedNetwork) Detach(ctx context.Context, podID string) (err error) {
	ctx, end := span.Start(ctx, "network: detach", attribute.String("sampan.pod", podID))
	defer func() { end(err) }()
	return n.Network.Detach(ctx, podID)
}

type tracedLayers struct{ pod.Layers }

func (l tracedLayers) Mount(ctx context.Context, m layer.MountSpec) (err error) {
	ctx, end := span.Start(ctx, "layers: mount", attribute.Int("sampan.layers", len(m.Layers)))
	defer func() { end(err) }()
	return l.Layers.Mount(ctx, m)
}

type tracedKeeper struct{ pod.Keeper }

// inKeeper begins a call of the keeper for a container.
func inKeeper(ctx context.Context, verb, id string) (context.Context, func(error)) {
	return span.Start(ctx, "keeper: "+verb, attribute.String("sampan.container", id))
}

func (k tracedKeeper) Create(ctx context.Context, r keeper.CreateRequest) (_ keeper.CreateResponse, err error) {
	ctx, end := inKeeper(ctx, "create", r.ID)
	defer func() { end(err) }()
	return k.Keeper.Create(ctx, r)
}

func (k tracedKeeper) Start(ctx context.Context, id string) (_ time.Time, err error) {
	ctx, end := inKeeper(ctx, "start", id)
	defer func() { end(err) }()
	return k.Keeper.Start(ctx, id)
}

func (k tracedKeeper) Signal(ctx context.Context, id string, sig unix.Signal, all bool) (err error) {
	ctx, end := inKeeper(ctx, "signal", id)
	defer func() { end(err) }()
	return k.Keeper.Signal(ctx, id, sig, all)
}

func (k tracedKeeper) Update(ctx context.Context, id string, r *specs.LinuxResources) (err error) {
	ctx, end := inKeeper(ctx, "update", id)
	defer func() { end(err) }()
	return k.Keeper.Update(ctx, id, r)
}

func (k tracedKeeper) ExecOutput(ctx context.Context, r keeper.ExecRequest, limit int) (_, _ []byte, _ keeper.ExecResult, err error) {
	ctx, end := inKeeper(ctx, "exec", r.ID)
	defer func() { end(err) }()
	return k.Keeper.ExecOutput(ctx, r, limit)
}

func (k tracedKeeper) Delete(ctx context.Context, id string) (err error) {
	ctx, end := inKeeper(ctx, "delete", id)
	defer func() { end(err) }()
	return k.Keeper.Delete(ctx, id)
}
