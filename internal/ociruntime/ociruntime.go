// Package ociruntime is how a keeper drives an OCI runtime: the one built into
// the keeper (package builtin) or any other through its command line (package
// cli). It owns the contract between them; package conformance, beside it, is
// the suite that every implementation passes.
//
// A runtime makes processes, it does not look after them: whoever calls it
// reaps them, moves their output and remembers how they ended. It knows no word
// of the CRI.
package ociruntime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Container names a container to a runtime. What else there is to know of it is
// in StateDir, so a process that has just started, and has only the two names,
// can do with a container all that its creator could.
type Container struct {
	// ID is unique among all containers of the machine that this runtime
	// drives. Letters, digits, '_', '+', '-' and '.'.
	ID string

	// StateDir is the directory for all that the runtime remembers of this one
	// container. Create makes it; its parent exists. Delete removes it. It is
	// gone after a reboot, or void: no runtime trusts it then.
	StateDir string
}

// Runtime turns a bundle into processes.
//
// # The life of a container
//
//	Create ──► created ──Start──► running ──(its first process exits)──► stopped
//	   │           └──────────────────┴───────────────┬─────────────────────┘
//	   └─(error)──► nothing is left                 Delete ──► nothing is left
//
// A container is created when its first process exists, confined and placed in
// its cgroup, and waits to become the user's. Delete is allowed at any point,
// also after a Create that was cut off by the death of its process.
//
// # Processes belong to the caller
//
// Create and Exec return the pid of a process that somebody else reaps: the
// calling process itself if Child is set, else the nearest child subreaper above
// it, as the runtime's command has left the process to it. Nothing in a Runtime
// reaps it, ever, once it has been returned. The calling process must reap by pid
// or pidfd, never any child whatsoever (wait4(-1)): a Runtime has short-lived
// children of its own and waits for them itself. Who the subreaper is, if it is
// another process, must reap whatever comes, also processes that nobody is told
// of, and keep how they ended: one may be reaped before its pid is returned.
//
// # Errors
//
// ErrInvalidArgument: the bundle, the process or the resources ask for something
// that cannot be. ErrNotFound: no such container. ErrAlreadyExists: Create of a
// container whose StateDir exists. ErrFailedPrecondition: the container is not in
// the state that the call needs, e.g. Exec in a stopped one, or Create in a
// cgroup that has processes. ErrUnavailable: the
// runtime itself is missing. Other errors carry the runtime's own words.
//
// # Concurrency and time
//
// All methods may be called at once, also for the same container, with one
// exception: between the beginning of Create and its end only Delete may be called,
// and only if the process that ran Create is gone. When ctx ends, a call kills
// what it has begun, undoes it, and returns; it stays longer only as long as the
// kernel refuses to let a process die.
type Runtime interface {
	// Create makes the container that the bundle describes, up to the point
	// where only Start is missing. A failed Create leaves no process, no cgroup,
	// no mount and no StateDir.
	Create(ctx context.Context, c Container, r CreateRequest) (Started, error)

	// Start lets the first process execute the user's program. When it returns
	// nil the program has been given control or is about to; a program that
	// cannot be executed shows as the exit of the process with a code of its own.
	// The error is ErrFailedPrecondition if the container was started before
	// or its process is gone.
	Start(ctx context.Context, c Container) error

	// Exec runs a further process in a running container. It joins the
	// container's namespaces and cgroup. The process is executing the
	// program when Exec returns, or has failed to execute it after all checks
	// that can be made beforehand; a program that is not there is an error of
	// Exec itself wherever the runtime can tell.
	Exec(ctx context.Context, c Container, r ExecRequest) (Started, error)

	// Signal sends sig to the container's first process, or, with all, to every
	// process in the container's cgroup and below. SIGKILL to the first process
	// of a container that shares its PID namespace with others counts as all,
	// for there the kernel does not kill the rest by itself.
	// The error is ErrFailedPrecondition if the process has exited; with all,
	// it is no error if nothing is left to signal.
	Signal(ctx context.Context, c Container, sig unix.Signal, all bool) error

	// Update changes the limits that r has set; those it leaves nil stay as
	// they are. Create and Update agree on what a value means.
	Update(ctx context.Context, c Container, r *specs.LinuxResources) error

	// Pids returns the processes of the container's cgroup and below, as the
	// caller's PID namespace knows them, in no order. None is no error.
	Pids(ctx context.Context, c Container) ([]int, error)

	// State tells what has become of the container. ErrNotFound if there is
	// none, or Create never came far enough to make one.
	State(ctx context.Context, c Container) (State, error)

	// Pause stops all processes of a running container where they are; the kernel
	// runs none of them until Resume. Pausing a paused one is no error.
	Pause(ctx context.Context, c Container) error

	// Resume lets a paused container go on. It is no error if it is not paused, or
	// has exited.
	Resume(ctx context.Context, c Container) error

	// Checkpoint writes what all processes of a running container are and have
	// into a directory, from which Create makes them anew. The bundle is that of
	// Create. The container goes on
	// afterwards, or stays paused if it was. The error is ErrFailedPrecondition if
	// there is a process that is not a descendant of the first one, as that of an
	// Exec, and ErrNotImplemented if the runtime cannot checkpoint at all.
	//
	// When ctx ends, CRIU is given a while to let go of the processes, so that
	// they do not suffer, before it is killed.
	Checkpoint(ctx context.Context, c Container, bundle string, to Checkpoint) error

	// OOMKills returns how many processes of the container the kernel has
	// killed for want of memory so far. It works until Delete, also after the
	// last process is gone. The error is ErrNotFound if the cgroup is gone, and
	// ErrNotImplemented if there is no memory controller.
	OOMKills(c Container) (uint64, error)

	// Delete kills what is left of the container and removes its cgroups and its
	// StateDir. It waits for the end of the first process, though not until it is
	// reaped, so processes of Exec must be reaped meanwhile: the kernel does not
	// let the first process of a PID namespace end before. It is idempotent and
	// needs nothing but the name: no container, half a container, a container of
	// an earlier boot are all deleted with success. The bundle and the cgroups
	// above the container's own are the caller's.
	Delete(ctx context.Context, c Container) error
}

