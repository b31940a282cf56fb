package link

// The files in a keeper's directory that the daemon knows.
const (
	SocketName     = "sock"       // ttrpc
	ExecSocketName = "exec.sock"  // one connection for each exec
	LogName        = "log"        // what the keeper has to say, as text
	ContainersDir  = "containers" // one directory each, by id
)

// The files of a container that it has until its end, with a terminal without
// StderrName.
const (
	RequestName = "request" // record: what was asked for
	ProcessName = "process" // record: its first process
	StdoutName  = "stdout"  // FIFO
	StderrName  = "stderr"  // FIFO
)

// ReadyAnswer is what a keeper writes, to the descriptor it was started with,
// when it serves.
const ReadyAnswer = "ready"

// BeginWord is what a keeper waits for on its standard input.
const BeginWord = "begin\n"

// ReadyFD is that descriptor.
const ReadyFD = 3

// HeldFD is the descriptor of a list of further descriptors that a keeper is
// started with, from FirstHeldFD on; see SaveHeld.
const (
	HeldListFD  = 4
	FirstHeldFD = 5
)

// SupervisorArgs are the arguments that make the keeper's binary a supervisor
// that tells when it serves.
func SupervisorArgs(dir, cgroup string) []string {
	return []string{"supervisor", "--dir", dir, "--cgroup", cgroup, "--ready", "3", "--held", "4"}
}
