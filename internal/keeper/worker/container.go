package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/keeper/logs"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/state"
)

// The files in a container's directory, in the order in which they come about.
const (
	requestName = link.RequestName // record: what was asked for; before anything is made
	journalName = "journal"        // of the log
	runtimeName = "runtime"        // directory, the OCI runtime's
	processName = link.ProcessName // record: the first process; the container is created
	startedName = "started"        // record: when Start was called; before it has effect
	pausedName  = "paused"         // empty: it is paused for a checkpoint; before it is
	statusName  = "status"         // how the process exited, written by the supervisor
)

var (
	requestKind = state.Kind{Name: "keeper-request", Version: 1}
	processKind = state.Kind{Name: "keeper-process", Version: 1}
	startedKind = state.Kind{Name: "keeper-started", Version: 1}
)

type processRecord struct {
	Process   host.Process `json:"process"`
	CreatedAt time.Time    `json:"createdAt"`
}

type startedRecord struct {
	At time.Time `json:"at"`
}

const (
	// drainTimeout bounds how long an exit waits for a log that cannot be written.
	drainTimeout = 2 * time.Second
	// killTimeout bounds how long a Delete waits for a killed process.
	killTimeout = 10 * time.Second
)

// container is one container of this keeper, from the request for it until its
// directory is gone.
type container struct {
	w   *worker
	log *slog.Logger
	id  string
	dir string

	// ready is closed when the container is created or adopted, or is not to
	// be: then failure says why. Until then only its maker touches what follows.
	ready   chan struct{}
	failure error
	// unreadable is set if the failure is that its records are damaged.
	unreadable bool
	abandon    context.CancelFunc // ends its creation; of no effect later
	making     context.Context

	req       keeper.CreateRequest
	rt        ociruntime.Runtime
	process   host.Process
	pidfd     *host.Pidfd // one of files; nil if the process was gone when adopted
	createdAt time.Time
	output    *logs.Log
	relayed   chan struct{} // closed when the terminal has shown its last; nil without one
	attached  attachments

	// exited is closed when the exit is recorded.
	exited chan struct{}

	starting sync.Mutex // held by Start
	deleting sync.Mutex // held by Delete

	mu        sync.Mutex
	files     map[string]*os.File // those that the supervisor holds too
	startedAt time.Time
	exit      *keeper.Exit
	template  *execTemplate
	deleted   bool
}

func (w *worker) newContainer(id string) *container {
	making, abandon := context.WithCancel(context.Background())
	return &container{
		making: making, abandon: abandon,
		w: w, id: id, dir: filepath.Join(w.cfg.Dir, containersDir, id),
		log:   w.log.With("container", id),
		ready: make(chan struct{}), exited: make(chan struct{}),
		files: map[string]*os.File{},
	}
}

func (c *container) path(name string) string { return filepath.Join(c.dir, name) }

// name is the container's name to its runtime.
func (c *container) name() ociruntime.Container {
	return ociruntime.Container{ID: c.id, StateDir: c.path(runtimeName)}
}

// create makes the container and, on error, unmakes it.
func (c *container) create(req keeper.CreateRequest) {
	limit := opTimeout
	if req.Restore != nil {
		limit = restoreTimeout
	}
	ctx, cancel := context.WithTimeout(c.making, limit)
	defer cancel()
	c.req = req
	err := c.make(ctx)
	c.abandon()
	if err != nil {
		undo, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		if rerr := c.remove(undo); rerr != nil {
			c.log.Error("undo create", "err", rerr)
		}
		c.failure = err
		c.w.drop(c)
	}
	close(c.ready)
	if err == nil {
		go c.await()
	}
}

