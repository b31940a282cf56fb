package launch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func newLauncher(t *testing.T) *Launcher {
	l, err := New()
	if errdefs.IsNotImplemented(err) {
		t.Skipf("probe: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, fd := range []int{l.program, l.null, l.pids, l.mounts, l.empty} {
			unix.Close(fd)
		}
	})
	return l
}

// carryOut runs a plan in new namespaces to its end and returns its error.
func carryOut(t *testing.T, l *Launcher, p *Plan) error {
	t.Helper()
	process, err := l.Start(p, Options{Flags: unix.CLONE_NEWUTS})
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	for {
		event, _, err := process.Next()
		if err == nil && event == Ready {
			err = process.Continue()
		}
		if err != nil {
			process.Reap()
			return err
		}
	}
}

// TestStepErrors: an error names the step, and what failed in it.
func TestStepErrors(t *testing.T) {
	l := newLauncher(t)
	absent := t.TempDir() + "/absent"
	root := func(p *Plan, path string) {
		p.Procfs()
		p.Root(l, path, unix.MS_SLAVE|unix.MS_REC, unix.MS_PRIVATE)
	}
	for name, tc := range map[string]struct {
		plan func(*Plan)
		says string
	}{
		"nothing to do":     {func(*Plan) {}, "start: "},
		"no end":            {func(p *Plan) { p.Hostname("a") }, "the plan has no end"},
		"no such root":      {func(p *Plan) { root(p, absent) }, absent},
		"no such namespace": {func(p *Plan) { p.Setns("that", 0, unix.CLONE_NEWNET) }, "that: setns"},
		"no such option": {func(p *Plan) {
			root(p, t.TempDir())
			p.Mount("tmpfs", "tmpfs", "a/b", 0, 0, "size=lots")
		}, "mount tmpfs at /a/b: "},
		"no such source": {func(p *Plan) {
			root(p, t.TempDir())
			p.Bind(absent, "a", true, Attributes{}, 0)
		}, "mount " + absent + " at /a: open: no such file or directory"},
		"no such profile": {func(p *Plan) {
			p.Procfs()
			p.AppArmor("no-such-profile")
		}, "process.apparmorProfile: no-such-profile: "},
		"no procfs for a profile": {func(p *Plan) { p.AppArmor("a") }, "process.apparmorProfile: a: open attr/exec: "},
		"no such program": {func(p *Plan) {
			p.Environment(0, []string{"PATH=/no/such:/neither"})
			p.Arguments([]string{"nothing"})
		}, `exec: "nothing": executable file not found in $PATH`},
		"a directory for a program": {func(p *Plan) {
			p.Environment(0, nil)
			p.Arguments([]string{"/proc"})
		}, `exec: "/proc": stat: is a directory`},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("probe: not root, who alone may make namespaces")
			}
			var p Plan
			tc.plan(&p)
			err := carryOut(t, l, &p)
			var step *StepError
			if !errors.As(err, &step) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want a step's with %q", err, tc.says)
			}
		})
	}
}

// TestForsaken: a process whose keeper is gone ends, and does not become anybody's.
func TestForsaken(t *testing.T) {
	l := newLauncher(t)
	var p Plan
	p.Environment(0, nil)
	p.Arguments([]string{"/bin/sh", "-c", "exit 7"})
	p.Sync(Ready)
	p.Execute()
	process, err := l.Start(&p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if event, _, err := process.Next(); err != nil || event != Ready {
		t.Fatalf("event %v, error %v", event, err)
	}
	process.Close()
	if status, err := process.Reap(); err != nil || status.ExitStatus() != 255 {
		t.Errorf("status %#x, error %v; want 255", status, err)
	}
}

// TestExecuted: the end of the connection tells that the program runs.
func TestExecuted(t *testing.T) {
	l := newLauncher(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var p Plan
	p.Environment(0, []string{"A=b", "HOME=/h"})
	p.Arguments([]string{"/bin/sh", "-c", `echo "$A $HOME $0 $1"`, "zero", "one"})
	p.Execute()
	process, err := l.Start(&p, Options{Stdout: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	if _, _, err := process.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want EOF", err)
	}
	if out, err := io.ReadAll(r); err != nil || string(out) != "b /h zero one\n" {
		t.Errorf("output %q, error %v", out, err)
	}
	if status, err := process.Reap(); err != nil || status.ExitStatus() != 0 {
		t.Errorf("status %#x, error %v", status, err)
	}
}

// ready starts a process that has done what p says, and waits until the test ends.
func ready(t *testing.T, l *Launcher, p *Plan) *Process {
	t.Helper()
	p.Sync(Ready)
	process, err := l.Start(p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Close()
		process.Reap()
	})
	if event, _, err := process.Next(); err != nil || event != Ready {
		t.Fatalf("event %v, error %v", event, err)
	}
	return process
}

// TestRootAlone: of the host's mounts there is none in the container's namespace, not
// even for a moment, however many there are.
func TestRootAlone(t *testing.T) {
	l := newLauncher(t)
	var p Plan
	p.Procfs()
	p.Root(l, t.TempDir(), unix.MS_SLAVE|unix.MS_REC, unix.MS_PRIVATE)
	process := ready(t, l, &p)
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", process.Pid))
	if err != nil || strings.Count(string(mounts), "\n") != 2 {
		t.Errorf("mounts, error %v, want an empty root and the container's:\n%s", err, mounts)
	}
}

// TestSourcesAreTheHosts: a source is looked up among the host's mounts, also behind
// others, and the namespace is the container's again afterwards.
func TestSourcesAreTheHosts(t *testing.T) {
	l := newLauncher(t)
	root, source := t.TempDir(), t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var p Plan
	p.Procfs()
	p.Root(l, root, unix.MS_SLAVE|unix.MS_REC, unix.MS_PRIVATE)
	p.Mount("tmpfs", "tmpfs", "m", 0, 0)
	p.Bind(source+"/a", "m/1", false, Attributes{}, 0)
	p.Bind(source+"/b", "m/2", false, Attributes{}, 0)
	p.Pivot(0)
	process := ready(t, l, &p)
	for name, want := range map[string]string{"1": "a", "2": "b"} {
		if got, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/m/%s", process.Pid, name)); err != nil || string(got) != want {
			t.Errorf("m/%s has %q, error %v; want %q", name, got, err, want)
		}
	}
	if entries, err := os.ReadDir(root + "/m"); err != nil || len(entries) > 0 {
		t.Errorf("the host sees %v in the root file system, error %v; want nothing", entries, err)
	}
}
