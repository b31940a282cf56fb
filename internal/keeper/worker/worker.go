// Package worker is the half of a keeper that does the work: it creates
// containers through an OCI runtime, moves their output into logs, waits for
// their end, and writes exit records.
//
// It may be killed at any moment. What it must know again is in files, in the
// supervisor's hands, or in the kernel, before anything depends on it; the next
// worker reads it there. When the supervisor dies instead, the worker becomes the
// supervisor by executing itself, and starts a new worker.
package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/keeper/logs"
	"sampan.dev/sampan/internal/keeper/supervisor"
	"sampan.dev/sampan/internal/ociruntime"
)

// Config is what a worker is told.
type Config struct {
	Dir    string // the keeper's
	Cgroup string // the keeper's; only passed on
	// Runtime returns the runtime that a handler names.
	Runtime func(keeper.Handler, *slog.Logger) (ociruntime.Runtime, error)
	// IdleTimeout is how long a keeper without containers and clients stays.
	IdleTimeout time.Duration
	Log         *slog.Logger
}

const (
	containersDir = link.ContainersDir
	// adoptTimeout bounds how long calls wait for the adoption of containers
	// whose log, say, is on a volume that hangs.
	adoptTimeout = 3 * time.Second
	// startTime is how long a worker may need the code that only its start needs.
	startTime = 2 * time.Second
)

// Run works until the keeper is idle. When the supervisor dies it does not
// return: the process is a supervisor then.
func Run(cfg Config) error {
	// Caught and not heard: what is ignored would stay so in containers.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE, unix.SIGHUP, unix.SIGINT)
	for fd := supervisor.WorkerLink; fd <= supervisor.WorkerLock; fd++ {
		unix.CloseOnExec(fd)
	}
	conn, err := link.New(os.NewFile(supervisor.WorkerLink, "link"))
	if err != nil {
		return err
	}
	w := &worker{
		cfg:        cfg,
		log:        cfg.Log.With("worker", os.Getpid()),
		link:       conn,
		containers: map[string]*container{},
		watchers:   map[chan *api.Event]struct{}{},
		runtimes:   map[keeper.Handler]ociruntime.Runtime{},
		pausing:    make(chan struct{}, 1),
		lastUse:    time.Now(),
	}
	if w.self, err = host.Identify(os.Getpid()); err != nil {
		return err
	}
	if err := w.takeHeld(); err != nil {
		return w.orPromote(err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, containersDir), 0o700); err != nil {
		return err
	}
	if w.writer, err = logs.NewWriter(cfg.Dir, w.log); err != nil {
		return err
	}
	fault.Point("worker.took-over")
	go w.watchSupervisor()
	if err := w.adopt(); err != nil {
		return err
	}
	return w.serve()
}

type worker struct {
	cfg    Config
	log    *slog.Logger
	link   *link.Conn
	writer *logs.Writer

	self, supervisor host.Process

	connections atomic.Int64
	pausing     chan struct{} // holds a token during a checkpoint

	mu         sync.Mutex
	containers map[string]*container
	runtimes   map[keeper.Handler]ociruntime.Runtime
	watchers   map[chan *api.Event]struct{}
	lastUse    time.Time
	leaves     bool                           // the keeper is idle and ends
	held       map[string]map[string]*os.File // from the supervisor, until adopted
}

// takeHeld receives the files that the supervisor holds.
func (w *worker) takeHeld() error {
	w.held = map[string]map[string]*os.File{}
	for {
		m, file, err := w.link.Recv()
		if err != nil {
			return err
		}
		switch m.Op {
		case link.Begin:
			w.supervisor = m.Process
			return nil
		case link.Hold:
			if w.held[m.ID] == nil {
				w.held[m.ID] = map[string]*os.File{}
			}
			w.held[m.ID][m.Name] = file
		}
	}
}

// adopt takes over the containers of the worker before.
func (w *worker) adopt() error {
	entries, err := os.ReadDir(filepath.Join(w.cfg.Dir, containersDir))
	if err != nil {
		return fmt.Errorf("adopt containers: %w", err)
	}
	var adopted sync.WaitGroup
	for _, e := range entries {
		c := w.newContainer(e.Name())
		w.mu.Lock()
		w.containers[c.id] = c
		if held := w.held[c.id]; held != nil {
			c.files = held
			delete(w.held, c.id)
		}
		w.mu.Unlock()
		adopted.Go(c.adopt)
	}
	w.releaseHeld()
	done := make(chan struct{})
	go func() { adopted.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(adoptTimeout):
		w.log.Error("adoption of containers takes long, serving without them for now")
	}
	return nil
}

// releaseHeld lets go of files whose containers are gone.
func (w *worker) releaseHeld() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, files := range w.held {
		for _, f := range files {
			f.Close()
		}
		go w.tell(link.Message{Op: link.Release, ID: id}, nil)
	}
	w.held = nil
}

// tell sends a message to the supervisor. If the supervisor is dead it does not
// return, for this process is about to take its place, and what it has begun ends
// here. The caller holds no lock.
func (w *worker) tell(m link.Message, file *os.File) error {
	err := w.link.Send(m, file)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		select {}
	}
	return err
}

