// Package nri lets plugins of the Node Resource Interface (NRI) hear of pods and
// containers, and change containers: before they are made in most respects, later
// in their limits. The protocol, the order of plugins, conflicts between them and
// their timeouts are the library's; here is what binds it to a daemon, and what
// turns a plugin's wishes into an OCI spec.
//
// The package must not know the CRI, nor what a pod is to Sampan: it asks a Runtime.
package nri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"google.golang.org/grpc/status"
)

// Config says where plugins are.
type Config struct {
	Version        string        // of Sampan
	Socket         string        // where plugins connect
	PluginDir      string        // plugins to run: INDEX-NAME, such as 10-balloons
	PluginConfDir  string        // what they get: INDEX-NAME.conf or NAME.conf
	RequestTimeout time.Duration // a plugin that takes longer for an answer is dropped
	Logger         *slog.Logger
}

// registrationTimeout bounds how long a plugin takes to say who it is.
const registrationTimeout = 5 * time.Second

// Runtime is what plugins are introduced to.
type Runtime interface {
	// Known returns what plugins have been told of and that has not stopped.
	Known() ([]*api.PodSandbox, []*api.Container)
	// ApplyUpdates changes the limits of containers and returns the updates that
	// failed, but for those whose failure is to be ignored.
	ApplyUpdates(ctx context.Context, updates []*api.ContainerUpdate) []*api.ContainerUpdate
}

// Plugins are those that are connected now. Its requests, from RunPodSandbox to
// RemoveContainer, go to each plugin that wants them, by index; one that does not
// answer in time is dropped, and the others go on. The library serves one request
// at a time.
//
// Plugins are asked between Hold and release, so that one that connects meanwhile
// hears of everything exactly once: either Runtime.Known has it, or a request
// tells.
type Plugins struct {
	*adaptation.Adaptation
	runtime Runtime
	log     *slog.Logger
	dir     string // PluginDir
	count   atomic.Int32
	started chan struct{} // closed when the plugins of PluginDir run

	introduced atomic.Bool // there was an introduction
}

// New prepares to serve plugins; Start serves them. There can be one in a process.
func New(cfg Config) (*Plugins, error) {
	p := &Plugins{log: cfg.Logger, dir: cfg.PluginDir, started: make(chan struct{})}
	options := []adaptation.Option{
		adaptation.WithSocketPath(cfg.Socket), adaptation.WithPluginPath(cfg.PluginDir), adaptation.WithPluginConfigPath(cfg.PluginConfDir),
		adaptation.WithMetrics(counter{p}),
	}
	if served(cfg.Socket) {
		cfg.Logger.Warn("another runtime serves NRI plugins; none can connect here until nri.socket_path is a path of our own", "path", cfg.Socket)
		options = append(options, adaptation.WithDisabledExternalConnections())
	}
	// It has nothing to tell yet but that it knows no WebAssembly.
	nrilog.Set(logger{slog.New(slog.DiscardHandler)})
	adaptation.SetPluginRegistrationTimeout(registrationTimeout)
	adaptation.SetPluginRequestTimeout(cfg.RequestTimeout)
	var err error
	p.Adaptation, err = adaptation.New("sampan", cfg.Version, p.introduce, p.update, options...)
	if err != nil {
		return nil, fmt.Errorf("nri: %w", err)
	}
	nrilog.Set(logger{cfg.Logger})
	return p, nil
}

