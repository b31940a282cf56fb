// Package lifecycle is what all OCI runtimes have in common: a container's state
// directory, the order in which things are recorded and done, and the one undo
// that failed creates, crashed creates and ordinary deletion share. What differs
// between runtimes is a Driver.
//
// It keeps nothing in memory between calls: the state directory and the kernel
// are asked each time.
package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/state"
)

// Driver does what only one particular runtime knows how to do. It is called
// in the right order and with a state directory that exists, in which it may
// have files of its own.
type Driver interface {
	// Create makes the container of a spec in which relative paths are
	// absolute already. It may leave whatever it likes behind when it fails, but
	// no process outside the container's cgroup, other than one that is dying.
	// It need not watch ctx while all it waits for are processes in the cgroup.
	Create(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio) (ociruntime.Started, error)

	// Start hands control to the user's program. The first process was alive
	// a moment ago.
	Start(ctx context.Context, c ociruntime.Container, first host.Process) error

	// Started reports whether the first process, alive a moment ago, has
	// executed the user's program. It is asked only if Start did not live to
	// record it.
	Started(ctx context.Context, c ociruntime.Container, first host.Process) (bool, error)

	// Exec is as in ociruntime.Runtime, in a container whose first process was
	// running a moment ago.
	Exec(ctx context.Context, c ociruntime.Container, first host.Process, p *specs.Process, stdio ociruntime.Stdio) (ociruntime.Started, error)

	// Update is as in ociruntime.Runtime, for a live container. Updates come one
	// at a time.
	Update(ctx context.Context, c ociruntime.Container, r *specs.LinuxResources) error

	// Checkpoint is as in ociruntime.Runtime, with the options for CRIU in place.
	// Dir has an empty criu.ImagesDir; CRIU's log goes to Dir. Checkpoints come
	// one at a time.
	Checkpoint(ctx context.Context, c ociruntime.Container, to ociruntime.Checkpoint) error

	// Restore is like Create, of processes that come from a checkpoint and stay
	// stopped. CRIU's log goes to the state directory.
	Restore(ctx context.Context, c ociruntime.Container, bundle string, spec *specs.Spec, stdio ociruntime.Stdio, from ociruntime.Checkpoint) (ociruntime.Started, error)

	// Destroy removes what the driver knows of besides processes, cgroups and
	// the state directory. All processes in the cgroup are dead. The container
	// may be half made, or destroyed.
	Destroy(ctx context.Context, c ociruntime.Container) error
}

// New returns the runtime that a driver makes possible.
func New(d Driver, log *slog.Logger) ociruntime.Runtime {
	return &runtime{driver: d, log: log}
}

type runtime struct {
	driver Driver
	log    *slog.Logger

	// updating is held by Update: an update reads all limits of a container and
	// writes them back, so two at once would undo each other.
	updating sync.Mutex

	// dumping is held by Checkpoint and by a Create that restores: CRIU is not
	// made to run beside itself, and libcontainer's use of it even less.
	dumping sync.Mutex
}

// The records in a state directory, in the order in which they come to be.
const (
	undoName    = "undo"    // how to undo everything that is made from now on
	restoreName = "restore" // empty: the processes come from a checkpoint
	firstName   = "first"   // the first process: Create succeeded
	startedName = "started" // empty: Start succeeded
)

var (
	undoKind  = state.Kind{Name: "runtime-undo", Version: 1}
	firstKind = state.Kind{Name: "runtime-first", Version: 1}
)

// undo is what must be known of a container that may be only half made.
type undo struct {
	Boot   string      `json:"boot"`
	Cgroup host.Cgroup `json:"cgroup"`
	// OwnPIDs is set if the container has a PID namespace of its own, so that
	// the kernel kills the rest when the first process dies.
	OwnPIDs bool `json:"ownPIDs"`
}

// undoTimeout bounds the undoing of a failed Create, whose own context may have
// ended already.
const undoTimeout = 30 * time.Second

func (r *runtime) Create(ctx context.Context, c ociruntime.Container, req ociruntime.CreateRequest) (ociruntime.Started, error) {
	defer host.ReadyAttach()()
	started, err := r.create(ctx, c, req)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("create container %s: %w", c.ID, err)
	}
	return started, nil
}

