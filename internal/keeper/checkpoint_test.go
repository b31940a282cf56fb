package keeper_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/keeper"
)

// counters is two containers that write all the time, and where checkpoints of
// them go.
type counters struct {
	*lab
	dir      string
	request  keeper.CheckpointRequest
	requests []keeper.CreateRequest
}

func newCounters(t *testing.T) *counters {
	l := newLab(t)
	c := &counters{lab: l, dir: t.TempDir()}
	for _, id := range []string{"c0", "c1"} {
		dir := filepath.Join(c.dir, id)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		c.requests = append(c.requests, l.sh(id, "while :; do echo line; sleep 0.01; done"))
		c.request.Targets = append(c.request.Targets, keeper.CheckpointTarget{ID: id, Dir: dir})
	}
	return c
}

// tell makes the fake runtime go on, or fail.
func (c *counters) tell(word string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, word), nil, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// moves reports whether all the containers write, or, if one does, that only.
func (c *counters) moves() (all, any bool) {
	c.t.Helper()
	var before []int
	for _, r := range c.requests {
		before = append(before, len(c.output(r.LogPath)))
	}
	time.Sleep(150 * time.Millisecond)
	all = true
	for i, r := range c.requests {
		moved := len(c.output(r.LogPath)) > before[i]
		all, any = all && moved, any || moved
	}
	return all, any
}

// awaitPaused waits until none of the containers writes: what they wrote before
// may still be on its way into the logs.
func (c *counters) awaitPaused() {
	c.t.Helper()
	waitFor(c.t, func() bool { _, any := c.moves(); return !any })
}

func (c *counters) wantMoving() {
	c.t.Helper()
	waitFor(c.t, func() bool { all, _ := c.moves(); return all })
}

func TestCheckpoint(t *testing.T) {
	c := newCounters(t)
	c.tell("go")
	called := false
	err := c.client.Checkpoint(c.ctx(), c.request, func(context.Context) error {
		called = true
		for _, target := range c.request.Targets {
			if image, err := os.ReadFile(filepath.Join(target.Dir, "image")); err != nil || string(image) != target.ID {
				t.Errorf("image of %s: %q, error %v", target.ID, image, err)
			}
		}
		c.awaitPaused()
		return nil
	})
	if err != nil || !called {
		t.Fatalf("called %v, error %v", called, err)
	}
	c.wantMoving()
	for _, r := range c.requests {
		if _, err := os.Stat(filepath.Join(c.lab.dir, "containers", r.ID, "paused")); err == nil {
			t.Errorf("container %s is noted as paused", r.ID)
		}
	}
}

func TestCheckpointFails(t *testing.T) {
	c := newCounters(t)
	none := func(context.Context) error { t.Error("called though there is no checkpoint"); return nil }

	c.tell("fail")
	if err := c.client.Checkpoint(c.ctx(), c.request, none); err == nil || !strings.Contains(err.Error(), "as it was told") {
		t.Errorf("error %v", err)
	}
	c.wantMoving()

	os.Remove(filepath.Join(c.dir, "fail"))
	late, cancel := context.WithTimeout(c.ctx(), 100*time.Millisecond)
	defer cancel()
	if err := c.client.Checkpoint(late, c.request, none); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	c.wantMoving()

	c.tell("go")
	failure := errors.New("no")
	if err := c.client.Checkpoint(c.ctx(), c.request, func(context.Context) error { return failure }); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
	c.wantMoving()

	absent := keeper.CheckpointRequest{Targets: []keeper.CheckpointTarget{{ID: "absent", Dir: t.TempDir()}}}
	if err := c.client.Checkpoint(c.ctx(), absent, none); !errdefs.IsNotFound(err) {
		t.Errorf("error %v", err)
	}
	created := c.lab.request("created", "true")
	if _, err := c.client.Create(c.ctx(), created); err != nil {
		t.Fatal(err)
	}
	absent.Targets[0].ID = "created"
	if err := c.client.Checkpoint(c.ctx(), absent, none); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("error %v", err)
	}
}

// TestCheckpointKilled kills the keeper while containers are paused.
func TestCheckpointKilled(t *testing.T) {
	for _, name := range []string{"worker", "supervisor", "both"} {
		t.Run(name, func(t *testing.T) {
			c := newCounters(t)
			result := make(chan error)
			go func() {
				result <- c.client.Checkpoint(c.ctx(), c.request, func(context.Context) error { return nil })
			}()
			c.awaitPaused()
			info := c.info()
			if name == "both" {
				c.stop(info.Worker)
			}
			if name != "worker" {
				c.kill(info.Supervisor)
			}
			if name != "supervisor" {
				c.kill(info.Worker)
			}
			if err := <-result; !errdefs.IsUnavailable(err) {
				t.Errorf("error %v, want unavailable", err)
			}
			c.info() // starts a keeper if there is none
			waitFor(t, func() bool { all, _ := c.moves(); return all })
		})
	}
}

// TestPausedContainer does with a paused container what may be done.
func TestPausedContainer(t *testing.T) {
	c := newCounters(t)
	result, paused := make(chan error), make(chan struct{})
	c.tell("go")
	ctx, cancel := context.WithCancel(c.ctx())
	go func() {
		result <- c.client.Checkpoint(ctx, c.request, func(ctx context.Context) error {
			close(paused)
			<-ctx.Done()
			return nil
		})
	}()
	<-paused
	exec := make(chan error)
	go func() {
		_, err := c.client.Exec(c.ctx(), keeper.ExecRequest{ID: "c0", Args: []string{"true"}})
		exec <- err
	}()
	if err := c.client.Signal(c.ctx(), "c1", unix.SIGKILL, true); err != nil {
		t.Error(err)
	}
	if e := c.waitExit(c.requests[1]); e.Signal != int(unix.SIGKILL) {
		t.Errorf("exit %+v", e)
	}
	select {
	case err := <-exec:
		t.Errorf("exec in a paused container: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if err := <-exec; err != nil {
		t.Error(fmt.Errorf("exec after the checkpoint: %w", err))
	}
}