func (c *container) make(ctx context.Context) error {
	stdio, err := c.prepare(ctx)
	defer stdio.close()
	if err != nil {
		return fmt.Errorf("create container %s: %w", c.id, err)
	}
	fault.Point("worker.log-open")
	// The runtime's errors say what could not be done.
	create := ociruntime.CreateRequest{Bundle: c.req.Bundle, Stdio: stdio.forProcess(c.req.Terminal)}
	if from := c.req.Restore; from != nil {
		create.Restore = &ociruntime.Checkpoint{Dir: from.Dir, CRIU: from.CRIU}
	}
	started, err := c.rt.Create(ctx, c.name(), create)
	if err != nil {
		return err
	}
	fault.Point("worker.runtime-created")
	if err := c.settle(started); err != nil {
		return fmt.Errorf("create container %s: %w", c.id, err)
	}
	return nil
}

// prepare makes what a container needs before its runtime makes it, the request
// first, and returns the container's ends of its stdio, to be closed in any case.
func (c *container) prepare(ctx context.Context) (s stdio, err error) {
	if c.rt, err = c.w.runtime(c.req.Handler); err != nil {
		return s, err
	}
	err = os.Mkdir(c.dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		// An undo that could not be finished.
		if err := c.remove(ctx); err != nil {
			return s, err
		}
		err = os.Mkdir(c.dir, 0o700)
	}
	if err != nil {
		return s, err
	}
	fault.Point("worker.directory-made")
	if err := state.Write(c.path(requestName), requestKind, c.req, state.Volatile); err != nil {
		return s, err
	}
	if s, err = c.openStdio(); err != nil {
		return s, err
	}
	fault.Point("worker.stdio-open")
	return s, c.openLog()
}

// settle takes charge of what the runtime has made.
func (c *container) settle(started ociruntime.Started) error {
	if started.Console != nil {
		if err := c.hold(consoleName, started.Console); err != nil {
			return err
		}
	}
	if err := c.identify(started.Pid); err != nil {
		return err
	}
	if started.Console != nil {
		return c.startRelay()
	}
	return nil
}

// identify makes the container's first process known to all who have to know it,
// the supervisor first: if this worker dies the process becomes its child, and if
// the process becomes a stranger's child, the handle still tells how it ended.
func (c *container) identify(pid int) (err error) {
	if c.process, err = host.Identify(pid); err != nil {
		return err
	}
	if c.pidfd, err = c.process.Open(); err != nil {
		return err
	}
	if err := c.w.tell(c.watchMessage(), nil); err != nil {
		return err
	}
	fault.Point("worker.watched")
	if err := c.hold(processName, c.pidfd.File()); err != nil {
		return err
	}
	fault.Point("worker.held")
	c.createdAt = time.Now()
	return state.Write(c.path(processName), processKind, processRecord{c.process, c.createdAt}, state.Volatile)
}

func (c *container) watchMessage() link.Message {
	return link.Message{Op: link.Watch, ID: c.id, Process: c.process, Path: c.path(statusName)}
}

// forSupervisor returns what this process has to take over of the container when
// it becomes the supervisor. Nothing of the container is opened or closed from then on:
// its lock goes with this program.
func (c *container) forSupervisor() ([]link.HeldFD, link.Message) {
	c.mu.Lock()
	held := heldFDs(c.id, c.files)
	select {
	case <-c.ready:
	default:
		return held, link.Message{}
	}
	if c.exit != nil || c.process.Pid == 0 {
		return held, link.Message{}
	}
	return held, c.watchMessage()
}

// adopt takes the container over from another worker. Its files are those that the
// supervisor has held since.
func (c *container) adopt() {
	made, err := c.load()
	switch {
	case err != nil:
		c.failure = fmt.Errorf("adopt container %s: %w", c.id, err)
		c.log.Error("adopt", "err", err)
		c.keepUnreadable()
	case !made:
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		if err := c.remove(ctx); err != nil {
			c.log.Error("remove what a cut off create has left", "err", err)
		}
		c.failure = fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
		c.w.drop(c)
	}
	close(c.ready)
	if err == nil && made {
		go c.await()
	}
}

