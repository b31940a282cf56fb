// Package builtin is the OCI runtime inside the keeper. Processes that it makes
// are children of the calling process, which reaps them.
//
// It has two ways to make them. What is common goes by way of package launch: a
// plan, made of the spec, that a small program carries out. The rest is left to
// runc's libcontainer, called rather than executed. Both leave the same state, so
// that either can go on where the other has begun.
//
// With libcontainer, a container's process begins as a copy of the calling
// program that is executed with the argument "init", so a program that uses this
// package calls Init first thing in main. The copy is sealed (a read-only overlay
// of the program's directory that libcontainer makes for each process), so that a
// container cannot write to the program through /proc/self/exe.
package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets the cgroup managers set device rules
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // joins namespaces before the Go runtime starts, in what Init serves
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/console"
	"sampan.dev/sampan/internal/ociruntime/launch"
	"sampan.dev/sampan/internal/ociruntime/lifecycle"
)

// Init takes over, and never returns, if the program was executed to become a
// container's process, or to run CRIU. Otherwise it does nothing. It must be the
// first call in main.
func Init() {
	if len(os.Args) == 2 && os.Args[1] == criuArgument && os.Getenv(criuEnv) != "" {
		os.Exit(runTask())
	}
	if len(os.Args) == 2 && os.Args[1] == "init" && os.Getenv("_LIBCONTAINER_INITTYPE") != "" {
		libcontainer.Init()
	}
}

// Config is what New needs.
type Config struct {
	// Libcontainer has libcontainer make all processes, also those that this
	// package could make itself.
	Libcontainer bool

	Logger *slog.Logger
}

// New returns the runtime. It directs the log of libcontainer, of which a program
// has only one, to the Logger.
func New(c Config) ociruntime.Runtime {
	forwardLog(c.Logger)
	lockedMemory() // while it is what it was
	d := &driver{}
	if !c.Libcontainer {
		var err error
		if d.launcher, err = launcher(); err != nil {
			c.Logger.Info("containers are started by libcontainer, which takes longer", "err", err)
		}
	}
	return lifecycle.New(d, c.Logger)
}

type driver struct {
	launcher *launch.Launcher // nil if libcontainer makes all
	filters  filters
}

// launcher is the process' one.
var launcher = sync.OnceValues(launch.New)

// Create makes a container. If this process dies while it does, the process
// that was to become the container's dies too, sooner or later: it reads from
// sockets whose other ends are here, and the last thing it is told is sent after
// state.json is written.
func (d *driver) Create(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	config, err := convert(c.ID, bundle, spec)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	process := withStartLimits(spec.Process)
	if d.launcher != nil && unfit(spec) == "" && unfitConfig(config) == "" {
		return d.create(ctx, c, config, process, stdio)
	}
	container, err := libcontainer.Create(c.StateDir, c.ID, config)
	if err != nil {
		return ociruntime.Started{}, classify(err)
	}
	return run(container, process, stdio, true)
}

// Exec starts a further process.
func (d *driver) Exec(ctx context.Context, c ociruntime.Container, first host.Process, p *specs.Process, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	p = withStartLimits(p)
	if d.launcher != nil && unfitProcess(p) == "" {
		started, err := d.exec(ctx, c, first, p, stdio)
		if !errors.Is(err, errNoEntry) {
			return started, err
		}
	}
	container, err := libcontainer.Load(c.StateDir, c.ID)
	if err != nil {
		return ociruntime.Started{}, classify(err)
	}
	return run(container, p, stdio, false)
}

// run starts a process in the container, its first one if first is set.
func run(container *libcontainer.Container, p *specs.Process, stdio ociruntime.Stdio, first bool) (ociruntime.Started, error) {
	process, err := convertProcess(p)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	process.Init = first
	if !p.Terminal {
		process.Stdin, process.Stdout, process.Stderr = stdio.Streams()
		return begin(container, process)
	}
	terminal, err := console.NewPair()
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer terminal.Close()
	process.ConsoleSocket = terminal.Child
	started, err := begin(container, process)
	if err != nil {
		return ociruntime.Started{}, err
	}
	if started.Console, err = terminal.Receive(); err != nil {
		return ociruntime.Started{}, errors.Join(err, lifecycle.Discard(started))
	}
	return started, nil
}

func begin(container *libcontainer.Container, p *libcontainer.Process) (ociruntime.Started, error) {
	if err := container.Start(p); err != nil {
		return ociruntime.Started{}, classify(err)
	}
	pid, err := p.Pid()
	return ociruntime.Started{Pid: pid, Child: true}, err
}

