// Package lab is where the tests of the whole daemon run: a place with mount,
// network, process and IPC namespaces of its own, the test registry on its
// loopback, and a daemon started from the built binary. Nothing that goes wrong
// inside outlives it, and no packet can leave it. It drives the daemon only from
// outside: the command line, the socket, signals and files.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Binary is the environment variable that names the built bin/sampan. Without
// it, the tests that need a lab are skipped.
const Binary = "SAMPAN_TEST_BIN"

// Images is the environment variable that names the directory of the test images.
// Prepare sets it. Who sets it before has brought the images and tools along.
const Images = "SAMPAN_LAB_IMAGES"

// stage tells a test binary what it is: empty for the one that `go test`
// started, "init" for the first process of the lab, "test" for the one that
// runs the tests.
const stage = "SAMPAN_LAB_STAGE"

// Main runs a package's tests in a lab. It is all that TestMain does. Before the
// lab is entered, where there is a network, more is called with the cache.
func Main(m *testing.M, more ...func(ctx context.Context, cache string) error) {
	var code int
	var err error
	switch {
	case OnNode():
		if err = prepareNode(); err == nil {
			code = m.Run()
		}
	case os.Getenv(Binary) == "" || os.Getenv(stage) == "test":
		os.Exit(m.Run())
	case os.Getenv(stage) == "init":
		code, err = asInit()
	default:
		code, err = enter(more)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// Require skips a test that has no lab to run in.
func Require(t testing.TB) {
	t.Helper()
	if os.Getenv(Binary) == "" {
		t.Skipf("%s is not set: `make test` builds the daemon and runs this", Binary)
	}
}

// enter makes the tools and images, which may need the package registries, and
// then starts this test binary again as the first process of a new lab. The lab
// ends with it, however it ends.
func enter(more []func(ctx context.Context, cache string) error) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("must be root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	if os.Getenv(Images) == "" { // or somebody has brought it all
		if err := Prepare(ctx, more...); err != nil {
			return 0, err
		}
	}
	dir, err := os.MkdirTemp("", "lab-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), stage+"=init", "SAMPAN_LAB_DIR="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  unix.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig comes when the forking thread ends
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// Interrupted, the lab ends, but what it has on disk is removed all the same.
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(interrupted, func() { cmd.Process.Kill() }) //nolint:errcheck // it may have ended
	code, err := exitCode(cmd.Wait())
	return code, errors.Join(err, removeCgroups(filepath.Base(dir)))
}

// asInit is process 1 of the lab: it sets the namespaces up, starts the tests
// and reaps whatever falls to it.
func asInit() (int, error) {
	if err := setUp(); err != nil {
		return 0, err
	}
	if err := enterCgroups(filepath.Base(workDir())); err != nil {
		return 0, err
	}
	if err := os.Setenv(stage, "test"); err != nil {
		return 0, err
	}
	attr := &os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}}
	tests, err := os.StartProcess("/proc/self/exe", os.Args, attr)
	if err != nil {
		return 0, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid == tests.Pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case pid == tests.Pid:
			return status.ExitStatus(), nil
		}
	}
}

// setUp makes the new namespaces look like a small host: mounts are shared as
// systemd has them, /proc shows the lab's processes, /run/netns is empty, and
// the only link is loopback.
func setUp() error {
	for _, m := range []struct {
		source, target, fs string
		flags              uintptr
		data               string
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"", "/", "", unix.MS_REC | unix.MS_SHARED, ""},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := unix.Mount(m.source, m.target, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if exit.ExitCode() < 0 {
			return 1, nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// workDir is the lab's directory on disk; the outermost process removes it.
func workDir() string { return os.Getenv("SAMPAN_LAB_DIR") }

// repository is the root of the source tree, found from a package's directory.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module sampan.dev/sampan\n") {
			return dir, nil
		}
	}
	return "", errors.New("not inside the source tree")
}

// closedPort is a loopback address that nobody listens on, for proxy settings
// that must never be used.
func closedPort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
