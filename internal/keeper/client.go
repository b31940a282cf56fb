package keeper

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

var errInvalid = errdefs.ErrInvalidArgument

const (
	// A call is made again when the connection broke under it: the keeper's
	// worker was killed and another one is coming up.
	maxAttempts = 200
	retryPause  = 20 * time.Millisecond
	// maxStarts bounds how often a keeper is started that dies before it answers.
	maxStarts = 5
)

// Client talks to one keeper. It connects by itself, and again when the keeper
// was restarted; a keeper that is gone altogether is started again and takes
// its containers over. Its methods may be called from several goroutines.
type Client struct {
	cfg Config
	log *slog.Logger

	dialing chan struct{} // holds a token while somebody connects

	mu     sync.Mutex
	conn   *ttrpc.Client // nil if not connected
	closed bool
	held   map[string]map[string]*os.File // by container and name, see hold
}

// Config says which keeper a Client talks to.
type Config struct {
	Dir    string // STATE/keepers/NAME, the keeper's own; made if absent
	Binary string // of the keeper; "" never starts one
	Cgroup string // the keeper's own cgroup, e.g. /sampan.keeper-NAME; "" leaves it in the caller's
	// Place puts a new keeper's process elsewhere before it does anything; nil
	// leaves it to Cgroup.
	Place  func(ctx context.Context, pid int) error
	Logger *slog.Logger // nil discards
}

// Ensure returns a client of the keeper in cfg.Dir, which it starts if it does
// not run.
func Ensure(ctx context.Context, cfg Config) (*Client, error) {
	c := newClient(cfg)
	if _, err := c.connect(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Dial returns a client of the keeper in dir if one runs there; if not, the
// error is ErrUnavailable. The client never starts a keeper.
func Dial(ctx context.Context, dir string, logger *slog.Logger) (*Client, error) {
	return Ensure(ctx, Config{Dir: dir, Logger: logger})
}

func newClient(cfg Config) *Client {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, log: cfg.Logger, dialing: make(chan struct{}, 1), held: make(map[string]map[string]*os.File)}
}

// Close ends the connection. The keeper and its containers go on.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for id, files := range c.held {
		closeHeld(files)
		delete(c.held, id)
	}
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Info is who a keeper is.
type Info struct {
	Supervisor, Worker host.Process
}

// Info asks the keeper who it is.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var info Info
	err := c.call(ctx, "ask keeper", func(ctx context.Context, k api.KeeperClient) error {
		r, err := k.Info(ctx, &api.InfoRequest{})
		info = Info{fromAPIProcess(r.GetSupervisor()), fromAPIProcess(r.GetWorker())}
		return err
	})
	return info, err
}

// Create makes the container, without running the user's process yet. A
// container with this id that is there already, because the answer of an earlier
// Create got lost, is the answer. A Create that fails leaves nothing.
func (c *Client) Create(ctx context.Context, r CreateRequest) (CreateResponse, error) {
	if err := r.validate(); err != nil {
		return CreateResponse{}, err
	}
	req := &api.CreateRequest{
		Id: r.ID, PodId: r.PodID, Bundle: r.Bundle, LogPath: r.LogPath, ExitRecord: r.ExitRecord,
		Terminal: r.Terminal, Stdin: r.Stdin, StdinOnce: r.StdinOnce,
		Handler: &api.Handler{Kind: string(r.Handler.Kind), Path: r.Handler.Path},
	}
	if r.Restore != nil {
		req.Restore = &api.Checkpoint{Dir: r.Restore.Dir, Criu: r.Restore.CRIU}
	}
	var resp CreateResponse
	err := c.call(ctx, "create container "+r.ID, func(ctx context.Context, k api.KeeperClient) error {
		a, err := k.Create(ctx, req)
		resp.Process = fromAPIProcess(a.GetProcess())
		return err
	})
	if err == nil {
		go c.hold(ctx, r.ID) // ends by itself, soon
	}
	return resp, err
}