// Update changes limits.
func (d *driver) Update(_ context.Context, c ociruntime.Container, r *specs.LinuxResources) error {
	container, err := libcontainer.Load(c.StateDir, c.ID)
	if err != nil {
		return classify(err)
	}
	config := container.Config()
	merged, err := merge(config.Cgroups.Resources, r)
	if err != nil {
		return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	// In a copy, so that libcontainer can go back to the old limits if the
	// kernel refuses one of the new ones.
	updated := *config.Cgroups
	updated.Resources = merged
	config.Cgroups = &updated
	return classify(setLimits(func() error { return container.Set(config) }))
}

// merge returns the limits old with those that r sets in their place. It
// converts r as Create does, and relies on Resources being encoded without
// what is not set, as they are in libcontainer's own state.
func merge(old *cgroups.Resources, r *specs.LinuxResources) (*cgroups.Resources, error) {
	changes, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		Spec: &specs.Spec{Linux: &specs.Linux{Resources: r}},
	}, nil)
	if err != nil {
		return nil, err
	}
	var merged cgroups.Resources
	for _, layer := range []*cgroups.Resources{old, changes.Resources} {
		data, err := json.Marshal(layer)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(data, &merged); err != nil {
			return nil, err
		}
	}
	if changes.Resources.Memory == -1 && changes.Resources.MemorySwap == 0 {
		merged.MemorySwap = 0 // lifting the memory limit lifts that of swap, which may not be below it
	}
	// Device rules are no limits: those that another program may have added to
	// the container's meanwhile stay.
	merged.SkipDevices = true
	return &merged, nil
}

// Destroy has libcontainer remove what it knows of besides cgroups: resctrl
// groups. It also runs poststop hooks.
func (d *driver) Destroy(ctx context.Context, c ociruntime.Container) error {
	if _, err := os.Lstat(filepath.Join(c.StateDir, entryName)); err == nil {
		return nil // it has neither
	}
	container, err := libcontainer.Load(c.StateDir, c.ID)
	if errors.Is(err, libcontainer.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for {
		err := container.Destroy()
		if !errors.Is(err, libcontainer.ErrRunning) {
			return err
		}
		// A process that was killed leaves its cgroup before it is a zombie.
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Millisecond):
		}
	}
}

// convert makes libcontainer's configuration of a spec.
func convert(id, bundle string, spec *specs.Spec) (*configs.Config, error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: id,
		Spec:       withoutKnownIDs(spec),
	})
	if err != nil {
		return nil, err
	}
	// Hooks learn the bundle from this label, which says the working directory.
	for i, label := range config.Labels {
		if strings.HasPrefix(label, "bundle=") {
			config.Labels[i] = "bundle=" + bundle
		}
	}
	return config, nil
}

// withoutKnownIDs leaves out the ids of a user namespace that exists already: they are
// in the spec for older runtimes, libcontainer reads them from the namespace and
// would complain each time.
func withoutKnownIDs(spec *specs.Spec) *specs.Spec {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type != specs.UserNamespace || ns.Path == "" {
			continue
		}
		without, linux := *spec, *spec.Linux
		linux.UIDMappings, linux.GIDMappings = nil, nil
		without.Linux = &linux
		return &without
	}
	return spec
}

// askedFor is how the kernel refuses what the configuration or the image asks
// for: a program, directory or mount that cannot be.
var askedFor = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.EACCES, unix.ENOEXEC, unix.ELOOP, unix.ENAMETOOLONG, unix.EROFS, unix.EINVAL}

// wantsMemory is how libcontainer says that a limit of memory is too low. There is
// no error value for it.
var wantsMemory = regexp.MustCompile(`OOM-killed|unable to set memory limit`)

// classify gives libcontainer's errors the classes of ociruntime.Runtime.
func classify(err error) error {
	class := func(class error) error { return fmt.Errorf("%w: %w", class, err) }
	var step *launch.StepError
	if errors.As(err, &step) && slices.Contains(askedFor, step.Err) {
		return class(errdefs.ErrInvalidArgument)
	}
	switch {
	case errors.Is(err, libcontainer.ErrNotExist):
		return class(errdefs.ErrNotFound)
	case errors.Is(err, libcontainer.ErrExist):
		return class(errdefs.ErrAlreadyExists)
	case errors.Is(err, libcontainer.ErrNotRunning), errors.Is(err, libcontainer.ErrPaused), errors.Is(err, unix.ESRCH): // ESRCH: its PID namespace is ending
		return class(errdefs.ErrFailedPrecondition)
	case errors.Is(err, libcontainer.ErrInvalidID), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE):
		return class(errdefs.ErrInvalidArgument)
	case err != nil && wantsMemory.MatchString(err.Error()):
		return class(errdefs.ErrResourceExhausted)
	}
	return err
}
