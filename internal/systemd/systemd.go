// Package systemd makes and ends transient units: a delegated one for each pod,
// below which cgroups are made without asking again, and a scope for each
// keeper. It knows neither pods nor keepers.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	systemdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// timeout bounds one call with its job, but for the end of a unit whose
// processes do not die.
const timeout = stopTime + 10*time.Second

// stopTime is what the processes of a delegated unit have between SIGTERM and
// SIGKILL when systemd ends it.
const stopTime = 30 * time.Second

// Running tells whether systemd is this machine's first process.
func Running() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// Units makes and ends units. The zero value is ready; it connects when it is
// first asked for something, and again when systemd was away. Its methods may be
// called from several goroutines.
type Units struct {
	mu   sync.Mutex
	conn *systemdbus.Conn
}

// Close ends the connection. Units go on. Of the nil Units there is none.
func (u *Units) Close() {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}

// connection is one to systemd itself, which works without a bus, or else one
// over the system bus.
func (u *Units) connection() (*systemdbus.Conn, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn != nil && u.conn.Connected() {
		return u.conn, nil
	}
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
	// The context of a connection is that of its whole life.
	conn, err := systemdbus.NewSystemdConnectionContext(context.Background())
	if err != nil {
		var busErr error
		if conn, busErr = systemdbus.NewSystemConnectionContext(context.Background()); busErr != nil {
			return nil, fmt.Errorf("connect to systemd: %w: %w", errdefs.ErrUnavailable, errors.Join(err, busErr))
		}
	}
	u.conn = conn
	return conn, nil
}

// Delegated describes a unit that holds a cgroup for somebody else to work in.
type Delegated struct {
	Name        string // NAME.service
	Slice       string // NAME.slice, made if it is not there
	Description string
	Run         []string // a program that does nothing until SIGTERM: systemd removes a cgroup that is empty
}

// Delegate makes the unit and returns when its cgroup is there for the caller to
// work in. It stays until it is stopped, or its slice is; then all that is in it
// gets SIGTERM, and what is left a while later SIGKILL. A unit of that name that is
// there already is the answer.
//
// It is a service and no scope, because a scope ends with its last process, and
// takes the counters of its cgroup along.
func (u *Units) Delegate(ctx context.Context, d Delegated) error {
	type command struct {
		Path   string
		Args   []string
		Ignore bool // how it ends
	}
	err := u.start(ctx, d.Name, []systemdbus.Property{
		systemdbus.PropDescription(d.Description),
		systemdbus.PropSlice(d.Slice),
		systemdbus.PropType("exec"),
		systemdbus.PropRemainAfterExit(true),
		property("ExecStart", []command{{d.Run[0], d.Run, false}}),
		property("Delegate", true),
		// Limits are the client's business, on the slice and on the containers.
		property("TasksMax", uint64(math.MaxUint64)),
		property("OOMPolicy", "continue"),
		property("OOMScoreAdjust", int32(-998)), // of the program alone
		property("TimeoutStopUSec", uint64(stopTime.Microseconds())),
		property("CollectMode", "inactive-or-failed"),
	})
	if isError(err, "org.freedesktop.systemd1.UnitExists") {
		return nil
	}
	return err
}

// Scope makes a scope of that name in system.slice and moves the process pid
// there. The scope ends when its last process has.
func (u *Units) Scope(ctx context.Context, name, description string, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := u.start(ctx, name, []systemdbus.Property{
			systemdbus.PropDescription(description),
			systemdbus.PropSlice("system.slice"),
			systemdbus.PropPids(uint32(pid)),
			property("Delegate", true),
			property("TasksMax", uint64(math.MaxUint64)),
			property("CollectMode", "inactive-or-failed"),
		})
		// That of a process that has just died is about to go.
		if !isError(err, "org.freedesktop.systemd1.UnitExists") {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (u *Units) start(ctx context.Context, name string, properties []systemdbus.Property) error {
	return u.do(ctx, "start "+name, func(ctx context.Context, c *systemdbus.Conn, result chan<- string) error {
		_, err := c.StartTransientUnitContext(ctx, name, "fail", properties, result)
		return err
	})
}

// Stop ends a unit with all its processes. One that is not there is no error.
func (u *Units) Stop(ctx context.Context, name string) error {
	err := u.do(ctx, "stop "+name, func(ctx context.Context, c *systemdbus.Conn, result chan<- string) error {
		_, err := c.StopUnitContext(ctx, name, "replace", result)
		return err
	})
	if isError(err, "org.freedesktop.systemd1.NoSuchUnit") {
		return nil
	}
	return err
}

// Named returns the names of the units that are loaded and match a pattern.
func (u *Units) Named(ctx context.Context, pattern string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := u.connection()
	if err != nil {
		return nil, err
	}
	units, err := conn.ListUnitsByPatternsContext(ctx, nil, []string{pattern})
	if err != nil {
		return nil, fmt.Errorf("list units %s: %w", pattern, err)
	}
	var names []string
	for _, unit := range units {
		names = append(names, unit.Name)
	}
	return names, nil
}

// do asks systemd for a job and waits for its end.
func (u *Units) do(ctx context.Context, what string, ask func(context.Context, *systemdbus.Conn, chan<- string) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := u.connection()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	result := make(chan string, 1)
	if err := ask(ctx, conn, result); err != nil {
		return fmt.Errorf("%s: systemd: %w", what, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("%s: systemd's job ended as %q: %w", what, r, errdefs.ErrUnavailable)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: wait for systemd's job: %w", what, context.Cause(ctx))
	}
}

func property(name string, value any) systemdbus.Property {
	return systemdbus.Property{Name: name, Value: dbus.MakeVariant(value)}
}

func isError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}