// Start runs the user's process. The error is ErrFailedPrecondition if it was
// started before.
func (c *Client) Start(ctx context.Context, id string) (time.Time, error) {
	var startedAt time.Time
	attempt := 0
	err := c.call(ctx, "start container "+id, func(ctx context.Context, k api.KeeperClient) error {
		if attempt++; attempt > 1 {
			// The answer was lost. Perhaps the start was not.
			if s, err := find(ctx, k, id); err != nil || s.State != Created {
				startedAt = s.StartedAt
				return err
			}
		}
		a, err := k.Start(ctx, &api.StartRequest{Id: id})
		startedAt = fromNanos(a.GetStartedAt())
		return err
	})
	return startedAt, err
}

func find(ctx context.Context, k api.KeeperClient, id string) (ContainerState, error) {
	l, err := k.List(ctx, &api.ListRequest{})
	if err != nil {
		return ContainerState{}, err
	}
	for _, c := range l.Containers {
		if c.Id == id {
			return fromAPIContainer(c), nil
		}
	}
	return ContainerState{}, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// Signal sends sig to the container's first process, or to all of its
// processes. The error is ErrFailedPrecondition if it has exited.
func (c *Client) Signal(ctx context.Context, id string, sig unix.Signal, all bool) error {
	return c.call(ctx, "signal container "+id, func(ctx context.Context, k api.KeeperClient) error {
		_, err := k.Signal(ctx, &api.SignalRequest{Id: id, Signal: uint32(sig), All: all})
		return err
	})
}

// Update changes the container's resources.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("update container %s: encode resources: %w", id, err)
	}
	return c.call(ctx, "update container "+id, func(ctx context.Context, k api.KeeperClient) error {
		_, err := k.Update(ctx, &api.UpdateRequest{Id: id, Resources: data})
		return err
	})
}

// ReopenLog makes the container's output go to the file that is at its log path
// now, which is made if absent. On error output goes where it went.
func (c *Client) ReopenLog(ctx context.Context, id string) error {
	return c.call(ctx, "reopen log of container "+id, func(ctx context.Context, k api.KeeperClient) error {
		_, err := k.ReopenLog(ctx, &api.ReopenLogRequest{Id: id})
		return err
	})
}

// Delete kills the container if it lives, and removes what the keeper and the
// runtime hold of it: processes, cgroups, state. The exit record stays. A
// container that is not there is no error.
func (c *Client) Delete(ctx context.Context, id string) error {
	return c.call(ctx, "delete container "+id, func(ctx context.Context, k api.KeeperClient) error {
		_, err := k.Delete(ctx, &api.DeleteRequest{Id: id})
		if err == nil {
			c.letGo(id)
		}
		return err
	})
}

// List returns all of the keeper's containers.
func (c *Client) List(ctx context.Context) ([]ContainerState, error) {
	var states []ContainerState
	err := c.call(ctx, "list containers", func(ctx context.Context, k api.KeeperClient) error {
		l, err := k.List(ctx, &api.ListRequest{})
		states = make([]ContainerState, 0, len(l.GetContainers()))
		for _, s := range l.GetContainers() {
			states = append(states, fromAPIContainer(s))
		}
		return err
	})
	return states, err
}

// Watch calls onEvent for every exit until ctx ends, and returns ctx's error.
// Each time it has connected, also after a keeper's restart, it first calls
// onConnect with the list of all containers: exits that happened while there was
// no connection are seen there. The calls come one after the other.
func (c *Client) Watch(ctx context.Context, onConnect func([]ContainerState), onEvent func(Event)) error {
	pause := retryPause
	for ctx.Err() == nil {
		err := c.watch(ctx, func(s []ContainerState) { pause = retryPause; onConnect(s) }, onEvent)
		if ctx.Err() != nil {
			break
		}
		c.log.Warn("watch keeper", "keeper", filepath.Base(c.cfg.Dir), "err", err)
		sleep(ctx, pause)
		pause = min(2*pause, 5*time.Second)
	}
	return ctx.Err()
}

