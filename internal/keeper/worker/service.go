package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
)

// service answers the daemon's calls. What a call has begun goes on when its
// caller is gone: another call joins it.
type service struct{ w *worker }

func (s *service) Info(context.Context, *api.InfoRequest) (*api.InfoResponse, error) {
	return &api.InfoResponse{Supervisor: toAPIProcess(s.w.supervisor), Worker: toAPIProcess(s.w.self)}, nil
}

// idPattern is what an id may look like: it is the name of a directory.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

func (s *service) Create(ctx context.Context, r *api.CreateRequest) (*api.CreateResponse, error) {
	if !idPattern.MatchString(r.Id) {
		return nil, fmt.Errorf("container id %q: %w", r.Id, errdefs.ErrInvalidArgument)
	}
	w := s.w
	c := w.begin(r.Id, func(c *container) {
		c.create(keeper.CreateRequest{
			ID: r.Id, PodID: r.PodId, Bundle: r.Bundle, LogPath: r.LogPath, ExitRecord: r.ExitRecord,
			Terminal: r.Terminal, Stdin: r.Stdin, StdinOnce: r.StdinOnce,
			Restore: restoreOf(r),
			Handler: keeper.Handler{
				Kind: keeper.HandlerKind(r.GetHandler().GetKind()), Path: r.GetHandler().GetPath(),
			},
		})
	})
	if c == nil {
		<-ctx.Done() // this process is ending; the caller asks the next one
		return nil, context.Cause(ctx)
	}
	if err := c.made(ctx); err != nil {
		return nil, err
	}
	return &api.CreateResponse{Process: toAPIProcess(c.process)}, nil
}

func restoreOf(r *api.CreateRequest) *keeper.Checkpoint {
	if r.Restore == nil {
		return nil
	}
	return &keeper.Checkpoint{Dir: r.Restore.Dir, CRIU: r.Restore.Criu}
}

// begin makes a container unless there is one called id. It is nil if this
// keeper makes none any more.
func (w *worker) begin(id string, create func(*container)) *container {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leaves {
		return nil
	}
	c, ok := w.containers[id]
	if !ok {
		c = w.newContainer(id)
		w.containers[id] = c
		go create(c)
	}
	return c
}

// opTimeout bounds an operation that does not end with its caller.
const opTimeout = 2 * time.Minute

// detached is a context for such an operation.
func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
}

func (s *service) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	c, err := s.w.container(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	op, cancel := detached(ctx)
	defer cancel()
	at, err := c.start(op)
	if err != nil {
		return nil, err
	}
	return &api.StartResponse{StartedAt: nanos(at)}, nil
}

func (s *service) Signal(ctx context.Context, r *api.SignalRequest) (*api.Empty, error) {
	c, err := s.w.container(ctx, r.Id)
	if err != nil && (c == nil || !c.isUnreadable()) {
		return nil, err
	}
	return &api.Empty{}, c.signal(ctx, unix.Signal(r.Signal), r.All)
}

func (s *service) Update(ctx context.Context, r *api.UpdateRequest) (*api.Empty, error) {
	c, err := s.w.container(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.Resources, &resources); err != nil {
		return nil, fmt.Errorf("update container %s: decode resources: %w: %w", c.id, err, errdefs.ErrInvalidArgument)
	}
	op, cancel := detached(ctx)
	defer cancel()
	return &api.Empty{}, c.rt.Update(op, c.name(), &resources)
}

func (s *service) ReopenLog(ctx context.Context, r *api.ReopenLogRequest) (*api.Empty, error) {
	c, err := s.w.container(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	if c.state() == keeper.Exited {
		return nil, fmt.Errorf("reopen log of container %s: it has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return &api.Empty{}, c.output.Reopen()
}

func (s *service) Resize(ctx context.Context, r *api.ResizeRequest) (*api.Empty, error) {
	c, err := s.w.container(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	return &api.Empty{}, c.resize(r.Width, r.Height)
}

func (s *service) Delete(ctx context.Context, r *api.DeleteRequest) (*api.Empty, error) {
	s.w.mu.Lock()
	c, ok := s.w.containers[r.Id]
	s.w.mu.Unlock()
	if !ok {
		return &api.Empty{}, nil
	}
	c.abandon() // nobody waits for what is to be deleted
	select {
	case <-c.ready:
		op, cancel := detached(ctx)
		defer cancel()
		return &api.Empty{}, c.delete(op)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (s *service) List(context.Context, *api.ListRequest) (*api.ListResponse, error) {
	s.w.mu.Lock()
	all := make([]*container, 0, len(s.w.containers))
	for _, c := range s.w.containers {
		all = append(all, c)
	}
	s.w.mu.Unlock()
	var list api.ListResponse
	for _, c := range all {
		if snapshot, ok := c.snapshot(); ok {
			list.Containers = append(list.Containers, snapshot)
		}
	}
	return &list, nil
}

// maxEvents bounds the events that wait for a watcher.
const maxEvents = 256

func (s *service) Watch(ctx context.Context, _ *api.WatchRequest, stream api.Keeper_WatchServer) error {
	events := make(chan *api.Event, maxEvents)
	s.w.mu.Lock()
	s.w.watchers[events] = struct{}{}
	s.w.mu.Unlock()
	defer func() {
		s.w.mu.Lock()
		defer s.w.mu.Unlock()
		delete(s.w.watchers, events)
	}()
	if err := stream.Send(&api.Event{}); err != nil {
		return err
	}
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return fmt.Errorf("watcher is too slow: %w", errdefs.ErrAborted)
			}
			if err := stream.Send(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
