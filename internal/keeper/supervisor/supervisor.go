// Package supervisor is the half of a keeper that is meant never to fail, because
// it does next to nothing. It is the parent to which a dead worker's containers
// fall; it notes how they exit, holds the files that could not be opened again,
// and starts the next worker.
//
// It knows no container's state and runs nothing but workers. It allocates little
// and imports less.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper/link"
)

// Descriptors of a worker when it starts.
const (
	WorkerLink         = 3
	WorkerListener     = 4
	WorkerExecListener = 5
	WorkerLock         = 6 // keeps the directory locked
	workerFiles        = 7
)

// oomScoreAdj is all but never killed for want of memory.
const oomScoreAdj = "-999"

// Config is what a supervisor is told.
type Config struct {
	Dir      string // the keeper's
	Cgroup   string // to run in, made and removed; "" for none
	Ready    int    // where to write link.ReadyAnswer; -1 if nobody waits
	Handover int    // from the worker that becomes this supervisor; -1 if there was none
	Held     int    // list of files that were held for an earlier keeper; -1 if there is none
	Log      *slog.Logger
}

// Run supervises until the worker says that nothing is left to keep. Then it
// removes the keeper's directory and cgroup.
func Run(cfg Config) error {
	s := &supervisor{
		cfg:     cfg,
		log:     cfg.Log.With("supervisor", os.Getpid()),
		held:    map[string]map[string]*os.File{},
		watched: map[int]link.Message{},
	}
	if cfg.Ready >= 0 {
		unix.CloseOnExec(cfg.Ready)
	}
	if cfg.Handover < 0 {
		if err := awaitBegin(); err != nil {
			return err
		}
	}
	// Caught and not heard: what is ignored would stay so in containers.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE, unix.SIGHUP, unix.SIGINT)
	died := make(chan os.Signal, 1)
	died <- unix.SIGCHLD // children may have exited before; full already, it is not waited for
	signal.Notify(died, unix.SIGCHLD)
	// Whoever is short of memory, the keeper is not to blame. Containers have a
	// score of their own.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(oomScoreAdj), 0); err != nil {
		s.log.Info("the kernel may kill the keeper for want of memory", "err", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	var err error
	if s.self, err = host.Identify(os.Getpid()); err != nil {
		return err
	}
	if err := s.setUp(); err != nil {
		if errors.Is(err, errRuns) {
			s.tellReady()
			return nil
		}
		return err
	}
	start := time.NewTimer(0)
	started := time.AfterFunc(startTime, func() { host.ReturnMemory(context.Background()) }) // as long as the process
	defer started.Stop()
	for {
		select {
		case <-start.C:
			if err := s.startWorker(); err != nil {
				s.log.Error("start worker", "err", err)
				start.Reset(s.backoff.next(0, false))
			}
		case <-died:
			pause, ended := s.reap()
			if ended && s.quits() {
				return s.tearDown()
			}
			if ended {
				start.Reset(pause)
			}
		}
	}
}

// startTime is how long a supervisor may need the code that only its start needs,
// which is most of it.
const startTime = 2 * time.Second

// awaitBegin waits until whoever started this process has put it where it
// belongs, and says so on its standard input.
func awaitBegin() error {
	word := make([]byte, len(link.BeginWord))
	if _, err := io.ReadFull(os.Stdin, word); err != nil || string(word) != link.BeginWord {
		return errors.New("whoever started this keeper did not see it through")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	return unix.Dup2(int(null.Fd()), 0)
}

type supervisor struct {
	cfg   Config
	log   *slog.Logger
	self  host.Process
	files [workerFiles]*os.File // of every worker; those of the link and stdio are nil

	backoff backoff

	mu      sync.Mutex
	worker  worker
	held    map[string]map[string]*os.File // by id and name
	watched map[int]link.Message           // by pid
	recent  recent
	quit    bool
}

// worker is the process that runs now; its pid is 0 if none does.
type worker struct {
	pid     int
	link    *link.Conn
	started time.Time
	served  bool
}

// setUp takes over from a worker that became this process, or begins afresh.
func (s *supervisor) setUp() error {
	if s.cfg.Handover >= 0 {
		return s.takeOver()
	}
	lock, err := lockDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	fault.Point("supervisor.locked")
	if err := s.takeHeld(); err != nil {
		return err
	}
	s.files[WorkerLock] = lock
	if s.cfg.Cgroup != "" {
		if err := enterCgroup(s.cfg.Cgroup); err != nil {
			return err
		}
	}
	fault.Point("supervisor.in-cgroup")
	if s.files[WorkerListener], err = listen(lock, link.SocketName); err != nil {
		return err
	}
	fault.Point("supervisor.listens")
	s.files[WorkerExecListener], err = listen(lock, link.ExecSocketName)
	return err
}

// takeHeld takes what the daemon has held of the containers of a keeper that died.
func (s *supervisor) takeHeld() error {
	if s.cfg.Held < 0 {
		return nil
	}
	held, err := link.LoadHeld(s.cfg.Held)
	if err != nil {
		return err
	}
	for _, h := range held {
		s.hold(h.ID, h.Name, os.NewFile(uintptr(h.FD), h.Name))
	}
	return nil
}

func (s *supervisor) takeOver() error {
	h, err := link.LoadHandover(s.cfg.Handover)
	if err != nil {
		return err
	}
	s.files[WorkerListener] = os.NewFile(uintptr(h.Listener), "listener")
	s.files[WorkerExecListener] = os.NewFile(uintptr(h.ExecListener), "exec listener")
	s.files[WorkerLock] = os.NewFile(uintptr(h.Lock), "lock")
	for _, f := range h.Held {
		s.hold(f.ID, f.Name, os.NewFile(uintptr(f.FD), f.Name))
	}
	for _, m := range h.Watched {
		s.watched[m.Process.Pid] = m
	}
	s.log.Warn("the supervisor died, its worker takes its place", "held", len(h.Held), "watched", len(h.Watched))
	return nil
}

// startWorker starts a worker and hands the held files over.
func (s *supervisor) startWorker() error {
	conn, theirs, err := link.Pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	files := []uintptr{0, 1, 2, theirs.Fd()}
	for _, f := range s.files[WorkerListener:] {
		files = append(files, f.Fd())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{os.Args[0], "worker", "--dir", s.cfg.Dir, "--cgroup", s.cfg.Cgroup}, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: files,
	})
	if err != nil {
		conn.Close()
		return err
	}
	s.worker = worker{pid: pid, link: conn, started: time.Now()}
	go s.handOver(conn)
	return nil
}

// handOver gives the held files to a new worker and then listens to it. It ends
// when the worker has.
func (s *supervisor) handOver(conn *link.Conn) {
	defer conn.Close()
	for _, h := range s.heldNow() {
		if err := conn.Send(h.message, h.file); err != nil {
			return // it died; the next one gets them
		}
	}
	if err := conn.Send(link.Message{Op: link.Begin, Process: s.self}, nil); err != nil {
		return
	}
	conn.Wait(func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.listenTo(conn) != nil
	})
}