// CreateRequest says what to create.
type CreateRequest struct {
	// Bundle is a directory with config.json; relative paths in it are relative
	// to the bundle. It must stay as it is until Delete. linux.cgroupsPath is
	// set, a path below the top of the cgroup hierarchies, and names a
	// cgroup that is the container's alone. linux.uidMappings and gidMappings tell
	// the ids of a user namespace that exists already too. To be checkpointed or
	// restored, the container needs the annotation criu.ConfigAnnotation, with the
	// absolute path of a file that Checkpoint and Create may write.
	Bundle string

	// Stdio of the first process, unused if config.json has process.terminal.
	Stdio Stdio

	// Restore, if not nil, has the processes come from a checkpoint. They are
	// what they were, in all that makes up a process; what surrounds them is as
	// the bundle says: namespaces that it names by path, cgroup, root file system
	// with the same files, mounts on the same places. Nothing of them is executed
	// before Start. The error is ErrPermissionDenied if a process is less confined
	// than the bundle says.
	Restore *Checkpoint
}

// Checkpoint is where a checkpoint is, and what makes or reads it.
type Checkpoint struct {
	// Dir is a directory of the checkpoint's own, which Checkpoint finds empty.
	// In it, criu.ImagesDir has CRIU's images. A restore changes nothing in it.
	Dir string

	// CRIU is the path of the program, whose name must be criu.
	CRIU string
}

// ExecRequest says what to execute.
type ExecRequest struct {
	// Process is complete: nothing is taken over from the container's first
	// process. If Terminal is set it gets a pty, whose ConsoleSize some runtimes set
	// only when the process is executing already.
	Process *specs.Process

	// Stdio of the process, unused with Process.Terminal.
	Stdio Stdio
}

// Stdio is what a process gets as its first three files. Nil means /dev/null.
// The files stay the caller's, who may close them when the call returns. The
// process gets them in blocking mode: O_NONBLOCK is cleared, which holds for
// everybody who shares the open file. If they are pipes or FIFOs, they are owned
// by the process' user afterwards, who in a user namespace is another one outside, so
// that it can open /dev/stdout.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
}

// SetBlocking clears O_NONBLOCK, for implementations of Runtime.
func (s Stdio) SetBlocking() error {
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f == nil {
			continue
		}
		if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
			return fmt.Errorf("stdio %s: %w", f.Name(), err)
		}
	}
	return nil
}

// SetLabel gives those that are FIFOs in a file system the SELinux label of the
// container's files, so that it can open /dev/stdout. An empty label changes
// nothing.
func (s Stdio) SetLabel(label string) error {
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f == nil || label == "" {
			continue
		}
		err := unix.Fsetxattr(int(f.Fd()), "security.selinux", []byte(label), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) { // of a pipe or device, which has none
			return fmt.Errorf("stdio %s: label: %w", f.Name(), err)
		}
	}
	return nil
}

// Streams returns the files as others take them. An interface that holds a nil
// *os.File is not nil; what is absent here is nil.
func (s Stdio) Streams() (stdin io.Reader, stdout, stderr io.Writer) {
	if s.Stdin != nil {
		stdin = s.Stdin
	}
	if s.Stdout != nil {
		stdout = s.Stdout
	}
	if s.Stderr != nil {
		stderr = s.Stderr
	}
	return stdin, stdout, stderr
}

// Started is a process that Create or Exec has made.
type Started struct {
	Pid int

	// Child tells who reaps the process: the calling process if it is set,
	// otherwise the nearest child subreaper above it.
	Child bool

	// Console is the master of the process' terminal, the caller's to close,
	// or nil without a terminal. It is in non-blocking mode if Go's poller
	// takes it.
	Console *os.File
}

// Status is where a container is in its life.
type Status string

// The states of a container, in order.
const (
	Created Status = "created"
	Running Status = "running"
	Stopped Status = "stopped"
)

// State is what a runtime knows of a container.
type State struct {
	Status Status
	Pid    int // of the first process; 0 if it is Stopped
}
