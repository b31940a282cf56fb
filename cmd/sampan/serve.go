package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"sampan.dev/sampan/internal/admin"
	"sampan.dev/sampan/internal/config"
	"sampan.dev/sampan/internal/cri"
	"sampan.dev/sampan/internal/embedded"
	"sampan.dev/sampan/internal/handler"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/apparmor"
	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/image"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/builtin"
	"sampan.dev/sampan/internal/network/cni"
	"sampan.dev/sampan/internal/nri"
	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/registry"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/stats"
	"sampan.dev/sampan/internal/stream"
	"sampan.dev/sampan/internal/systemd"
)

// shutdownTime bounds how long calls under way may take after SIGTERM.
const shutdownTime = 5 * time.Second

func newServeCommand() *cobra.Command {
	var file, root, state, listen, level, format string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: "Run the daemon: serve the Container Runtime Interface until SIGTERM or SIGINT.\n" +
			"Pods go on when the daemon ends, and are taken over when it is back.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			for flag, key := range map[string]*string{"root": &cfg.Root, "state": &cfg.State, "listen": &cfg.Listen} {
				if f := cmd.Flags().Lookup(flag); f.Changed {
					*key = f.Value.String()
				}
			}
			if err := cfg.Validate(); err != nil {
				return err
			}
			log, err := newLogger(cmd.ErrOrStderr(), level, format)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, log)
		},
	}
	def := config.Default()
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (default "+config.DefaultPath+", if it exists)")
	cmd.Flags().StringVar(&root, "root", def.Root, "`DIR` for what survives a reboot")
	cmd.Flags().StringVar(&state, "state", def.State, "`DIR` for what dies with the boot")
	cmd.Flags().StringVar(&listen, "listen", def.Listen, "`ADDRESS` of the CRI socket")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().StringVar(&format, "log-format", "text", "text or json")
	return cmd
}

func newLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not one of debug, info, warn, error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		if isJournal(w) {
			return slog.New(newJournalHandler(w, l)), nil
		}
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, fmt.Errorf("--log-format: %q is not one of text, json", format)
}

// serve wires the parts together, bottom up, and runs until ctx ends. Requests
// are served before everything that runs is adopted.
func serve(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	start := time.Now()
	unix.Umask(0o022)
	for _, dir := range []string{cfg.Root, cfg.State} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	unlock, err := lockRoot(cfg.Root)
	if err != nil {
		return err
	}
	defer unlock()
	facts, err := host.ProbeFacts()
	if err != nil {
		return fmt.Errorf("probe the host: %w", err)
	}
	counts := openFigures(cfg)
	tracing, err := openTracing(ctx, cfg, log)
	if err != nil {
		return err
	}
	if tracing != nil {
		defer closeTracing(tracing, log)
	}
	images, err := image.Open(image.Config{
		Root: filepath.Join(cfg.Root, "images"), LayerRoot: filepath.Join(cfg.Root, "layers"),
		Registry: registry.Config{Dir: cfg.Registry.ConfigDir, Logger: log}, Pinned: cfg.Images.Pinned, Logger: log,
		Figures: counts.pulls,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeImages(images)) }()
	plugins, err := openPlugins(cfg, log)
	if err != nil {
		return err
	}
	runtimes := handler.Open(programs(cfg), log)
	defer runtimes.Close()
	profiles := apparmor.New(apparmor.HostConfig(facts.AppArmor, log))
	labels := openSELinux(ctx, cfg, images.Layers().Root(), log)
	units := openUnits(cfg)
	defer units.Close()
	pods, podNetwork, err := openPods(cfg, images, runtimes, profiles, labels, plugins, units, tracing != nil, facts, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, podNetwork.Close()) }()
	defer pods.Close()

	figures, err := openStats(images, log)
	if err != nil {
		return err
	}
	defer figures.Close()

	streams, err := openStreams(cfg, pods, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, streams.Close()) }()

	server := cri.NewServer(cri.Config{
		Pods: pods, Images: images, Network: podNetwork, Stats: figures, Streams: streams, Version: version(),
		Handlers: runtimes, DefaultHandler: cfg.DefaultHandler,
		Facts: facts, AppArmor: profiles.Problem, SystemdCgroup: units != nil, Root: cfg.Root, State: cfg.State, Logger: log,
		Tracer: tracerOf(tracing), Figures: counts.calls,
	})
	admin.Register(server, loader(images))
	listener, err := listenUnix(cfg.SocketPath())
	if err != nil {
		return err
	}
	shown, err := counts.serve(cfg, pods, plugins, log)
	if err != nil {
		return err
	}
	served := make(chan error, 4)
	if shown != nil {
		defer shown.Close()
		go func() { served <- shown.Serve() }()
	}
	go func() { served <- server.Serve(listener) }()
	go func() { served <- streams.Serve() }()
	log.Info("serving", "listen", cfg.Listen, "version", version(), "dur", time.Since(start).Round(time.Millisecond))
	if _, err := sdnotify.SdNotify(false, sdnotify.SdNotifyReady); err != nil {
		log.Warn("tell systemd that the daemon is ready", "err", err)
	}
	if plugins != nil {
		defer plugins.Close()
		go func() {
			if err := plugins.Start(pods); err != nil {
				served <- err
			}
		}()
	}
	go watch(ctx, cfg.Listen, log)
	adopted := make(chan struct{})
	go func() {
		defer close(adopted)
		pods.Adopt(ctx)
		images.Mend(ctx)
		pods.HoldImages()
		host.ReturnMemory(ctx)
	}()
	select {
	case <-ctx.Done():
		log.Info("stopping; pods go on")
		sdnotify.SdNotify(false, sdnotify.SdNotifyStopping)
		pods.EndEvents()
		stopServer(server)
	case err = <-served:
	}
	<-adopted
	return err
}

