package lab

import (
	"bytes"
	"cmp"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/images"
)

// Lab is one daemon with its registry. New starts it; when the test ends, what
// the test left is removed and what the daemon left is an error of the test.
type Lab struct {
	Dir      string // this lab's files on disk
	Root     string // the daemon's ROOT
	State    string // the daemon's STATE, on a tmpfs as /run is
	Socket   string
	Registry string // URL of the registry that stands in for every other
	Hosts    string // the directory of the hosts.toml files

	Binary string // the sampan that runs, or is started next

	Foreign *regexp.Regexp // what the test's own programs leave, see snapshot

	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient

	config  string
	level   string
	log     *os.File
	env     []string
	daemon  *exec.Cmd
	unitPid int        // on a node, where there is no daemon of ours
	exited  chan error // the daemon's end
	fresh   snapshot   // before the daemon first ran
	ready   snapshot   // when it first answered
}

// Options of a lab.
type Options struct {
	Config string // TOML to add to the daemon's configuration; tables only
	Keys   string // top-level TOML keys to add
	Root   string // instead of a directory of the lab

	LogLevel string // of the daemon; "" is debug
}

// Subnet is where the pods' addresses come from.
const Subnet = "10.88.0.0/16"

// New starts a registry and a daemon for one test.
func New(t testing.TB, o Options) *Lab {
	t.Helper()
	Require(t)
	dir, err := os.MkdirTemp(workDir(), "")
	must(t, err)
	l := &Lab{Binary: os.Getenv(Binary), Dir: dir, Root: o.Root, level: cmp.Or(o.LogLevel, "debug"), State: "/run/sampan", Hosts: filepath.Join(dir, "certs.d")}
	l.Socket = filepath.Join(l.State, "sampan.sock")
	if l.Root == "" {
		l.Root = filepath.Join(dir, "root")
	}
	for _, d := range []string{l.Root, l.Hosts, l.Tmp(), l.Logs()} {
		must(t, os.MkdirAll(d, 0o755))
	}
	l.serveImages(t)
	l.Configure(t, o)
	l.log, err = os.Create(filepath.Join(dir, "daemon.log"))
	must(t, err)
	t.Cleanup(func() { l.log.Close() })
	proxy, err := closedPort()
	must(t, err)
	l.env = append(os.Environ(), "HTTP_PROXY=http://"+proxy, "HTTPS_PROXY=http://"+proxy, "NO_PROXY="+Subnet)

	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	l.Runtime, l.Images = runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)

	l.fresh, err = l.snapshot()
	must(t, err)
	t.Cleanup(func() { l.tearDown(t) })
	l.Start(t)
	l.ready, err = l.snapshot()
	must(t, err)
	return l
}

// Tmp is a directory for temporary files of programs that the test runs.
func (l *Lab) Tmp() string { return filepath.Join(l.Dir, "tmp") }

// Logs is a directory for container logs.
func (l *Lab) Logs() string { return filepath.Join(l.Dir, "logs") }

func (l *Lab) serveImages(t testing.TB) {
	t.Helper()
	handler, err := images.Handler(os.Getenv(Images))
	must(t, err)
	l.Registry = Serve(t, handler)
	must(t, images.WriteHosts(l.Hosts, l.Registry, images.Hosts...))
}

// Serve answers HTTP on loopback until the test ends, and returns its URL.
func Serve(t testing.TB, h http.Handler) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := images.Serve(listener, h)
	t.Cleanup(func() { srv.Close() })
	return "http://" + listener.Addr().String()
}

// Configure writes the configuration that the daemon reads when it is started next.
func (l *Lab) Configure(t testing.TB, o Options) {
	t.Helper()
	text := fmt.Sprintf("root = %q\nstate = %q\nlisten = \"unix://%s\"\n%s\n\n[registry]\nconfig_dir = %q\n", l.Root, l.State, l.Socket, o.Keys, l.Hosts)
	if !strings.Contains(o.Config, "[network]") {
		text += fmt.Sprintf("\n[network]\nmode = \"builtin\"\nsubnet = %q\n", Subnet)
	}
	l.config = filepath.Join(l.Dir, "config.toml")
	must(t, os.WriteFile(l.config, []byte(text+"\n"+o.Config+"\n"+os.Getenv(nodeConfig)), 0o644))
}