type heldFile struct {
	message link.Message
	file    *os.File
}

func (s *supervisor) heldNow() []heldFile {
	s.mu.Lock()
	defer s.mu.Unlock()
	var files []heldFile
	for id, names := range s.held {
		for name, f := range names {
			files = append(files, heldFile{link.Message{Op: link.Hold, ID: id, Name: name}, f})
		}
	}
	return files
}

// listenTo does what the worker has asked for. The caller holds s.mu.
func (s *supervisor) listenTo(conn *link.Conn) error {
	for {
		m, file, ok, err := conn.TryRecv()
		if err != nil || !ok {
			return err
		}
		s.obey(m, file)
	}
}

func (s *supervisor) obey(m link.Message, file *os.File) {
	switch m.Op {
	case link.Hold:
		if file != nil {
			s.hold(m.ID, m.Name, file)
		}
	case link.Release:
		s.release(m.ID, m.Name)
	case link.Watch:
		if status, ok := s.recent.find(m.Process.Pid); ok {
			s.note(m, status)
			return
		}
		s.watched[m.Process.Pid] = m
	case link.Forget:
		if s.watched[m.Process.Pid].Process == m.Process {
			delete(s.watched, m.Process.Pid)
		}
	case link.Serving:
		s.worker.served = true
		s.tellReady()
	case link.Quit:
		s.quit = true
	}
}

func (s *supervisor) hold(id, name string, file *os.File) {
	if s.held[id] == nil {
		s.held[id] = map[string]*os.File{}
	}
	if old := s.held[id][name]; old != nil {
		old.Close()
	}
	s.held[id][name] = file
}