// keepUnreadable keeps what has been read of a container, to be signalled, waited
// for and deleted.
func (c *container) keepUnreadable() {
	if f := c.files[processName]; c.pidfd == nil && f != nil {
		c.pidfd = host.PidfdOf(f)
	}
	if c.pidfd == nil && c.process.Pid != 0 {
		var err error
		if c.pidfd, err = c.process.Open(); err != nil {
			c.log.Warn("open the process of an unreadable container", "err", err)
		}
	}
	if c.rt == nil { // what there is to undo is noted by all in the same way
		var err error
		if c.rt, err = c.w.runtime(keeper.Handler{Kind: keeper.Builtin}); err != nil {
			c.log.Error("runtime of an unreadable container", "err", err)
			return
		}
	}
	c.unreadable = true
	go c.awaitUnreadable()
}

// isUnreadable tells whether the container is there, but its records are damaged.
func (c *container) isUnreadable() bool {
	select {
	case <-c.ready:
		return c.unreadable
	default:
		return false
	}
}

// load reads the container's records and opens its files; made is false if its
// Create was cut off.
func (c *container) load() (made bool, err error) {
	unreadable := state.Read(c.path(requestName), requestKind, &c.req)
	if errors.Is(unreadable, fs.ErrNotExist) {
		return false, nil
	}
	var p processRecord
	err = state.Read(c.path(processName), processKind, &p)
	if unreadable == nil && errors.Is(err, fs.ErrNotExist) {
		c.rt, err = c.w.runtime(c.req.Handler)
		return false, err
	}
	c.process, c.createdAt = p.Process, p.CreatedAt
	if err := cmp.Or(unreadable, err); err != nil {
		return false, err
	}
	if c.rt, err = c.w.runtime(c.req.Handler); err != nil {
		return false, err
	}
	if err := c.loadProgress(); err != nil {
		return false, err
	}
	if err := c.resumeCutOff(); err != nil {
		return false, err
	}
	if err := c.reopenStdio(); err != nil {
		return false, err
	}
	if c.files[consoleName] != nil {
		if err := c.startRelay(); err != nil {
			return false, err
		}
	}
	if err := c.openLog(); err != nil {
		return false, err
	}
	return true, nil
}

// loadProgress finds out how far the container's life had come.
func (c *container) loadProgress() error {
	exit, err := keeper.ReadExit(c.req.ExitRecord)
	switch {
	case err == nil:
		c.exit = &exit
	case errors.Is(err, state.ErrDamaged):
		c.exit = &keeper.Exit{Code: keeper.UnknownExitCode, FinishedAt: time.Now(), Message: err.Error()}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if f := c.files[processName]; f != nil {
		c.pidfd = host.PidfdOf(f)
	} else if c.exit == nil {
		if c.pidfd, err = c.process.Open(); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if c.pidfd != nil {
			if err := c.hold(processName, c.pidfd.File()); err != nil {
				return err
			}
		}
	}
	var s startedRecord
	err = state.Read(c.path(startedName), startedKind, &s)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, state.ErrDamaged) {
		// It says when, and so does the file.
		info, serr := os.Stat(c.path(startedName))
		if serr != nil {
			return serr
		}
		s.At, err = info.ModTime(), nil
	}
	if err != nil {
		return err
	}
	if c.exit == nil && c.pidfd != nil {
		ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
		defer cancel()
		if st, err := c.rt.State(ctx, c.name()); err == nil && st.Status == ociruntime.Created {
			return os.Remove(c.path(startedName)) // the start was cut off
		}
	}
	c.startedAt = s.At
	return nil
}

func (c *container) openLog() error {
	cfg := logs.Config{ID: c.id, Path: c.req.LogPath, Journal: c.path(journalName), Tap: c.attached.show}
	cfg.FIFOs[logs.Stdout] = c.files[stdoutName]
	cfg.FIFOs[logs.Stderr] = c.files[stderrName]
	var err error
	c.output, err = c.w.writer.Open(cfg)
	return err
}