// Start runs the daemon and waits until it answers.
func (l *Lab) Start(t testing.TB) {
	t.Helper()
	if OnNode() {
		must(t, l.startUnit())
		return
	}
	must(t, l.launch())
	l.AwaitAnswer(t)
}

// launch runs the daemon.
func (l *Lab) launch() error {
	l.daemon = exec.Command(l.Binary, "serve", "--config", l.config, "--log-level", l.level, "--log-format", "text")
	l.daemon.Stdout, l.daemon.Stderr, l.daemon.Env, l.daemon.Dir = l.log, l.log, l.env, l.Dir
	if err := l.daemon.Start(); err != nil {
		return err
	}
	l.exited = make(chan error, 1)
	go func(cmd *exec.Cmd, exited chan<- error) { exited <- cmd.Wait() }(l.daemon, l.exited)
	return nil
}

// AwaitAnswer waits until the daemon answers.
func (l *Lab) AwaitAnswer(t testing.TB) {
	t.Helper()
	if err := l.awaitAnswer(2 * Wait); err != nil {
		t.Fatalf("daemon: %v\n%s", err, l.logTail())
	}
}

// StartFails runs the daemon, which must end by itself, and returns its last words.
func (l *Lab) StartFails(t testing.TB) string {
	t.Helper()
	must(t, l.launch())
	err := l.awaitAnswer(2 * Wait)
	select {
	case <-l.exited:
		l.daemon = nil
	default:
		t.Fatalf("the daemon is there, want it to end: %v", err)
	}
	return l.logTail()
}

// KeepRunning starts the daemon again whenever it ends, as systemd would, until
// the returned function is called. That leaves it running. Meanwhile nothing else
// may start or stop the daemon; whatever kills it does so by its pid.
func (l *Lab) KeepRunning(t testing.TB) (stop func()) {
	t.Helper()
	enough, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-enough:
				select {
				case <-l.exited: // just now
					if err := l.launch(); err != nil {
						t.Errorf("daemon: %v", err)
					}
				default:
				}
				return
			case <-l.exited:
				if err := l.launch(); err != nil {
					t.Errorf("daemon: %v", err)
					return
				}
			}
		}
	}()
	return func() { close(enough); <-done }
}

func (l *Lab) awaitAnswer(limit time.Duration) error {
	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	var last error
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		select {
		case err := <-l.exited:
			l.exited <- err
			return fmt.Errorf("ended before it answered: %v", err)
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, last = client.Version(ctx, &runtimeapi.VersionRequest{})
		cancel()
		if last == nil {
			return nil
		}
		conn.ResetConnectBackoff()
	}
	return fmt.Errorf("no answer in %v: %w", limit, last)
}

// Config is the daemon's configuration file.
func (l *Lab) Config() string { return l.config }

// Replace ends the daemon that answers, also if a program of the test has put it
// in the place of the lab's own, and starts the lab's again.
func (l *Lab) Replace(t testing.TB) {
	t.Helper()
	daemons, err := l.Daemons()
	must(t, err)
	for _, pid := range daemons {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	for _, pid := range daemons {
		must(t, awaitEnd(pid, 20*time.Second))
	}
	<-l.exited
	l.Start(t)
}

// awaitEnd waits until nothing of a process is left: a daemon that was killed holds
// its lock until its last thread has gone.
func awaitEnd(pid int, limit time.Duration) error {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err := unix.Kill(pid, 0); errors.Is(err, unix.ESRCH) {
			return nil
		}
	}
	return fmt.Errorf("process %d is still there %v after SIGKILL", pid, limit)
}

// Kill sends the daemon SIGKILL and waits for its end.
func (l *Lab) Kill(t testing.TB) {
	t.Helper()
	if OnNode() {
		must(t, l.killUnit())
		return
	}
	must(t, l.daemon.Process.Kill())
	<-l.exited
	l.daemon = nil
}

// Stop ends the daemon with SIGTERM. It must exit with code 0, soon.
func (l *Lab) Stop(t testing.TB) {
	t.Helper()
	if OnNode() {
		must(t, l.stopUnit())
		return
	}
	must(t, l.daemon.Process.Signal(unix.SIGTERM))
	select {
	case err := <-l.exited:
		if err != nil {
			t.Errorf("daemon, after SIGTERM: %v\n%s", err, l.logTail())
		}
	case <-time.After(20 * time.Second):
		t.Errorf("daemon: still there 20 s after SIGTERM\n%s", l.logTail())
		_ = l.daemon.Process.Kill() // it may have ended meanwhile
		<-l.exited
	}
	l.daemon = nil
}

