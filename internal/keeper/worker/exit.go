package worker

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/state"
)

const (
	// statusTimeout bounds how long the status of a process is looked for that
	// somebody else reaps.
	statusTimeout = 3 * time.Second
	statusPause   = 200 * time.Microsecond
	// leftoversTimeout bounds the killing of what outlives a first process.
	leftoversTimeout = 5 * time.Second
	// relayTimeout bounds how long an exit waits for a terminal that processes
	// of other containers have open.
	relayTimeout = 200 * time.Millisecond
	// recordPause is the time between attempts to write an exit record.
	recordPause = time.Second
)

// await sees the container through its end. In this order: the status is read but
// not reaped; output is moved; the record is written; then the status goes, the
// files go, and the daemon is told. Cut off anywhere, the next worker begins again.
func (c *container) await() {
	if c.exit == nil {
		exit := c.waitExit()
		fault.Point("worker.exit-seen")
		c.stopLeftovers()
		exit.OOMKills = c.oomKills()
		exit.OOMKilled = exit.OOMKills > 0 && exit.Code != 0
		drained := c.drain()
		fault.Point("worker.drained")
		c.attached.end()
		recorded := c.record(exit)
		c.mu.Lock()
		c.exit = &exit
		c.mu.Unlock()
		close(c.exited)
		c.w.publish(c, exit)
		fault.Point("worker.published")
		if !recorded {
			c.keepRecording(exit)
		}
		if c.pidfd != nil {
			host.Reap(c.pidfd.Child())
		}
		fault.Point("worker.reaped")
		if drained {
			c.letGo()
		}
		return
	}
	close(c.exited)
	if c.drain() {
		c.letGo()
	}
}

// awaitUnreadable sees a container through its end whose records are damaged. There
// is no log that its output could go to, and nowhere to record its exit.
func (c *container) awaitUnreadable() {
	exit := c.waitExit()
	c.stopLeftovers()
	c.mu.Lock()
	c.exit = &exit
	c.mu.Unlock()
	close(c.exited)
	c.w.publish(c, exit)
}

// waitExit waits for the end of the first process.
func (c *container) waitExit() keeper.Exit {
	if c.pidfd != nil {
		if err := c.pidfd.Wait(context.Background()); err != nil {
			c.log.Error("wait", "err", err)
		}
	}
	c.mu.Lock()
	finished := notBefore(time.Now(), c.startedAt)
	c.mu.Unlock()
	timeout := statusTimeout
	if c.pidfd == nil {
		timeout = 0 // what was to be noted of it was noted long ago
	}
	status, ok := exitStatus(c.process, c.pidfd, c.path(statusName), timeout)
	if !ok {
		return keeper.Exit{
			Code: keeper.UnknownExitCode, FinishedAt: finished,
			Message: "the exit status is unknown: the process ended while no keeper ran to see it",
		}
	}
	e := keeper.Exit{FinishedAt: finished, Code: exitCode(status)}
	if status.Signaled() {
		e.Signal = int(status.Signal())
	}
	return e
}

// notBefore is t unless the clock has been set back since the other time: then it is
// that, for nothing ends before it starts. It is what clocks show that counts, not
// what has passed.
func notBefore(t, other time.Time) time.Time {
	if t.Round(0).Before(other.Round(0)) {
		return other
	}
	return t
}

// exitCode is the code of a status in the way of shells.
func exitCode(status unix.WaitStatus) int32 {
	if status.Signaled() {
		return 128 + int32(status.Signal())
	}
	return int32(status.ExitStatus())
}

// exitStatus returns how p, which has exited, did so. A child of this process
// stays unreaped. Of others the supervisor, or in the end the kernel, knows; they
// may take until the timeout to say so. pidfd is nil if the process was gone too
// soon.
func exitStatus(p host.Process, pidfd *host.Pidfd, statusPath string, timeout time.Duration) (unix.WaitStatus, bool) {
	deadline := time.Now().Add(timeout)
	for pause := statusPause; ; pause = min(2*pause, statusTimeout/10) {
		if pidfd != nil {
			if pid, status, err := host.PeekExit(pidfd.Child()); err == nil && pid != 0 {
				return status, true
			}
		}
		if status, ok := p.ZombieStatus(); ok {
			return status, true
		}
		if status, ok := link.ReadStatus(statusPath, p); ok {
			return status, true
		}
		if pidfd != nil {
			if status, ok := pidfd.ExitStatus(); ok {
				return status, true
			}
		}
		if time.Now().After(deadline) {
			return 0, false
		}
		time.Sleep(pause)
	}
}

// stopLeftovers kills what outlives the first process, which is possible where it
// was not the first of its PID namespace.
func (c *container) stopLeftovers() {
	ctx, cancel := context.WithTimeout(context.Background(), leftoversTimeout)
	defer cancel()
	pids, err := c.rt.Pids(ctx, c.name())
	if err == nil && len(pids) > 0 {
		err = c.rt.Signal(ctx, c.name(), unix.SIGKILL, true)
	}
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		c.log.Warn("kill what outlives the first process", "err", err)
	}
}

func (c *container) oomKills() uint64 {
	n, err := c.rt.OOMKills(c.name())
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
		c.log.Warn("read count of OOM kills", "err", err)
	}
	return n
}

// drain moves the container's last output and tells whether that was all.
func (c *container) drain() bool {
	if c.relayed != nil {
		select {
		case <-c.relayed:
		case <-time.After(relayTimeout):
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	err := c.output.Drain(ctx)
	if err != nil {
		c.log.Warn("the exit does not wait for the log", "err", err)
	}
	return err == nil
}

// record writes the exit record. If it cannot, the exit is known all the same,
// and would be found out again by another worker.
func (c *container) record(e keeper.Exit) bool {
	err := state.Write(c.req.ExitRecord, keeper.ExitKind, e, state.Volatile)
	if err != nil {
		c.log.Error("write exit record", "err", err)
	}
	return err == nil
}

// keepRecording tries until the record is written or the container deleted.
func (c *container) keepRecording(e keeper.Exit) {
	for !c.isDeleted() {
		time.Sleep(recordPause)
		if c.record(e) {
			return
		}
	}
}

// snapshot is the container as List shows it; ok is false if it is none yet.
func (c *container) snapshot() (s *api.Container, ok bool) {
	select {
	case <-c.ready:
	default:
		return nil, false
	}
	st := c.state()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil && !c.unreadable || c.deleted {
		return nil, false
	}
	if c.unreadable && c.exit == nil {
		st = keeper.Unreadable
	}
	s = &api.Container{
		Id: c.id, PodId: c.req.PodID, Process: toAPIProcess(c.process), State: string(st),
		CreatedAt: nanos(c.createdAt), StartedAt: nanos(c.startedAt),
	}
	if c.exit != nil {
		s.Exit = toAPIExit(*c.exit)
	}
	return s, true
}

func toAPIExit(e keeper.Exit) *api.Exit {
	return &api.Exit{
		Code: e.Code, Signal: int32(e.Signal), OomKilled: e.OOMKilled, OomKills: e.OOMKills,
		FinishedAt: nanos(e.FinishedAt), Message: e.Message,
	}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