// release closes one file of id, or all if name is empty.
func (s *supervisor) release(id, name string) {
	for n, f := range s.held[id] {
		if name == "" || n == name {
			f.Close()
			delete(s.held[id], n)
		}
	}
	if len(s.held[id]) == 0 {
		delete(s.held, id)
	}
}

// reap notes and reaps every child that has exited. When the worker is among
// them, ended is set, and pause says how long to wait before starting the next.
func (s *supervisor) reap() (pause time.Duration, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// What a worker said before its end counts before the end of its children:
	// they are this process' children only because the worker has ended.
	if s.worker.link != nil {
		s.listenTo(s.worker.link)
	}
	for {
		pid, status, err := host.PeekExit(host.AnyChild())
		if err != nil || pid == 0 {
			return pause, ended
		}
		switch m, ok := s.watched[pid]; {
		case pid == s.worker.pid:
			ended = true
			pause = s.workerEnded(status)
		case ok:
			s.note(m, status)
			delete(s.watched, pid)
		default:
			s.recent.add(pid, status)
		}
		fault.Point("supervisor.noted")
		if err := host.Reap(host.Child(pid)); err != nil {
			s.log.Error("reap", "pid", pid, "err", err)
			return pause, ended
		}
		fault.Point("supervisor.reaped")
	}
}

// note writes down how a watched process exited, before it is reaped: until then
// the kernel has the status.
func (s *supervisor) note(m link.Message, status unix.WaitStatus) {
	if m.Path == "" {
		return
	}
	if err := link.WriteStatus(m.Path, m.Process, status); err != nil {
		s.log.Error("exit status is lost", "container", m.ID, "err", err)
	}
}

func (s *supervisor) workerEnded(status unix.WaitStatus) (pause time.Duration) {
	if !s.quit {
		s.log.Warn("worker ended", "worker", s.worker.pid, "status", fmt.Sprintf("%#x", uint32(status)))
	}
	for pid, m := range s.watched {
		if m.Kill {
			if h, err := m.Process.Open(); err == nil {
				h.Signal(unix.SIGKILL)
				h.Close()
			}
			delete(s.watched, pid)
		}
	}
	w := s.worker
	s.worker = worker{}
	return s.backoff.next(time.Since(w.started), w.served)
}

func (s *supervisor) quits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.quit
}

// tellReady tells whoever started this keeper that it serves.
func (s *supervisor) tellReady() {
	if s.cfg.Ready < 0 {
		return
	}
	unix.Write(s.cfg.Ready, []byte(link.ReadyAnswer))
	unix.Close(s.cfg.Ready)
	s.cfg.Ready = -1
}

// tearDown removes what makes this keeper one. The directory goes while it is
// locked: whoever starts a keeper there next makes a new one.
func (s *supervisor) tearDown() error {
	var errs []error
	fault.Point("supervisor.leaves")
	errs = append(errs, os.RemoveAll(s.cfg.Dir))
	fault.Point("supervisor.directory-removed")
	if s.cfg.Cgroup != "" {
		errs = append(errs, leaveCgroup(s.cfg.Cgroup))
	}
	return errors.Join(errs...)
}

// backoff spaces the starts of workers that fail.
type backoff struct{ pause time.Duration }

const (
	pauseMin = 10 * time.Millisecond
	pauseMax = 5 * time.Second
)

// next returns the pause after a worker that lived for age.
func (b *backoff) next(age time.Duration, served bool) time.Duration {
	switch {
	case served && age > time.Second:
		b.pause = 0
	case served:
		b.pause = pauseMin
	default:
		b.pause = min(max(2*b.pause, pauseMin), pauseMax)
	}
	return b.pause
}

// recent remembers how the last children exited that nobody had asked for yet:
// an OCI runtime's command may have left a process here that was quicker than
// the worker's question.
type recent struct {
	exits [256]struct {
		pid    int
		status unix.WaitStatus
		at     time.Time
	}
	n int
}

// recentAge bounds how old an exit may be, lest the pid is another process'.
const recentAge = 5 * time.Second

func (r *recent) add(pid int, status unix.WaitStatus) {
	e := &r.exits[r.n%len(r.exits)]
	e.pid, e.status, e.at = pid, status, time.Now()
	r.n++
}

func (r *recent) find(pid int) (unix.WaitStatus, bool) {
	for i := range r.exits {
		if e := &r.exits[i]; e.pid == pid && time.Since(e.at) < recentAge {
			e.pid = 0
			return e.status, true
		}
	}
	return 0, false
}