// Pid is the daemon's process id.
func (l *Lab) Pid() int {
	if l.daemon != nil {
		return l.daemon.Process.Pid
	}
	return l.unitPid
}

// runs tells whether the daemon was started and not stopped since.
func (l *Lab) runs() bool { return l.daemon != nil || l.unitPid != 0 }

// Daemons are the pids of the lab's daemons, of which there is one or none.
func (l *Lab) Daemons() ([]int, error) {
	processes, err := processes()
	var pids []int
	for pid, args := range processes {
		if len(args) > 3 && args[1] == "serve" && args[3] == l.config {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// Keepers are the pids of the keeper's processes in a role, "supervisor" or
// "worker".
func (l *Lab) Keepers(t testing.TB, role string) []int {
	t.Helper()
	pids, err := l.KeeperPids(role)
	must(t, err)
	return pids
}

// KeeperPids is Keepers for who is no test.
func (l *Lab) KeeperPids(role string) ([]int, error) {
	processes, err := processes()
	var pids []int
	for pid, args := range processes {
		if len(args) > 1 && strings.HasPrefix(args[0], l.Root+"/bin/keeper-") && args[1] == role {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// logTail is the end of the daemon's log.
func (l *Lab) logTail() string {
	const lines = 60
	if OnNode() {
		return journalTail(lines)
	}
	text, err := os.ReadFile(l.log.Name())
	if err != nil {
		return err.Error()
	}
	rows := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	if len(rows) > lines {
		rows = rows[len(rows)-lines:]
	}
	return "daemon's log ends:\n" + string(bytes.Join(rows, []byte("\n")))
}

// Raced reports whether the daemon was built with the race detector, which takes
// several times the memory.
func (l *Lab) Raced() bool {
	info, err := buildinfo.ReadFile(l.Binary)
	return err == nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// Races fails if a daemon or keeper that was built with the race detector has
// reported a race.
func (l *Lab) Races() error {
	logs, err := filepath.Glob(filepath.Join(l.State, "keepers", "*", "log"))
	for _, path := range append(logs, filepath.Join(l.Dir, "daemon.log")) {
		text, rerr := os.ReadFile(path)
		if at := bytes.Index(text, []byte("WARNING: DATA RACE")); rerr == nil && at >= 0 {
			return fmt.Errorf("%s: %s", path, text[at:min(len(text), at+4000)])
		}
	}
	return err
}

// Fsck runs `sampan fsck` and returns what it printed and its exit code.
func (l *Lab) Fsck(args ...string) (output string, code int) {
	cmd := exec.Command(l.Binary, append([]string{"fsck", "--config", l.config}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		return err.Error(), -1
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// Crictl runs crictl against the daemon and returns what it printed; a failure
// of it is an error.
func (l *Lab) Crictl(args ...string) (stdout, stderr string, err error) {
	cmd, err := l.CrictlCommand(args...)
	if err != nil {
		return "", "", err
	}
	var out, errors bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errors
	if err := cmd.Run(); err != nil {
		return out.String(), errors.String(), fmt.Errorf("crictl %s: %w: %s%s", strings.Join(args, " "), err, out.String(), errors.String())
	}
	return out.String(), errors.String(), nil
}

// StartCrictl starts crictl with its output in the file, for what does not end.
func (l *Lab) StartCrictl(output *os.File, args ...string) (*exec.Cmd, error) {
	cmd, err := l.CrictlCommand(args...)
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = output, output
	return cmd, cmd.Start()
}

// CrictlCommand is a crictl against the daemon, to be started by the caller.
func (l *Lab) CrictlCommand(args ...string) (*exec.Cmd, error) {
	path, err := Tool("crictl")
	if err != nil {
		return nil, err
	}
	config := filepath.Join(l.Dir, "crictl.yaml")
	text := fmt.Sprintf("runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 60\n", l.Socket, l.Socket)
	// Others may be reading it.
	if now, err := os.ReadFile(config); err != nil || string(now) != text {
		if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command(path, append([]string{"--config", config}, args...)...)
	cmd.Env = append(l.env, "TMPDIR="+l.Tmp(), "HOME="+l.Dir)
	return cmd, nil
}

// Env is the environment for other programs that the test runs.
func (l *Lab) Env() []string { return append(l.env, "TMPDIR="+l.Tmp(), "HOME="+l.Dir) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var errLeft = errors.New("left behind")