func openStats(images *image.Store, log *slog.Logger) (*stats.Collector, error) {
	roots, err := host.CgroupRoots()
	if err != nil {
		return nil, err
	}
	// Writable layers are in the same file system as images, and called the same.
	return stats.New(stats.Config{Cgroups: roots, Filesystem: images.Layers().Root(), Logger: log}), nil
}

// stopServer lets calls under way finish, for a while.
func stopServer(s *grpc.Server) {
	late := time.AfterFunc(shutdownTime, s.Stop)
	defer late.Stop()
	s.GracefulStop()
}

func closeImages(images *image.Store) error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	return images.Close(ctx)
}

// lockRoot makes sure that one daemon at a time works on root.
func lockRoot(root string) (unlock func(), err error) {
	path := filepath.Join(root, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("serve: another daemon works on %s (it holds %s): %w", root, path, err)
	}
	return func() { f.Close() }, nil
}

// listenUnix takes the place of a socket that an earlier daemon left. The lock on
// root has shown that it is dead.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}

// openPlugins returns nil if there are to be none.
func openPlugins(cfg config.Config, log *slog.Logger) (*nri.Plugins, error) {
	if !cfg.NRI.Enable {
		return nil, nil
	}
	return nri.New(nri.Config{
		Version: version(), Socket: cfg.NRI.SocketPath, PluginDir: cfg.NRI.PluginPath, PluginConfDir: cfg.NRI.PluginConfPath,
		RequestTimeout: time.Duration(cfg.NRI.RequestTimeout) * time.Second, Logger: log,
	})
}