func (r *runtime) create(ctx context.Context, c ociruntime.Container, req ociruntime.CreateRequest) (ociruntime.Started, error) {
	spec, err := readSpec(req.Bundle)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	if _, err := os.Lstat(c.StateDir); err == nil {
		return ociruntime.Started{}, errdefs.ErrAlreadyExists
	}
	u, err := r.plan(spec)
	if err != nil {
		return ociruntime.Started{}, err
	}
	if err := req.Stdio.SetBlocking(); err != nil {
		return ociruntime.Started{}, err
	}
	if err := req.Stdio.SetLabel(spec.Linux.MountLabel); err != nil {
		return ociruntime.Started{}, err
	}
	uids, gids, err := specIDs(spec)
	if err != nil {
		return ociruntime.Started{}, err
	}
	if err := give(req.Stdio, spec.Process.User, uids, gids); err != nil {
		return ociruntime.Started{}, err
	}
	if err := os.Mkdir(c.StateDir, 0o711); err != nil {
		return ociruntime.Started{}, err
	}
	started, err := r.carryOut(ctx, c, u, req, spec)
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return ociruntime.Started{}, errors.Join(err, r.delete(ctx, c))
	}
	return started, nil
}

// plan finds out what undoing the spec will take.
func (r *runtime) plan(spec *specs.Spec) (undo, error) {
	dirs, err := cgroupOf(spec.Linux.CgroupsPath)
	if err != nil {
		return undo{}, fmt.Errorf("%w: linux.cgroupsPath %q: %w", errdefs.ErrInvalidArgument, spec.Linux.CgroupsPath, err)
	}
	// Two containers in one cgroup would be killed together.
	pids, err := dirs.Pids()
	if err != nil {
		return undo{}, err
	}
	if len(pids) > 0 {
		return undo{}, fmt.Errorf("cgroup %s has %d processes: %w", spec.Linux.CgroupsPath, len(pids), errdefs.ErrFailedPrecondition)
	}
	u := undo{Boot: host.BootID(), Cgroup: dirs}
	for _, ns := range spec.Linux.Namespaces {
		u.OwnPIDs = u.OwnPIDs || ns.Type == specs.PIDNamespace && ns.Path == ""
	}
	return u, nil
}

// cgroupOf returns the directories that a runtime makes for a cgroupsPath.
func cgroupOf(path string) (host.Cgroup, error) {
	if path = filepath.Clean("/" + path); path == "/" {
		return nil, errors.New("is no cgroup of the container's own")
	}
	return CgroupDirs(path)
}

// CgroupDirs returns the directories of a cgroup, which need not exist, by
// controller. The path is absolute and clean.
func CgroupDirs(path string) (host.Cgroup, error) {
	known, err := hierarchies()
	if err != nil {
		return nil, err
	}
	dirs := make(host.Cgroup, len(known))
	for controller, hierarchy := range known {
		dirs[controller] = hierarchy + path
	}
	return dirs, nil
}

// hierarchies are the directories by controller that cgroups are in. To find them
// takes dozens of system calls, and they stay where they are.
var hierarchies = sync.OnceValues(func() (map[string]string, error) {
	const any = "/sampan"
	m, err := manager.New(&cgroups.Cgroup{Resources: &cgroups.Resources{}, Path: any})
	if err != nil {
		return nil, err
	}
	found := m.GetPaths()
	for controller, dir := range found {
		found[controller] = strings.TrimSuffix(dir, any)
	}
	return found, nil
})

// carryOut creates, and records each step before or as soon as it is done.
func (r *runtime) carryOut(ctx context.Context, c ociruntime.Container, u undo, req ociruntime.CreateRequest, spec *specs.Spec) (ociruntime.Started, error) {
	fault.Point("runtime.directory-made")
	if err := state.Write(filepath.Join(c.StateDir, undoName), undoKind, u, state.Volatile); err != nil {
		return ociruntime.Started{}, err
	}
	stop := killAtEnd(ctx, u.Cgroup)
	started, err := r.makeProcess(ctx, c, req, spec)
	if err == nil && req.Restore != nil {
		if err = confined(u.Cgroup, spec); err != nil {
			err = errors.Join(err, Discard(started))
		}
	}
	stop()
	switch {
	case err != nil && ctx.Err() != nil:
		return ociruntime.Started{}, fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case err != nil:
		return ociruntime.Started{}, err
	}
	fault.Point("runtime.process-made")
	err = context.Cause(ctx)
	if err == nil {
		err = recordFirst(c, started.Pid)
	}
	if err != nil {
		return ociruntime.Started{}, errors.Join(err, Discard(started))
	}
	return started, nil
}