// serve answers calls until the keeper is idle.
func (w *worker) serve() error {
	calls, err := w.listener(supervisor.WorkerListener)
	if err != nil {
		return err
	}
	execs, err := w.listener(supervisor.WorkerExecListener)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(classify))
	if err != nil {
		return err
	}
	api.RegisterKeeperService(server, &service{w})
	failed := make(chan error, 2)
	go func() { failed <- server.Serve(context.Background(), calls) }()
	go func() { failed <- w.serveExecs(execs) }()
	fault.Point("worker.adopted")
	if err := w.tell(link.Message{Op: link.Serving}, nil); err != nil {
		w.log.Error("tell supervisor", "err", err)
	}
	idle := time.NewTicker(w.cfg.IdleTimeout / 4)
	defer idle.Stop()
	started := time.AfterFunc(startTime, func() { host.ReturnMemory(context.Background()) }) // as long as the process
	defer started.Stop()
	for {
		select {
		case err := <-failed:
			return err
		case <-idle.C:
			if w.idle() {
				return w.tell(link.Message{Op: link.Quit}, nil)
			}
		}
	}
}

// classify keeps the class of errors across the wire.
func classify(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	return resp, api.ToWire(err)
}

// listener returns the listening socket fd, which stays open for a promotion,
// with its connections counted.
func (w *worker) listener(fd int) (net.Listener, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(dup), "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return countingListener{l, w}, nil
}

type countingListener struct {
	net.Listener
	w *worker
}

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.w.connections.Add(1)
	return &countedConn{UnixConn: conn.(*net.UnixConn), w: l.w}, nil
}

type countedConn struct {
	*net.UnixConn
	w    *worker
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.w.connections.Add(-1) })
	return c.UnixConn.Close()
}

// idle tells whether nobody has needed this keeper for a while, which then ends.
func (w *worker) idle() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.containers) > 0 || w.connections.Load() > 0 {
		w.lastUse = time.Now()
		return false
	}
	w.leaves = time.Since(w.lastUse) > w.cfg.IdleTimeout
	return w.leaves
}

// watchSupervisor waits for the supervisor's end, and takes its place.
func (w *worker) watchSupervisor() {
	for {
		if _, _, err := w.link.Recv(); err != nil {
			w.log.Error("become supervisor", "err", w.orPromote(err))
			os.Exit(1)
		}
	}
}

// orPromote makes this process the supervisor if err says that the supervisor has
// died; otherwise it returns err. What goes on at the same time is cut off
// as if this process had been killed.
func (w *worker) orPromote(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, unix.EPIPE) {
		return err
	}
	h := link.Handover{
		Listener: supervisor.WorkerListener, ExecListener: supervisor.WorkerExecListener, Lock: supervisor.WorkerLock,
	}
	w.mu.Lock()
	for id, files := range w.held {
		h.Held = append(h.Held, heldFDs(id, files)...)
	}
	for _, c := range w.containers {
		held, watch := c.forSupervisor()
		h.Held = append(h.Held, held...)
		if watch.Op != "" {
			h.Watched = append(h.Watched, watch)
		}
	}
	// No child may be started while descriptors are inheritable. The lock comes last:
	// who has another may be starting one.
	syscall.ForkLock.Lock()
	fd, err := h.Save()
	if err != nil {
		return err
	}
	fault.Point("worker.handed-over")
	return syscall.Exec("/proc/self/exe", []string{
		os.Args[0], "supervisor", "--dir", w.cfg.Dir, "--cgroup", w.cfg.Cgroup, "--handover", strconv.Itoa(fd),
	}, os.Environ())
}

// heldFDs are the descriptors of a container's open files.
func heldFDs(id string, files map[string]*os.File) (held []link.HeldFD) {
	for name, f := range files {
		conn, err := f.SyscallConn()
		if err != nil {
			continue // closed
		}
		conn.Control(func(fd uintptr) { held = append(held, link.HeldFD{ID: id, Name: name, FD: int(fd)}) })
	}
	return held
}

// runtime returns the runtime of a handler.
func (w *worker) runtime(h keeper.Handler) (ociruntime.Runtime, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if rt, ok := w.runtimes[h]; ok {
		return rt, nil
	}
	rt, err := w.cfg.Runtime(h, w.log)
	if err == nil {
		w.runtimes[h] = rt
	}
	return rt, err
}

// container returns the container called id once it is made or adopted.
func (w *worker) container(ctx context.Context, id string) (*container, error) {
	w.mu.Lock()
	c, ok := w.containers[id]
	w.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return c, c.made(ctx)
}

// made waits until the container is created or adopted; if it is not to be, the
// error is why.
func (c *container) made(ctx context.Context) error {
	select {
	case <-c.ready:
		return c.failure
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// drop forgets a container whose directory is gone.
func (w *worker) drop(c *container) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.containers[c.id] == c {
		delete(w.containers, c.id)
	}
	w.lastUse = time.Now()
}

// publish tells all watchers of an exit. One that does not keep up is dropped
// and asks anew.
func (w *worker) publish(c *container, e keeper.Exit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.watchers {
		select {
		case ch <- &api.Event{Id: c.id, PodId: c.req.PodID, Exit: toAPIExit(e)}:
		default:
			close(ch)
			delete(w.watchers, ch)
		}
	}
}

func toAPIProcess(p host.Process) *api.Process {
	return &api.Process{Pid: int64(p.Pid), Start: p.Start, Boot: p.Boot}
}