func openPods(cfg config.Config, images *image.Store, runtimes *handler.Handlers, profiles *apparmor.AppArmor, labels *selinux.SELinux, plugins *nri.Plugins, units *systemd.Units, tracing bool, facts host.Facts, log *slog.Logger) (*pod.Pods, network.Network, error) {
	podNetwork, err := openNetwork(cfg, log)
	if err != nil {
		return nil, nil, err
	}
	bin := filepath.Join(cfg.Root, "bin")
	keeperProgram, err := embedded.Keeper()
	if err != nil {
		return nil, nil, err
	}
	keeperPath, err := keeperProgram.Unpack(bin)
	if err != nil {
		return nil, nil, err
	}
	initProgram, err := embedded.Init()
	if err != nil {
		return nil, nil, err
	}
	initPath, err := initProgram.Unpack(bin)
	if err != nil {
		return nil, nil, err
	}
	if err := embedded.Sweep(bin, keeperPath, initPath); err != nil {
		log.Warn("programs of an earlier build stay", "err", err)
	}
	var heard pod.Plugins // nil in truth, if there are none
	if plugins != nil {
		heard = plugins
	}
	criu := &host.CRIU{Path: cfg.Checkpoint.CRIU}
	var podUnits pod.Units
	if units != nil {
		podUnits = delegatedUnits{units, initPath}
	}
	parts := pod.Config{
		Root: cfg.Root, State: cfg.State, NetNS: "/run/netns",
		Images: podImages{images}, Layers: images.Layers(), Network: podNetwork, Plugins: heard,
		Keeper: keeperDialer(cfg, keeperPath, units, log), KeeperFor: keeperNames(cfg, keeperProgram.Digest),
		Handlers: handlers(cfg), DefaultHandler: cfg.DefaultHandler, Init: initPath, VolumePaths: host.VolumePaths{Program: initPath},
		Features: handlerFeatures(runtimes),
		AppArmor: profiles.Profile, SELinux: labels,
		SweepKeepers: keeperSweeper(cfg),
		KeeperHolds:  func(name, id string) bool { return keeper.Holds(keeperDir(cfg, name), id) },
		Facts:        facts, Units: podUnits, CDIDirs: []string{"/etc/cdi", "/var/run/cdi"},
		CRIU: criu.Check, RestoreImages: cfg.Checkpoint.RestoreImages, Logger: log,
	}
	if tracing {
		parts = traced(parts)
	}
	pods, err := pod.Open(parts)
	if err != nil {
		return nil, nil, err
	}
	return pods, podNetwork, nil
}

func openNetwork(cfg config.Config, log *slog.Logger) (network.Network, error) {
	dir := filepath.Join(cfg.Root, "network")
	openCNI := func() (*cni.Network, error) {
		return cni.Open(cni.Config{Dir: filepath.Join(dir, "cni"), ConfDir: cfg.Network.CNIConfDir, BinDirs: cfg.Network.CNIBinDirs, Logger: log})
	}
	if cfg.Network.Mode == config.NetworkCNI {
		return openCNI()
	}
	subnets, err := cfg.Network.Subnets()
	if err != nil {
		return nil, err
	}
	own, err := builtin.Open(builtin.Config{Dir: filepath.Join(dir, "builtin"), State: filepath.Join(cfg.State, "network"), Subnets: subnets, Logger: log})
	if err != nil || cfg.Network.Mode == config.NetworkBuiltin {
		return own, err
	}
	plugins, err := openCNI()
	if err != nil {
		return nil, errors.Join(err, own.Close())
	}
	return network.NewAuto(own, plugins, plugins.Configured), nil
}

// openStreams returns the server of exec, attach and port-forward.
func openStreams(cfg config.Config, pods *pod.Pods, log *slog.Logger) (*stream.Server, error) {
	// The library that it is built on has a log of its own.
	klog.SetSlogLogger(slog.New(stream.ForDebugging(log.Handler())))
	return stream.Listen(stream.Config{
		Address: cfg.Streaming.Address, CertFile: cfg.Streaming.TLSCert, KeyFile: cfg.Streaming.TLSKey, Pods: pods, Logger: log,
	})
}

// keeperDialer starts keepers, and connects to them. Each has a cgroup of its
// own, that of a scope if systemd makes cgroups, so that it stays when the
// daemon's unit is stopped.
func keeperDialer(cfg config.Config, binary string, units *systemd.Units, log *slog.Logger) func(context.Context, string) (pod.Keeper, error) {
	return func(ctx context.Context, name string) (pod.Keeper, error) {
		k := keeper.Config{Dir: keeperDir(cfg, name), Binary: binary, Cgroup: keeperCgroup(cfg.State, name), Logger: log.With("keeper", name)}
		if units != nil {
			scope := keeperScope(cfg.State, name)
			k.Cgroup = ""
			k.Place = func(ctx context.Context, pid int) error {
				return units.Scope(ctx, scope, "Sampan's keeper of containers "+name, pid)
			}
		}
		return keeper.Ensure(ctx, k)
	}
}

// keeperSweeper removes the directories and cgroups of keepers that are dead.
func keeperSweeper(cfg config.Config) func(func(string) bool) (pod.LeftKeepers, error) {
	dir := keeperDir(cfg, "")
	return func(needed func(name string) bool) (left pod.LeftKeepers, err error) {
		traces, err := keeper.Traces(dir)
		errs := []error{err}
		for _, t := range traces {
			switch {
			case needed(t.Name):
			case len(t.Containers) > 0:
				left.Occupied = append(left.Occupied, t.Name)
			case t.Alive:
				left.Leaving = true
			default:
				errs = append(errs, keeper.Bury(dir, t.Name))
			}
		}
		return left, errors.Join(append(errs, keeper.BuryCgroups(dir, keeperCgroup(cfg.State, "*")))...)
	}
}