// served reports whether somebody listens at the socket. The library would take
// its place.
func served(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Start runs the plugins that are installed and lets others connect. Until it has
// returned, Hold waits.
func (p *Plugins) Start(r Runtime) error {
	p.runtime = r
	defer close(p.started)
	if err := p.Adaptation.Start(); err != nil {
		return fmt.Errorf("nri: %w; mend it, or set nri.enable = false", err)
	}
	return nil
}

// Close ends the plugins that Start has run and leaves the others.
func (p *Plugins) Close() { p.Stop() }

// Hold keeps plugins from being introduced until release is called, and reports
// whether there are any who listen. It waits for an introduction under way, which
// is bounded by the timeouts.
func (p *Plugins) Hold(ctx context.Context) (release func(), listening bool, err error) {
	select {
	case <-p.started:
	case <-ctx.Done():
		return nil, false, fmt.Errorf("nri: plugins are being started: %w", context.Cause(ctx))
	}
	block := p.BlockPluginSync()
	return block.Unblock, p.count.Load() > 0, nil
}

// Connected is how many plugins there are now.
func (p *Plugins) Connected() int { return int(p.count.Load()) }

// introduce tells a plugin that has connected what there is, and does what it
// wants to be changed. The first call, by Start, is for all that are installed: of
// many pods that is much to tell, and mostly to nobody.
func (p *Plugins) introduce(ctx context.Context, tell adaptation.SyncCB) error {
	if p.introduced.CompareAndSwap(false, true) && p.noneInstalled() {
		_, err := tell(ctx, nil, nil)
		return err
	}
	pods, containers := p.runtime.Known()
	updates, err := tell(ctx, pods, containers)
	if err != nil || len(updates) == 0 {
		return err
	}
	// Nobody waits for these, least of all those who are held meanwhile.
	go p.update(ctx, updates)
	return nil
}

func (p *Plugins) noneInstalled() bool {
	files, err := os.ReadDir(p.dir)
	return len(files) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist))
}

// CreateContainer asks plugins what to change of a container. It mends the
// library's answer, which lacks the variables and devices that plugins want to be
// gone; these are out of the request by then.
func (p *Plugins) CreateContainer(ctx context.Context, r *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	env, devices := variables(r), devicesOf(r)
	answer, err := p.Adaptation.CreateContainer(ctx, r)
	if err != nil || answer.GetAdjust() == nil {
		return answer, err
	}
	for _, name := range missing(env, variables(r)) {
		answer.Adjust.RemoveEnv(name)
	}
	for _, path := range missing(devices, devicesOf(r)) {
		answer.Adjust.RemoveDevice(path)
	}
	return answer, nil
}

func variables(r *api.CreateContainerRequest) (names []string) {
	for _, e := range r.GetContainer().GetEnv() {
		name, _, _ := strings.Cut(e, "=")
		names = append(names, name)
	}
	return names
}

func devicesOf(r *api.CreateContainerRequest) (paths []string) {
	for _, d := range r.GetContainer().GetLinux().GetDevices() {
		paths = append(paths, d.GetPath())
	}
	return paths
}

// missing returns what was before and is not after.
func missing(before, after []string) []string {
	return slices.DeleteFunc(before, func(s string) bool { return slices.Contains(after, s) })
}

// maxUpdate bounds how long a plugin's updates may take together.
const maxUpdate = time.Minute

func (p *Plugins) update(ctx context.Context, updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	ctx, cancel := context.WithTimeout(ctx, maxUpdate)
	defer cancel()
	return p.runtime.ApplyUpdates(ctx, updates), nil
}

// Failed makes an error of a request say that a plugin is its cause.
func Failed(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("an NRI plugin: %s: %w", message(err), errdefs.ErrFailedPrecondition)
}

// message is the plugin's own, without the protocol's words around it.
func message(err error) string {
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Message()
	}
	return err.Error()
}

// counter hears from the library how many plugins are connected.
type counter struct{ p *Plugins }

func (c counter) UpdatePluginCount(n int) {
	if old := c.p.count.Swap(int32(n)); old != int32(n) {
		c.p.log.Info("NRI plugins", "connected", n)
	}
}

func (counter) RecordPluginInvocation(string, string, error)                                      {}
func (counter) RecordPluginLatency(string, string, time.Duration)                                 {}
func (counter) RecordPluginAdjustments(string, string, *adaptation.ContainerAdjustment, int, int) {}

// logger takes what the library logs. Its information is for debugging.
type logger struct{ *slog.Logger }

func (l logger) Debugf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

func (l logger) Infof(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

func (l logger) Warnf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelWarn, format, args)
}

func (l logger) Errorf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelError, format, args)
}

func (l logger) write(ctx context.Context, level slog.Level, format string, args []any) {
	if l.Enabled(ctx, level) {
		l.Log(ctx, level, "nri: "+fmt.Sprintf(format, args...))
	}
}
