package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/launch"
	"sampan.dev/sampan/internal/ociruntime/lifecycle"
	"sampan.dev/sampan/internal/state"
)

// creation is the making of one container with package launch. What it leaves is
// what libcontainer would have left, so that libcontainer can go on with the
// container: update it, checkpoint it, or exec in it what is not for launch.
type creation struct {
	d       *driver
	c       ociruntime.Container
	config  *configs.Config
	process *specs.Process
	cgroup  cgroups.Manager
	filter  filter

	options launch.Options
	opened  []*os.File // closed when the process has its own
	born    bool       // in its cgroup
}

// create makes a container whose spec fits.
func (d *driver) create(ctx context.Context, c ociruntime.Container, config *configs.Config, process *specs.Process, stdio ociruntime.Stdio) (ociruntime.Started, error) {
	m := &creation{d: d, c: c, config: config, process: process}
	m.options.Stdin, m.options.Stdout, m.options.Stderr = stdio.Stdin, stdio.Stdout, stdio.Stderr
	if process.Terminal {
		m.options.Stdin, m.options.Stdout, m.options.Stderr = nil, nil, nil
	}
	defer m.close()
	if err := m.prepare(); err != nil {
		return ociruntime.Started{}, classify(err)
	}
	p, err := m.plan()
	if err != nil {
		return ociruntime.Started{}, classify(err)
	}
	started, err := m.run(ctx, p)
	if err != nil {
		return ociruntime.Started{}, classify(err)
	}
	return started, nil
}

func (m *creation) close() {
	for _, f := range m.opened {
		f.Close()
	}
}

// open opens a file that the process is given.
func (m *creation) open(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags, 0)
	if err == nil {
		m.opened = append(m.opened, f)
	}
	return f, err
}