func keeperDir(cfg config.Config, name string) string {
	return filepath.Join(cfg.State, "keepers", name)
}

// keeperNames says which keeper gets a pod. A new version of the keeper has a new
// name: the old one stays with the containers it has.
func keeperNames(cfg config.Config, digest string) func(podID string) string {
	if cfg.Keeper.Isolation == config.IsolationPod {
		return func(podID string) string {
			if podID == "" {
				return ""
			}
			return "pod-" + podID[:16]
		}
	}
	return func(string) string { return "node-" + digest[:12] }
}

func handlers(cfg config.Config) map[string]keeper.Handler {
	all := map[string]keeper.Handler{config.BuiltinHandler: {Kind: keeper.Builtin}}
	for name, h := range cfg.Handlers {
		all[name] = keeper.Handler{Kind: keeper.CLI, Path: h.Path}
	}
	return all
}

// programs are the programs of the handlers, none for the built-in one.
func programs(cfg config.Config) map[string]string {
	paths := make(map[string]string)
	for name, h := range handlers(cfg) {
		paths[name] = h.Path
	}
	return paths
}

// openSELinux returns the host's SELinux, or what stands for none. With it the files of
// images below the directory layers are what containers can read.
func openSELinux(ctx context.Context, cfg config.Config, layers string, log *slog.Logger) *selinux.SELinux {
	if cfg.Security.SELinux == config.SELinuxOff {
		return selinux.New(selinux.Config{})
	}
	policy, err := selinux.HostConfig(cfg.Root, cfg.State)
	if err != nil {
		log.Warn("containers get no SELinux labels; set security.selinux to off if that is meant", "err", err)
	}
	labels := selinux.New(policy)
	if err := labels.LabelImages(ctx, layers); err != nil {
		log.Warn("containers may not be let read their images by SELinux; restart the daemon to try again", "err", err)
	}
	return labels
}

func handlerFeatures(runtimes *handler.Handlers) func(context.Context, string) (spec.Features, error) {
	return func(ctx context.Context, name string) (spec.Features, error) {
		report, err := runtimes.Now(ctx, name)
		return report.Features, err
	}
}

func systemdCgroup(cfg config.Config) bool {
	switch cfg.Cgroup.Driver {
	case config.CgroupSystemd:
		return true
	case config.CgroupFS:
		return false
	}
	return systemd.Running() && host.CgroupMode() == host.CgroupV2
}

// openUnits returns what makes cgroups with systemd, nil if that is not to.
func openUnits(cfg config.Config) *systemd.Units {
	if systemdCgroup(cfg) {
		return &systemd.Units{}
	}
	return nil
}

// delegatedUnits makes units as package pod wants them. The program run is the
// init.
type delegatedUnits struct {
	*systemd.Units
	run string
}

func (u delegatedUnits) Delegate(ctx context.Context, unit, slice, description string) error {
	return u.Units.Delegate(ctx, systemd.Delegated{Name: unit, Slice: slice, Description: description, Run: []string{u.run}})
}

// podImages shows the image store as package pod wants it.
type podImages struct{ *image.Store }

func (i podImages) Get(ref string) (pod.Image, error) {
	img, err := i.Store.Get(ref)
	return podImage(img), err
}

func (i podImages) Acquire(id, holder string) (pod.Image, error) {
	img, err := i.Store.Acquire(id, holder)
	return podImage(img), err
}

func podImage(img image.Image) pod.Image {
	return pod.Image{ID: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Layers: img.Layers, Config: img.Config.Config, Checkpoint: img.Checkpoint}
}

func loader(images *image.Store) admin.Loader {
	return admin.LoaderFunc(func(ctx context.Context, r io.Reader, name string) ([]admin.Loaded, error) {
		all, err := images.Load(ctx, r, image.LoadOptions{Name: name})
		var loaded []admin.Loaded
		for _, img := range all {
			loaded = append(loaded, admin.Loaded{ID: img.ID, References: img.RepoTags, Size: img.Size})
		}
		return loaded, err
	})
}
