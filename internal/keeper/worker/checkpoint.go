package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/state"
)

const (
	// pauseTimeout bounds how long containers stay paused for a checkpoint.
	pauseTimeout = 10 * time.Minute
	// restoreTimeout bounds the making of a container of a checkpoint.
	restoreTimeout = 10 * time.Minute
	// resumeTimeout bounds the resuming of one container.
	resumeTimeout = 10 * time.Second
)

// checkpoint serves a connection that wants checkpoints.
func (x *execution) checkpoint() error {
	ctx, cancel := context.WithTimeout(context.Background(), pauseTimeout)
	defer cancel()
	// The caller says nothing: the end of its side means that it is done, or gone.
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(io.Discard, x.conn)
		cancel()
	}()
	// One at a time: a container that two have paused would go on too early.
	select {
	case x.w.pausing <- struct{}{}:
		defer func() { <-x.w.pausing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	req := x.req.Checkpoint
	containers, err := x.targets(ctx, req.Targets)
	if err != nil {
		return err
	}
	err = x.dump(ctx, containers, req)
	if err == nil {
		if err = api.SendFrame(x.conn, &api.CheckpointReply{}); err == nil {
			select {
			case <-done:
			case <-ctx.Done():
			}
		}
	}
	if err := errors.Join(err, resume(containers)); err != nil {
		return err
	}
	return api.SendFrame(x.conn, &api.CheckpointReply{})
}

// targets finds the containers, which are all running.
func (x *execution) targets(ctx context.Context, targets []*api.CheckpointTarget) ([]*container, error) {
	var all []*container
	for _, t := range targets {
		c, err := x.w.container(ctx, t.Id)
		if err != nil {
			return nil, fmt.Errorf("checkpoint: %w", err)
		}
		if s := c.state(); s != keeper.Running {
			return nil, fmt.Errorf("checkpoint container %s: it is %s: %w", c.id, s, errdefs.ErrFailedPrecondition)
		}
		all = append(all, c)
	}
	return all, nil
}

// dump pauses all the containers, and then writes each of them down: what one of
// them knows of another is true then. They stay paused, on error too.
func (x *execution) dump(ctx context.Context, containers []*container, req *api.CheckpointRequest) error {
	for _, c := range containers {
		if err := c.pause(ctx); err != nil {
			return err
		}
	}
	for i, c := range containers {
		to := ociruntime.Checkpoint{Dir: req.Targets[i].Dir, CRIU: req.Criu}
		if err := c.rt.Checkpoint(ctx, c.name(), c.req.Bundle, to); err != nil {
			return err
		}
	}
	return nil
}

// pause pauses the container, which is noted first: whoever comes after this
// worker lets it go on.
func (c *container) pause(ctx context.Context) error {
	if err := os.WriteFile(c.path(pausedName), nil, 0o600); err != nil {
		return fmt.Errorf("pause container %s: %w", c.id, err)
	}
	return c.rt.Pause(ctx, c.name())
}

func (c *container) isPaused() bool { return state.Exists(c.path(pausedName)) }

// resume lets containers go on, all of them, whatever goes wrong with one.
func resume(containers []*container) error {
	var errs []error
	for _, c := range containers {
		errs = append(errs, c.resume())
	}
	return errors.Join(errs...)
}

func (c *container) resume() error {
	ctx, cancel := context.WithTimeout(context.Background(), resumeTimeout)
	defer cancel()
	if !c.isPaused() {
		return nil
	}
	if err := c.rt.Resume(ctx, c.name()); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return state.Remove(c.path(pausedName))
}

// resumeCutOff lets a container go on whose checkpoint was cut off.
func (c *container) resumeCutOff() error {
	if c.isPaused() {
		c.log.Warn("a checkpoint was cut off; the container goes on")
	}
	return c.resume()
}

// resumeTick is how often an exec looks whether its container goes on.
const resumeTick = 10 * time.Millisecond

// awaitResume waits until the container is not paused: an exec would fail.
func (c *container) awaitResume(ctx context.Context) error {
	for c.isPaused() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(resumeTick):
		}
	}
	return nil
}
