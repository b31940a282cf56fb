// Package test runs sampan-init, which is no Go.
package test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "init")
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skipf("probe: %v", err)
	}
	out, err := exec.Command(cc, "-Os", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", program, "../init.c").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// start runs the program as PID 1 of a namespace.
func start(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("probe: effective user is not root, who alone may make PID namespaces")
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func TestEndsWhenTold(t *testing.T) {
	program := build(t)
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT} {
		cmd := start(t, program)
		eventually(t, "it waits", func() bool { return waits(cmd.Process.Pid) })
		// As PID 1 it is immune to what it does not handle.
		for _, other := range []syscall.Signal{unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGCHLD} {
			if err := cmd.Process.Signal(other); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("after %v: %v, want exit code 0", sig, err)
		}
	}
}

// waits reports whether a process is the program, blocked in sigwait: nothing
// else makes it sleep. Other signals may be ignored too, as the test's parent
// had them.
func waits(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil || !strings.Contains(string(status), "State:\tS") {
		return false
	}
	_, rest, _ := strings.Cut(string(status), "SigIgn:\t")
	ignored, err := strconv.ParseUint(rest[:min(16, len(rest))], 16, 64)
	return err == nil && ignored&(1<<(unix.SIGCHLD-1)) != 0
}

func TestReapsOrphans(t *testing.T) {
	program := build(t)
	// The shell leaves orphans, some that end later and one that has ended
	// already, and then becomes init.
	script := `for i in 1 2 3 4 5; do sh -c 'sleep 0.1 & sleep 0 & exec sleep 0.05' & done; exec ` + program
	cmd := start(t, "/bin/sh", "-c", script)
	eventually(t, "it waits", func() bool { return waits(cmd.Process.Pid) })
	eventually(t, "it has no children, dead or alive", func() bool { return len(children(t, cmd.Process.Pid)) == 0 })
}

func children(t *testing.T, pid int) []string {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var pids []string
	words := bufio.NewScanner(f)
	words.Split(bufio.ScanWords)
	for words.Scan() {
		pids = append(pids, words.Text())
	}
	return pids
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 300 {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not in 3 s: %s", what)
}

// TestHold: the program leaves for new namespaces, says so, and stays until nobody needs
// it, or says why it cannot.
func TestHold(t *testing.T) {
	program := build(t)
	for name, tc := range map[string]struct {
		flags int
		says  byte
	}{
		"namespaces":    {unix.CLONE_NEWUSER | unix.CLONE_NEWUTS, 0},
		"no such flags": {1 << 31, byte(unix.EINVAL)},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(program, "hold", strconv.Itoa(tc.flags))
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
			said := make([]byte, 2)
			n, err := stdout.Read(said)
			if n != 1 || err != nil {
				t.Fatalf("it wrote %d bytes, %v; want 1", n, err)
			}
			if said[0] == byte(unix.EPERM) || said[0] == byte(unix.ENOSPC) {
				t.Skipf("probe: user namespace: %v", syscall.Errno(said[0]))
			}
			if said[0] != tc.says {
				t.Fatalf("it says %v, want %v", syscall.Errno(said[0]), syscall.Errno(tc.says))
			}
			if tc.says == 0 {
				theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
				ours, _ := os.Readlink("/proc/self/ns/user")
				if err != nil || theirs == ours {
					t.Errorf("it is in user namespace %s, %v; ours is %s", theirs, err, ours)
				}
			}
			stdin.Close()
			if err := cmd.Wait(); (err == nil) != (tc.says == 0) {
				t.Errorf("it ends with %v", err)
			}
		})
	}
}