// prepare checks the configuration and makes what the process needs: the
// container's directory with its FIFO, its cgroup, its filter.
func (m *creation) prepare() error {
	if err := validate.Validate(m.config); err != nil {
		return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	if err := m.prepareCgroup(); err != nil {
		return err
	}
	if err := os.Mkdir(m.dir(), 0o711); err != nil {
		return err
	}
	if err := m.prepareFIFO(); err != nil {
		return err
	}
	if m.config.Seccomp != nil {
		var err error
		if m.filter, err = m.d.filters.of(m.config.Seccomp); err != nil {
			return err
		}
	}
	return recordEntry(m.c, entryOf(m.config, m.cgroup), m.filter)
}

// dir is libcontainer's directory.
func (m *creation) dir() string { return filepath.Join(m.c.StateDir, m.c.ID) }

func (m *creation) prepareCgroup() (err error) {
	dirs, err := lifecycle.CgroupDirs(filepath.Clean("/" + m.config.Cgroups.Path))
	if err != nil {
		return err
	}
	if m.cgroup, err = manager.NewWithPaths(m.config.Cgroups, dirs); err != nil {
		return err
	}
	if !cgroups.IsCgroup2UnifiedMode() {
		err := dirs.Make()
		if err != nil { // libcontainer knows more layouts
			err = m.cgroup.Apply(-1)
		}
		if err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		return nil
	}
	if err := m.cgroup.Apply(-1); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	m.options.Cgroup, err = m.open(m.cgroup.Path(""), unix.O_PATH|unix.O_DIRECTORY)
	m.born = err == nil
	return err
}

func (m *creation) prepareFIFO() error {
	path := fifoPath(m.c)
	if err := unix.Mkfifo(path, 0o666); err != nil {
		return &fs.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	if err := os.Chmod(path, 0o666); err != nil { // whatever the umask
		return err
	}
	var err error
	m.options.FIFO, err = m.open(path, unix.O_PATH)
	return err
}

// plan says what the process does.
func (m *creation) plan() (*launch.Plan, error) {
	p := &launch.Plan{}
	for _, ns := range m.config.Namespaces {
		if err := m.planNamespace(p, ns); err != nil {
			return nil, err
		}
	}
	if m.config.Namespaces.Contains(configs.NEWCGROUP) {
		p.Unshare(unix.CLONE_NEWCGROUP)
	}
	// What the session keyring is called, and that its user may search it.
	p.Keyring("_ses."+m.c.ID, 0x80000)
	p.Procfs()
	planRoot(p, m.d.launcher, m.config)
	return p, planFirst(p, m.config, m.process, cgroupMounts(m.cgroup.GetPaths(), m.config.Cgroups.Path), m.filter)
}

// planNamespace has the process be born in a namespace or join it.
func (m *creation) planNamespace(p *launch.Plan, ns configs.Namespace) error {
	switch {
	case ns.Type == configs.NEWCGROUP, ns.Type == configs.NEWNS: // later
		return nil
	case ns.Path == "":
		m.options.Flags |= uintptr(ns.Syscall())
		return nil
	}
	f, err := m.open(ns.Path, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("linux.namespaces: %s: %w", ns.Type, err)
	}
	if ns.Type == configs.NEWPID {
		m.options.PIDs = f
		return nil
	}
	p.Setns("linux.namespaces: "+ns.Path, int(f.Fd()), ns.Syscall())
	return nil
}

// run starts the process and sees it to where it waits for Start.
func (m *creation) run(ctx context.Context, p *launch.Plan) (ociruntime.Started, error) {
	process, err := m.d.launcher.Start(p, m.options)
	if err != nil {
		return ociruntime.Started{}, err
	}
	defer process.Close()
	stop := context.AfterFunc(ctx, process.Kill)
	defer stop()
	var ours tasks
	ours.add(func() error { return m.enter(process.Pid) })
	ours.add(func() error { return m.record(process.Pid) })
	started, err := attend(process, ours.wait)
	if err == nil {
		return started, nil
	}
	err = giveUp(process, started, err, &ours)
	if n, oerr := m.cgroup.OOMKillCount(); oerr == nil && n > 0 {
		err = fmt.Errorf("its process was killed for want of memory, is the limit too low? %w: %w", err, errdefs.ErrResourceExhausted)
	}
	return ociruntime.Started{}, err
}

// errKilled says that somebody else has killed a process.
var errKilled = errors.New("it was killed")

// giveUp ends a process, and returns why.
func giveUp(process *launch.Process, started ociruntime.Started, cause error, ours *tasks) error {
	if started.Console != nil {
		started.Console.Close()
	}
	process.Kill()
	failed := ours.wait() // before the pid may be another's
	status, err := process.Reap()
	switch {
	case err != nil:
		return errors.Join(cause, err)
	case errors.Is(cause, io.EOF) && failed != nil:
		return failed
	case errors.Is(cause, io.EOF):
		err := fmt.Errorf("its process ended before it could be the user's (wait status %#x)", status)
		if status.Signaled() && status.Signal() == unix.SIGKILL {
			err = fmt.Errorf("%w: %w", err, errKilled)
		}
		return err
	}
	return cause // what is ours may have failed for want of a process
}

// tasks are what is done while a process works.
type tasks struct {
	group sync.WaitGroup
	mu    sync.Mutex
	err   error
}

func (t *tasks) add(task func() error) {
	t.group.Go(func() {
		if err := task(); err != nil {
			t.mu.Lock()
			t.err = errors.Join(t.err, err)
			t.mu.Unlock()
		}
	})
}

// wait waits for all of them, and returns their errors once.
func (t *tasks) wait() error {
	t.group.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.err
	t.err = nil
	return err
}

// attend answers what a process tells, until it is the user's or waits to be. It
// may become so only when ours, what is done for it meanwhile, is done.
func attend(process *launch.Process, ours func() error) (ociruntime.Started, error) {
	started := ociruntime.Started{Pid: process.Pid, Child: true}
	var ready bool
	for {
		event, file, err := process.Next()
		switch {
		case errors.Is(err, io.EOF) && ready:
			return started, nil
		case err != nil:
			return started, err
		case event == launch.Terminal:
			started.Console = file
			continue
		}
		ready = ready || event == launch.Ready
		if err := ours(); err != nil {
			return started, err
		}
		if err := process.Continue(); err != nil {
			return started, io.EOF // it is dead
		}
	}
}

// learning guards what the library of cgroups notes about the host, in variables
// without a lock, the first time that limits are set.
var learning struct {
	sync.Mutex
	done atomic.Bool
}

// setLimits calls set, one at a time until one has succeeded.
func setLimits(set func() error) error {
	if learning.done.Load() {
		return set()
	}
	learning.Lock()
	defer learning.Unlock()
	err := set()
	if err == nil {
		learning.done.Store(true)
	}
	return err
}

// enter puts the process into its cgroup and sets the limits: before, where that
// can be, since the rules for devices are changed one by one, and it makes devices
// meanwhile.
func (m *creation) enter(pid int) error {
	if err := setLimits(func() error { return m.cgroup.Set(m.config.Cgroups.Resources) }); err != nil {
		return fmt.Errorf("linux.resources: %w", err)
	}
	if !m.born {
		if err := joinCgroup(m.cgroup.GetPaths(), pid); err != nil {
			return err
		}
	}
	if score := m.config.OomScoreAdj; score != nil {
		if err := setOOMScore(pid, *score); err != nil {
			return err
		}
	}
	resetAffinity(pid)
	return nil
}

// joinCgroup moves a process into the directories of a cgroup of v1.
func joinCgroup(paths map[string]string, pid int) error {
	joined := make(map[string]bool, len(paths)) // some controllers share one
	for controller, dir := range paths {
		if joined[dir] {
			continue
		}
		err := cgroups.WriteCgroupProc(dir, pid)
		if err != nil && !host.LimitsNothing(controller) {
			return fmt.Errorf("cgroup: %w", err)
		}
		joined[dir] = err == nil
	}
	return nil
}

func setOOMScore(pid, score int) error {
	path := "/proc/" + strconv.Itoa(pid) + "/oom_score_adj"
	if err := os.WriteFile(path, []byte(strconv.Itoa(score)), 0); err != nil {
		return fmt.Errorf("process.oomScoreAdj: %w", err)
	}
	return nil
}

// resetAffinity lets a process run on all CPUs that its cgroup has, whatever the
// keeper was started with. It may be that it is not allowed to.
func resetAffinity(pid int) {
	var all unix.CPUSet
	for i := range all {
		all[i] = ^all[i]
	}
	_ = unix.SchedSetaffinity(pid, &all)
}

// record writes libcontainer's state.
func (m *creation) record(pid int) error {
	self, err := host.Identify(pid)
	if err != nil {
		return err
	}
	s := libcontainer.State{
		BaseState: libcontainer.BaseState{
			ID: m.c.ID, InitProcessPid: pid, InitProcessStartTime: self.Start, Created: time.Now().UTC(), Config: *m.config,
		},
		CgroupPaths:         m.cgroup.GetPaths(),
		NamespacePaths:      map[configs.NamespaceType]string{},
		ExternalDescriptors: m.descriptors(),
	}
	for _, kind := range configs.NamespaceTypes() {
		if configs.IsNamespaceSupported(kind) {
			ns := configs.Namespace{Type: kind}
			s.NamespacePaths[kind] = ns.GetPath(pid)
		}
	}
	for _, ns := range m.config.Namespaces {
		s.NamespacePaths[ns.Type] = ns.GetPath(pid)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join(m.dir(), "state.json")
	if err := os.WriteFile(path+".tmp", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// descriptors are what the process' stdio was to begin with, for a checkpoint.
func (m *creation) descriptors() []string {
	list := make([]string, 0, 3)
	for _, f := range []*os.File{m.options.Stdin, m.options.Stdout, m.options.Stderr} {
		target := "/dev/null"
		if f != nil {
			target, _ = os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
		}
		list = append(list, target)
	}
	return list
}

// entry is how further processes enter a container.
type entry struct {
	Namespaces int               `json:"namespaces"` // CLONE_NEW*, of those that are not the keeper's
	Cgroup     map[string]string `json:"cgroup"`     // directories by controller
	Umask      *uint32           `json:"umask,omitempty"`
	OOMScore   *int              `json:"oomScoreAdj,omitempty"`
	Seccomp    uint              `json:"seccompFlags,omitempty"`
}

const (
	entryName  = "entry"   // record
	filterName = "seccomp" // instructions of the filter, if there is one
)

var entryKind = state.Kind{Name: "runtime-entry", Version: 1}

func entryOf(c *configs.Config, m cgroups.Manager) entry {
	e := entry{Cgroup: m.GetPaths(), Umask: c.Umask, OOMScore: c.OomScoreAdj}
	for _, ns := range c.Namespaces {
		e.Namespaces |= ns.Syscall()
	}
	return e
}

func recordEntry(c ociruntime.Container, e entry, f filter) error {
	e.Seccomp = f.flags
	if len(f.program) > 0 {
		if err := os.WriteFile(filepath.Join(c.StateDir, filterName), f.program, 0o600); err != nil {
			return err
		}
	}
	return state.Write(filepath.Join(c.StateDir, entryName), entryKind, e, state.Volatile)
}

// errNoEntry says that a container was made by libcontainer.
var errNoEntry = errors.New("no entry")

func readEntry(c ociruntime.Container) (e entry, f filter, err error) {
	err = state.Read(filepath.Join(c.StateDir, entryName), entryKind, &e)
	if errors.Is(err, fs.ErrNotExist) {
		return e, f, errNoEntry
	}
	if err != nil {
		return e, f, err
	}
	f.flags = e.Seccomp
	f.program, err = os.ReadFile(filepath.Join(c.StateDir, filterName))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return e, f, err
}
