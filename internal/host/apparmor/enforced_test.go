package apparmor_test

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/apparmor"
)

// confinedEnv makes the test binary try what the profile forbids and allows.
const confinedEnv = "SAMPAN_TEST_CONFINED"

func TestMain(m *testing.M) {
	if os.Getenv(confinedEnv) != "" {
		tryAll()
		return
	}
	os.Exit(m.Run())
}

// attempts are what a confined process may do, or not.
var attempts = []struct {
	name    string
	allowed bool
	try     func() error
}{
	{"set core_pattern", false, func() error { return openForWriting("/proc/sys/kernel/core_pattern") }},
	{"set ip_forward", false, func() error { return openForWriting("/proc/sys/net/ipv4/ip_forward") }},
	{"press sysrq", false, func() error { return openForWriting("/proc/sysrq-trigger") }},
	{"read kcore", false, func() error { return closeAfter(os.Open("/proc/kcore")) }},
	{"read the profiles", false, func() error { return closeAfter(os.Open("/sys/kernel/security/apparmor/profiles")) }},
	{"mount", false, func() error { return unix.Mount("tmpfs", os.TempDir(), "tmpfs", 0, "") }},
	{"read the host's environment", false, func() error { return closeAfter(os.Open("/proc/1/environ")) }},
	{"signal the host", false, func() error { return unix.Kill(os.Getppid(), unix.SIGCONT) }},
	{"set shmmax", true, func() error { return openForWriting("/proc/sys/kernel/shmmax") }},
	{"set its own oom_score_adj", true, func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte("10"), 0) }},
	{"read its own environment", true, func() error { return closeAfter(os.Open("/proc/self/environ")) }},
	{"write a file", true, func() error {
		path := filepath.Join(os.TempDir(), "file")
		return errors.Join(os.WriteFile(path, nil, 0o600), os.Remove(path))
	}},
	{"listen on a unix socket", true, func() error {
		l, err := net.Listen("unix", fmt.Sprintf("@sampan-test-%d", os.Getpid()))
		if err == nil {
			l.Close()
		}
		return err
	}},
	{"execute, and signal its own", true, func() error {
		cmd := exec.Command("/bin/sleep", "60")
		if err := cmd.Start(); err != nil {
			return err
		}
		err := cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		return err
	}},
}

func openForWriting(path string) error { return closeAfter(os.OpenFile(path, os.O_WRONLY, 0)) }

func closeAfter(f *os.File, err error) error {
	if err != nil {
		return err
	}
	return f.Close()
}

// tryAll prints a line for each attempt and waits to be killed.
func tryAll() {
	for _, a := range attempts {
		fmt.Printf("%s: %v\n", a.name, a.try())
	}
	fmt.Println("end")
	time.Sleep(time.Minute)
}

// startConfined starts a program under the default profile. The kernel puts what
// the calling thread executes next there.
func startConfined(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	runtime.LockOSThread() // not unlocked: the thread goes with its mark
	path := "/proc/thread-self/attr/apparmor/exec"
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		path = "/proc/thread-self/attr/exec" // before Linux 5.8
	}
	if err := os.WriteFile(path, []byte("exec "+apparmor.DefaultProfile), 0); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestEnforced loads the default profile into the kernel, puts a process under it,
// and takes it away again.
func TestEnforced(t *testing.T) {
	if !host.HasAppArmor() || os.Geteuid() != 0 {
		t.Skip("probe: no AppArmor in this kernel, or not root")
	}
	a := apparmor.New(apparmor.HostConfig(true, slog.New(slog.NewTextHandler(t.Output(), nil))))
	if _, err := a.Profile(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), confinedEnv+"=yes", "TMPDIR="+t.TempDir())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	startConfined(t, cmd)
	said := make(map[string]string)
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "end"; {
		if name, result, ok := strings.Cut(lines.Text(), ": "); ok {
			said[name] = result
		}
	}
	for _, a := range attempts {
		if got, ok := said[a.name]; !ok || (got == "<nil>") != a.allowed {
			t.Errorf("%s: %q, allowed is %v", a.name, got, a.allowed)
		}
	}
	if err := apparmor.Unload(); err != nil {
		t.Error(err)
	}
	if _, err := a.Profile(t.Context(), apparmor.DefaultProfile); err != nil {
		t.Errorf("unloaded under a process: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Errorf("the host cannot end it: %v", err)
	}
	_ = cmd.Wait() // it was killed
	if err := apparmor.Unload(); err != nil {
		t.Error(err)
	}
	if _, err := a.Profile(t.Context(), apparmor.DefaultProfile); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after unloading: %v", err)
	}
}