func (c *Client) watch(ctx context.Context, onConnect func([]ContainerState), onEvent func(Event)) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	stream, err := api.NewKeeperClient(conn).Watch(ctx, &api.WatchRequest{})
	if err != nil {
		return c.lost(conn, err)
	}
	// The first event says that the subscription stands.
	if _, err := stream.Recv(); err != nil {
		return c.lost(conn, err)
	}
	states, err := c.List(ctx)
	if err != nil {
		return err
	}
	onConnect(states)
	go c.holdAll(ctx, states)
	for {
		e, err := stream.Recv()
		if err != nil {
			return c.lost(conn, err)
		}
		c.letGo(e.Id)
		onEvent(Event{ID: e.Id, PodID: e.PodId, Exit: fromAPIExit(e.Exit)})
	}
}

// call makes one call, on a new connection if the one it was made on breaks.
// Whatever it does must bear being done again.
func (c *Client) call(ctx context.Context, op string, do func(context.Context, api.KeeperClient) error) error {
	var err error
	for range maxAttempts {
		var conn *ttrpc.Client
		if conn, err = c.connect(ctx); err != nil {
			break
		}
		err = c.lost(conn, do(ctx, api.NewKeeperClient(conn)))
		if !errors.Is(err, errLost) {
			break
		}
		if sleep(ctx, retryPause) != nil {
			break
		}
	}
	return inWords(op, api.FromWire(err))
}

// inWords says of an error of this side what could not be done. One of the
// keeper's says so itself.
func inWords(op string, err error) error {
	if err == nil || api.IsRemote(err) {
		return err
	}
	return fmt.Errorf("%s: %w", op, err)
}

// errLost says that the connection broke. It is ErrUnavailable to callers.
var errLost = fmt.Errorf("connection to the keeper lost: %w", errdefs.ErrUnavailable)

// lost turns an error that means the end of conn into errLost and forgets conn.
func (c *Client) lost(conn *ttrpc.Client, err error) error {
	if !errors.Is(err, ttrpc.ErrClosed) && !errors.Is(err, ttrpc.ErrServerClosed) && !errors.Is(err, ttrpc.ErrStreamClosed) &&
		!errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == conn {
		c.conn = nil
	}
	conn.Close()
	return errLost
}

// connect returns the connection, made now if there is none.
func (c *Client) connect(ctx context.Context) (*ttrpc.Client, error) {
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if conn, err := c.current(); conn != nil || err != nil {
		return conn, err
	}
	conn, err := c.dial(ctx, link.SocketName)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = ttrpc.NewClient(conn)
	return c.conn, nil
}

// current returns the connection, or nil if there is none.
func (c *Client) current() (*ttrpc.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("keeper %s: client is closed: %w", filepath.Base(c.cfg.Dir), errdefs.ErrUnavailable)
	}
	return c.conn, nil
}

// dial connects to one of the keeper's sockets, and starts the keeper if nobody
// listens there; again if it died on its way up.
func (c *Client) dial(ctx context.Context, name string) (*net.UnixConn, error) {
	for starts := 1; ; starts++ {
		conn, err := dialUnix(ctx, c.cfg.Dir, name)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) || c.cfg.Binary == "" {
			return nil, fmt.Errorf("connect to keeper: %w: %w", err, errdefs.ErrUnavailable)
		}
		startErr := c.start(ctx)
		// Somebody else may have started it.
		if conn, err = dialUnix(ctx, c.cfg.Dir, name); err == nil {
			return conn, nil
		}
		if !errors.Is(startErr, errDied) || starts == maxStarts || sleep(ctx, retryPause) != nil {
			return nil, fmt.Errorf("start keeper: %w: %w", cmp.Or(startErr, err), errdefs.ErrUnavailable)
		}
	}
}

// dialUnix connects to the socket called name in dir, whose path may be longer
// than a socket's address can be.
func dialUnix(ctx context.Context, dir, name string) (*net.UnixConn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