// start runs the user's process.
func (c *container) start(ctx context.Context) (time.Time, error) {
	c.starting.Lock()
	defer c.starting.Unlock()
	if s := c.state(); s != keeper.Created {
		return time.Time{}, fmt.Errorf("start container %s: it is %s: %w", c.id, s, errdefs.ErrFailedPrecondition)
	}
	at := time.Now()
	if err := state.Write(c.path(startedName), startedKind, startedRecord{at}, state.Volatile); err != nil {
		return time.Time{}, fmt.Errorf("start container %s: %w", c.id, err)
	}
	err := c.rt.Start(ctx, c.name())
	fault.Point("worker.runtime-started")
	if errdefs.IsFailedPrecondition(err) && c.runs(ctx) {
		err = nil // by a start that was cut off, and that seemed to have had no effect
	}
	if err != nil {
		return time.Time{}, errors.Join(err, state.Remove(c.path(startedName)))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.startedAt = at
	return at, nil
}

// runs tells whether the runtime thinks that the user's process runs.
func (c *container) runs(ctx context.Context) bool {
	s, err := c.rt.State(ctx, c.name())
	return err == nil && s.Status == ociruntime.Running
}

func (c *container) state() keeper.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.exit != nil:
		return keeper.Exited
	case !c.startedAt.IsZero():
		return keeper.Running
	default:
		return keeper.Created
	}
}

// signal sends sig to the first process, or to all of them.
func (c *container) signal(ctx context.Context, sig unix.Signal, all bool) error {
	if c.state() == keeper.Exited || c.pidfd == nil {
		return fmt.Errorf("signal container %s: it has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if !c.unreadable && (all || sig == unix.SIGKILL) {
		// The runtime knows whether the first process takes the others along.
		err := c.rt.Signal(ctx, c.name(), sig, all)
		if err == nil && sig == unix.SIGKILL && c.isPaused() {
			err = c.rt.Resume(ctx, c.name()) // nobody dies while paused
		}
		return err
	}
	if err := c.pidfd.Signal(sig); errdefs.IsNotFound(err) {
		return fmt.Errorf("signal container %s: it has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	} else if err != nil {
		return fmt.Errorf("signal container %s: %w", c.id, err)
	}
	return nil
}

// delete kills the container if need be and removes all of it but the exit record.
func (c *container) delete(ctx context.Context) error {
	c.deleting.Lock()
	defer c.deleting.Unlock()
	if c.isDeleted() {
		return nil
	}
	if (c.failure == nil || c.unreadable) && c.state() != keeper.Exited {
		if err := c.rt.Signal(ctx, c.name(), unix.SIGKILL, true); err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			c.log.Warn("kill before delete", "err", err)
		}
		if c.pidfd != nil {
			c.pidfd.Signal(unix.SIGKILL)
		}
		select {
		case <-c.exited:
		case <-ctx.Done():
			return fmt.Errorf("delete container %s: wait for its exit: %w", c.id, context.Cause(ctx))
		case <-time.After(killTimeout):
			return fmt.Errorf("delete container %s: its process does not die: %w", c.id, errdefs.ErrUnavailable)
		}
	}
	fault.Point("worker.killed")
	if err := c.remove(ctx); err != nil {
		return err
	}
	fault.Point("worker.deleted")
	c.mu.Lock()
	c.deleted = true
	c.mu.Unlock()
	c.w.drop(c)
	return nil
}

func (c *container) isDeleted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deleted
}

// remove is the one undo: of a failed or cut off create, and of a whole
// container. It copes with any half-made state and may be called again.
func (c *container) remove(ctx context.Context) error {
	if c.rt != nil {
		if err := c.rt.Delete(ctx, c.name()); err != nil {
			return err
		}
	}
	fault.Point("worker.runtime-deleted")
	if c.output != nil {
		c.output.Close()
	}
	if c.pidfd != nil {
		c.w.tell(link.Message{Op: link.Forget, Process: c.process}, nil)
		host.Reap(c.pidfd.Child())
	}
	c.letGo()
	fault.Point("worker.let-go")
	if err := removeDir(c.dir); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	return nil
}

// removeAttempts is how often a directory is emptied in which the supervisor may
// just be writing how a process ended.
const removeAttempts = 10

func removeDir(dir string) error {
	var err error
	for range removeAttempts {
		if err = os.RemoveAll(dir); !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return err
}