// makeProcess makes the first process, or all of those of a checkpoint.
func (r *runtime) makeProcess(ctx context.Context, c ociruntime.Container, req ociruntime.CreateRequest, spec *specs.Spec) (ociruntime.Started, error) {
	if req.Restore == nil {
		return r.driver.Create(ctx, c, req.Bundle, spec, req.Stdio)
	}
	return r.restore(ctx, c, req, spec)
}

func recordFirst(c ociruntime.Container, pid int) error {
	first, err := host.Identify(pid)
	if err != nil {
		return err
	}
	return state.Write(filepath.Join(c.StateDir, firstName), firstKind, first, state.Volatile)
}

// killAtEnd kills what is in the cgroup when ctx ends, and goes on until the
// returned function is called.
func killAtEnd(ctx context.Context, cgroup host.Cgroup) (stop func()) {
	stopped := make(chan struct{})
	var killer sync.WaitGroup
	killer.Go(func() {
		select {
		case <-stopped:
			return
		case <-ctx.Done():
		}
		for {
			_, _ = cgroup.Signal(unix.SIGKILL) // the delete that follows reports what does not die
			select {
			case <-stopped:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	return func() { close(stopped); killer.Wait() }
}

// Discard kills a process that nobody will be told of and, if it is a child of
// ours, waits for its end. Until that its pid cannot mean another.
func Discard(s ociruntime.Started) error {
	if s.Console != nil {
		s.Console.Close()
	}
	process, err := os.FindProcess(s.Pid)
	if err != nil {
		return err
	}
	if err := process.Signal(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", s.Pid, err)
	}
	if !s.Child {
		return process.Release()
	}
	_, err = process.Wait()
	return err
}

func (r *runtime) Start(ctx context.Context, c ociruntime.Container) error {
	if err := r.start(ctx, c); err != nil {
		return fmt.Errorf("start container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) start(ctx context.Context, c ociruntime.Container) error {
	first, status, err := r.status(ctx, c)
	if err != nil {
		return err
	}
	if status != ociruntime.Created {
		return notIn(status)
	}
	if err := r.letGo(ctx, c, first); err != nil {
		return err
	}
	fault.Point("runtime.started")
	return os.WriteFile(filepath.Join(c.StateDir, startedName), nil, 0o600)
}

func notIn(s ociruntime.Status) error {
	return fmt.Errorf("it is %s: %w", s, errdefs.ErrFailedPrecondition)
}

// status returns the first process of a container whose Create succeeded in this
// boot, and where it is in its life.
func (r *runtime) status(ctx context.Context, c ociruntime.Container) (host.Process, ociruntime.Status, error) {
	first, err := readFirst(c)
	if err != nil {
		return host.Process{}, "", err
	}
	if !first.Alive() {
		return first, ociruntime.Stopped, nil
	}
	if state.Exists(filepath.Join(c.StateDir, startedName)) {
		return first, ociruntime.Running, nil
	}
	started, err := r.wasLetGo(ctx, c, first)
	switch {
	case err != nil:
		return host.Process{}, "", err
	case started:
		return first, ociruntime.Running, nil
	default:
		return first, ociruntime.Created, nil
	}
}

func readFirst(c ociruntime.Container) (host.Process, error) {
	var first host.Process
	err := state.Read(filepath.Join(c.StateDir, firstName), firstKind, &first)
	if errors.Is(err, fs.ErrNotExist) || err == nil && first.Boot != host.BootID() {
		return host.Process{}, fmt.Errorf("no such container: %w", errdefs.ErrNotFound)
	}
	return first, err
}

// readUndo is like readFirst, but finds half-made containers too. If the record is
// damaged, what can be learned of the first process has to do.
func (r *runtime) readUndo(c ociruntime.Container) (undo, error) {
	var u undo
	err := state.Read(filepath.Join(c.StateDir, undoName), undoKind, &u)
	if errors.Is(err, fs.ErrNotExist) || err == nil && u.Boot != host.BootID() {
		return undo{}, fmt.Errorf("no such container: %w", errdefs.ErrNotFound)
	}
	if !errors.Is(err, state.ErrDamaged) {
		return u, err
	}
	r.log.Warn("a record of a container is damaged; its first process tells where the others are", "container", c.ID, "err", err)
	u = undo{Boot: host.BootID()}
	if first, err := readFirst(c); err == nil && first.Alive() {
		if u.Cgroup, err = host.CgroupOf(first.Pid); err != nil {
			return undo{}, err
		}
		// It may have moved elsewhere, where others are.
		maps.DeleteFunc(u.Cgroup, func(_, dir string) bool { return !strings.Contains(filepath.Base(dir), c.ID) })
	}
	return u, nil
}

func (r *runtime) Exec(ctx context.Context, c ociruntime.Container, req ociruntime.ExecRequest) (ociruntime.Started, error) {
	defer host.ReadyAttach()()
	started, err := r.exec(ctx, c, req)
	if err != nil {
		return ociruntime.Started{}, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}
	return started, nil
}

func (r *runtime) exec(ctx context.Context, c ociruntime.Container, req ociruntime.ExecRequest) (ociruntime.Started, error) {
	if err := checkProcess(req.Process); err != nil {
		return ociruntime.Started{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	if err := req.Stdio.SetBlocking(); err != nil {
		return ociruntime.Started{}, err
	}
	first, status, err := r.status(ctx, c)
	switch {
	case err != nil:
		return ociruntime.Started{}, err
	case status != ociruntime.Running:
		return ociruntime.Started{}, notIn(status)
	case ctx.Err() != nil:
		return ociruntime.Started{}, context.Cause(ctx)
	}
	started, err := r.execIn(ctx, c, first, req)
	if err != nil {
		if !isAlive(c) { // it ended under the exec: say so instead of what broke
			err = fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
		}
		return ociruntime.Started{}, err
	}
	if ctx.Err() != nil {
		return ociruntime.Started{}, errors.Join(context.Cause(ctx), Discard(started))
	}
	return started, nil
}

// execIn runs a process beside the first one.
func (r *runtime) execIn(ctx context.Context, c ociruntime.Container, first host.Process, req ociruntime.ExecRequest) (ociruntime.Started, error) {
	uids, gids, err := host.IDsOf(first.Pid)
	if err != nil {
		return ociruntime.Started{}, err
	}
	if err := give(req.Stdio, req.Process.User, uids, gids); err != nil {
		return ociruntime.Started{}, err
	}
	return r.driver.Exec(ctx, c, first, req.Process, req.Stdio)
}

// isAlive reports whether the container's first process is alive.
func isAlive(c ociruntime.Container) bool {
	first, err := readFirst(c)
	return err == nil && first.Alive()
}

func (r *runtime) Signal(_ context.Context, c ociruntime.Container, sig unix.Signal, all bool) error {
	if err := r.signal(c, sig, all); err != nil {
		return fmt.Errorf("signal container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) signal(c ociruntime.Container, sig unix.Signal, all bool) error {
	first, err := readFirst(c)
	damaged := errors.Is(err, state.ErrDamaged)
	if err != nil && !damaged {
		return err
	}
	u, err := r.readUndo(c)
	if err != nil {
		return err
	}
	if all || damaged {
		_, err := u.Cgroup.Signal(sig)
		return err
	}
	handle, err := first.Open()
	if err == nil {
		defer handle.Close()
		if handle.Exited() {
			return notIn(ociruntime.Stopped)
		}
		err = handle.Signal(sig)
	}
	if errdefs.IsNotFound(err) {
		return notIn(ociruntime.Stopped)
	}
	if err == nil && sig == unix.SIGKILL && !u.OwnPIDs {
		_, err = u.Cgroup.Signal(sig)
	}
	return err
}

func (r *runtime) Update(ctx context.Context, c ociruntime.Container, resources *specs.LinuxResources) error {
	if err := r.update(ctx, c, resources); err != nil {
		return fmt.Errorf("update container %s: %w", c.ID, err)
	}
	return nil
}

func (r *runtime) update(ctx context.Context, c ociruntime.Container, resources *specs.LinuxResources) error {
	r.updating.Lock()
	defer r.updating.Unlock()
	first, err := readFirst(c)
	switch {
	case err != nil:
		return err
	case !first.Alive():
		return notIn(ociruntime.Stopped)
	case resources == nil:
		return nil
	}
	return r.driver.Update(ctx, c, resources)
}

func (r *runtime) Pids(_ context.Context, c ociruntime.Container) ([]int, error) {
	u, err := r.readUndo(c)
	if err != nil {
		return nil, fmt.Errorf("list processes of container %s: %w", c.ID, err)
	}
	return u.Cgroup.Pids()
}

func (r *runtime) State(ctx context.Context, c ociruntime.Container) (ociruntime.State, error) {
	first, status, err := r.status(ctx, c)
	if err != nil {
		return ociruntime.State{}, fmt.Errorf("state of container %s: %w", c.ID, err)
	}
	if status == ociruntime.Stopped {
		first.Pid = 0
	}
	return ociruntime.State{Status: status, Pid: first.Pid}, nil
}

func (r *runtime) OOMKills(c ociruntime.Container) (uint64, error) {
	u, err := r.readUndo(c)
	if err != nil {
		return 0, fmt.Errorf("container %s: %w", c.ID, err)
	}
	n, err := u.Cgroup.OOMKills()
	if err != nil {
		return 0, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return n, nil
}

func (r *runtime) Delete(ctx context.Context, c ociruntime.Container) error {
	if err := r.delete(ctx, c); err != nil {
		return fmt.Errorf("delete container %s: %w", c.ID, err)
	}
	return nil
}

// delete is the one undo, for containers in any condition.
func (r *runtime) delete(ctx context.Context, c ociruntime.Container) error {
	u, err := r.readUndo(c)
	if errdefs.IsNotFound(err) {
		// Nothing was made yet, or a reboot has taken it all.
		return os.RemoveAll(c.StateDir)
	}
	if err != nil {
		return err
	}
	if err := u.Cgroup.Kill(ctx); err != nil {
		return err
	}
	if err := awaitEnd(ctx, c); err != nil {
		return err
	}
	fault.Point("runtime.processes-dead")
	if err := r.destroy(ctx, c); err != nil {
		// What the driver could not do is not worth a container that cannot be
		// deleted: no process is left to use it.
		r.log.Warn("the runtime could not destroy a container", "op", "delete", "container", c.ID, "err", err)
	}
	fault.Point("runtime.destroyed")
	if err := u.Cgroup.Remove(ctx); err != nil {
		return err
	}
	fault.Point("runtime.cgroup-removed")
	return os.RemoveAll(c.StateDir)
}

// destroyTimeout bounds what the driver may take to clean up. No process is left
// by then, so whatever takes longer hangs.
const destroyTimeout = 10 * time.Second

func (r *runtime) destroy(ctx context.Context, c ociruntime.Container) error {
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	return r.driver.Destroy(ctx, c)
}

// awaitEnd waits until the first process is a zombie or gone. It left the cgroup
// a little earlier.
func awaitEnd(ctx context.Context, c ociruntime.Container) error {
	first, err := readFirst(c)
	if errdefs.IsNotFound(err) || errors.Is(err, state.ErrDamaged) { // whatever it was, it has been killed
		return nil
	}
	if err != nil {
		return err
	}
	handle, err := first.Open()
	if err != nil {
		return nil
	}
	defer handle.Close()
	// A runtime may have put it elsewhere than into the cgroup.
	if err := handle.Signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return handle.Wait(ctx)
}

// readSpec reads the bundle's config.json and makes relative paths in it
// absolute, since a keeper's working directory is no bundle.
func readSpec(bundle string) (*specs.Spec, error) {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("decode %s: %w", path, err)
	}
	if spec.Root == nil || spec.Linux == nil {
		return nil, fmt.Errorf("%s: no root or no linux section", path)
	}
	if err := checkProcess(spec.Process); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	spec.Root.Path = absolute(bundle, spec.Root.Path)
	for i, m := range spec.Mounts {
		if IsBind(m) {
			spec.Mounts[i].Source = absolute(bundle, m.Source)
		}
	}
	return &spec, nil
}

// IsBind reports whether a mount is a bind mount.
func IsBind(m specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

func absolute(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// checkProcess finds what some runtimes leave to their callers to find.
func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errors.New("no process")
	case len(p.Args) == 0 || p.Args[0] == "":
		return errors.New("process.args is empty")
	case !filepath.IsAbs(p.Cwd):
		return fmt.Errorf("process.cwd %q is not absolute", p.Cwd)
	}
	return nil
}
