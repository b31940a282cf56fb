// Package keeper is the daemon's side of the keeper: the process that is the
// parent of containers, so that the daemon can come and go. It starts keepers,
// talks to them, and reads the exit records they write.
//
// What runs inside a keeper is in the packages below this one; the daemon does
// not import them. A keeper knows containers by id and nothing of images,
// networks or the CRI.
package keeper

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
	"sampan.dev/sampan/internal/state"
)

// Handler says how a container is run.
type Handler struct {
	Kind HandlerKind `json:"kind"`
	Path string      `json:"path,omitempty"` // of the OCI runtime's command; CLI only
}

// HandlerKind is Builtin or CLI.
type HandlerKind string

// The kinds of handlers.
const (
	Builtin HandlerKind = "builtin" // libcontainer, inside the keeper
	CLI     HandlerKind = "cli"     // an OCI runtime's command line
)

// CreateRequest asks for a container. The bundle has config.json and the root
// file system; it stays the caller's and must stay until Delete.
type CreateRequest struct {
	ID         string // of the container; unique among all containers of the keeper
	PodID      string
	Bundle     string
	Handler    Handler
	LogPath    string // "": output is discarded. Its directory must exist
	ExitRecord string // where to write the exit record. Its directory must exist
	Terminal   bool   // must agree with process.terminal in config.json
	Stdin      bool   // keep stdin open for attaching; otherwise it is /dev/null
	StdinOnce  bool   // close stdin when the first attached client leaves

	// Restore, if not nil, has the container's processes come from a checkpoint.
	// They execute nothing before Start.
	Restore *Checkpoint `json:",omitempty"`
}

// Checkpoint is where a container's checkpoint is, and what makes or reads it.
type Checkpoint struct {
	Dir  string // see ociruntime.Checkpoint
	CRIU string // path of the program criu
}

// CreateResponse is the created container's first process, which waits for
// Start before it becomes the user's.
type CreateResponse struct {
	Process host.Process
}

// State is where a container is in its life.
type State string

// The states of a container, in order.
const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
	// Unreadable is one whose records are damaged. It goes on, with nobody who takes
	// its output, and can be signalled and deleted.
	Unreadable State = "unreadable"
)

// ContainerState is what a keeper knows of a container.
type ContainerState struct {
	ID        string
	PodID     string
	Process   host.Process
	State     State
	CreatedAt time.Time
	StartedAt time.Time // zero if it never started
	Exit      *Exit     // set when State is Exited
}

// Exit tells how a container ended. It is the content of the exit record.
type Exit struct {
	Code       int32     `json:"code"`             // 128+signal if a signal ended it; 255 if unknown
	Signal     int       `json:"signal,omitempty"` // 0 if it exited by itself
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	OOMKills   uint64    `json:"oomKills,omitempty"` // processes that the kernel killed for want of memory, in all its life
	FinishedAt time.Time `json:"finishedAt"`
	Message    string    `json:"message,omitempty"` // what there is to say, e.g. why the code is unknown
}

// Holds reports whether the keeper in dir has a container called id, or had when
// it died. It asks nobody, so it can be told also when no keeper starts.
func Holds(dir, id string) bool {
	_, err := os.Lstat(filepath.Join(dir, link.ContainersDir, id))
	return err == nil
}

// UnknownExitCode is the code of a container nobody saw the end of.
const UnknownExitCode = 255

// ExitKind is the kind of exit records.
var ExitKind = state.Kind{Name: "container-exit", Version: 1}

// ReadExit reads the exit record at path. The error wraps fs.ErrNotExist when
// the container has not exited.
func ReadExit(path string) (Exit, error) {
	var e Exit
	err := state.Read(path, ExitKind, &e)
	return e, err
}

// Event tells that a container has exited.
type Event struct {
	ID    string
	PodID string
	Exit  Exit
}

// ExecRequest asks for a further process in a running container. Its
// environment, user, capabilities and the rest are those of the container's
// first process, as config.json has them.
type ExecRequest struct {
	ID   string // of the container
	Args []string

	// The process' stdio; nil is /dev/null. The files stay the caller's. Unused
	// with Terminal.
	Stdin, Stdout, Stderr *os.File

	// Terminal gives the process a pty. OnConsole is called with its master,
	// which is then the callee's to use, resize and close, before Exec waits
	// for the end of the process.
	Terminal      bool
	Width, Height uint16
	OnConsole     func(master *os.File)

	Timeout time.Duration // 0: none. Then the process and its descendants are killed
}

// ExecResult is how an exec ended.
type ExecResult struct {
	ExitCode int32 // 128+signal if a signal ended it
	TimedOut bool
}

// CheckpointRequest asks for checkpoints of some containers at one moment.
type CheckpointRequest struct {
	Targets []CheckpointTarget
	CRIU    string // path of the program criu
}

// CheckpointTarget is a container and the directory that its checkpoint goes to,
// which must be empty.
type CheckpointTarget struct{ ID, Dir string }

func fromAPIProcess(p *api.Process) host.Process {
	return host.Process{Pid: int(p.GetPid()), Start: p.GetStart(), Boot: p.GetBoot()}
}

func fromAPIContainer(c *api.Container) ContainerState {
	s := ContainerState{
		ID:        c.Id,
		PodID:     c.PodId,
		Process:   fromAPIProcess(c.Process),
		State:     State(c.State),
		CreatedAt: fromNanos(c.CreatedAt),
		StartedAt: fromNanos(c.StartedAt),
	}
	if c.Exit != nil {
		e := fromAPIExit(c.Exit)
		s.Exit = &e
	}
	return s
}

func fromAPIExit(e *api.Exit) Exit {
	return Exit{
		Code:       e.GetCode(),
		Signal:     int(e.GetSignal()),
		OOMKilled:  e.GetOomKilled(),
		OOMKills:   e.GetOomKills(),
		FinishedAt: fromNanos(e.GetFinishedAt()),
		Message:    e.GetMessage(),
	}
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

func (r CreateRequest) validate() error {
	for _, f := range []struct{ name, value string }{
		{"id", r.ID}, {"pod id", r.PodID}, {"bundle", r.Bundle}, {"exit record", r.ExitRecord}, {"handler kind", string(r.Handler.Kind)},
	} {
		if f.value == "" {
			return fmt.Errorf("create container %s: no %s: %w", r.ID, f.name, errInvalid)
		}
	}
	return nil
}
