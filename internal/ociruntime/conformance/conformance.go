// Package conformance is the test suite that every ociruntime.Runtime passes.
// It checks the contract and, after each test, that nothing is left behind.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
)

// Factory returns a new Runtime, which knows of containers only what is in
// their state directories.
type Factory func(t testing.TB) ociruntime.Runtime

// Run runs the suite.
func Run(t *testing.T, factory Factory) {
	lab := NewLab(t)
	s := suite{lab: lab, factory: factory}
	// The first container may open what stays open: caches, the poller.
	first := lab.Run(t, factory(t), []string{"sleep", "60"})
	if err := first.rt.Update(t.Context(), first.Container, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr[int64](9)}}); err != nil {
		t.Fatal(err)
	}
	first.Delete()
	first.Wait()
	before := lab.takeStock(t)
	t.Run("suite", func(t *testing.T) {
		for _, test := range []struct {
			name string
			run  func(*testing.T)
		}{
			{"Lifecycle", s.lifecycle},
			{"CreateRefuses", s.createRefuses},
			{"CreateTwice", s.createTwice},
			{"CreateUndoneAtEndOfContext", s.createUndone},
			{"StartOnce", s.startOnce},
			{"ExitCodes", s.exitCodes},
			{"Stdio", s.stdio},
			{"UserNamespace", s.userNamespace},
			{"Terminal", s.terminal},
			{"Exec", s.exec},
			{"ExecRefuses", s.execRefuses},
			{"ExecTerminal", s.execTerminal},
			{"Signal", s.signal},
			{"SharedPIDs", s.sharedPIDs},
			{"Update", s.update},
			{"OOMKills", s.oomKills},
			{"DeleteFromAnyState", s.deleteAny},
			{"DeleteForkBomb", s.deleteForkBomb},
			{"NewProcess", s.newProcess},
			{"Concurrent", s.concurrent},
			{"Hooks", s.hooks},
			{"Seccomp", s.seccomp},
			{"Pause", s.pause},
			{"Checkpoint", s.checkpoint},
			{"CheckpointRefuses", s.checkpointRefuses},
			{"RestoreRefuses", s.restoreRefuses},
			{"RestoreUndoneAtEndOfContext", s.restoreUndone},
		} {
			t.Run(test.name, test.run)
		}
	})
	lab.compare(t, before)
}

type suite struct {
	lab     *Lab
	factory Factory
}

func (s *suite) lifecycle(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Create(t, rt, []string{"sh", "-c", "echo started; sleep 60"})
	s.wantState(t, c, ociruntime.Created)
	if pids, err := rt.Pids(t.Context(), c.Container); err != nil || !slices.Equal(pids, []int{c.Started.Pid}) {
		t.Errorf("pids %v, error %v; want %d alone", pids, err, c.Started.Pid)
	}
	if out := c.Output(); out != "" {
		t.Errorf("output before Start: %q", out)
	}
	c.Start()
	c.Expect("started\n")
	s.wantState(t, c, ociruntime.Running)

	if err := rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if got := c.Wait(); got != 128+9 {
		t.Errorf("exit code %d, want 137", got)
	}
	s.wantState(t, c, ociruntime.Stopped)
	for range 2 {
		c.Delete()
		c.AssertGone()
	}
	_, err := rt.State(t.Context(), c.Container)
	want(t, "State after Delete", err, errdefs.ErrNotFound)
	_, err = rt.Pids(t.Context(), c.Container)
	want(t, "Pids after Delete", err, errdefs.ErrNotFound)
	_, err = rt.OOMKills(c.Container)
	want(t, "OOMKills after Delete", err, errdefs.ErrNotFound)
	want(t, "Start after Delete", rt.Start(t.Context(), c.Container), errdefs.ErrNotFound)
	want(t, "Signal after Delete", rt.Signal(t.Context(), c.Container, unix.SIGTERM, false), errdefs.ErrNotFound)
	want(t, "Update after Delete", rt.Update(t.Context(), c.Container, &specs.LinuxResources{}), errdefs.ErrNotFound)
	_, err = rt.Exec(t.Context(), c.Container, ociruntime.ExecRequest{Process: c.Process("true")})
	want(t, "Exec after Delete", err, errdefs.ErrNotFound)
}

func (s *suite) wantState(t *testing.T, c *Container, status ociruntime.Status) {
	t.Helper()
	got, err := c.rt.State(t.Context(), c.Container)
	if err != nil || got.Status != status {
		t.Errorf("state %+v, error %v; want %s", got, err, status)
	}
	if wantPid := map[bool]int{true: 0, false: c.Started.Pid}[status == ociruntime.Stopped]; got.Pid != wantPid {
		t.Errorf("pid %d in state %s, want %d", got.Pid, status, wantPid)
	}
}

func want(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: error %v, want %v", what, err, class)
	}
}

func (s *suite) createRefuses(t *testing.T) {
	absent := filepath.Join(s.lab.dir, "no", "such")
	for _, tc := range []struct {
		name  string
		edit  func(*specs.Spec)
		class error  // if not nil
		says  string // if not empty
	}{
		{"no program", func(spec *specs.Spec) { spec.Process.Args = []string{"/bin/no-such-program"} }, nil, "no-such-program"},
		{"no mount source", func(spec *specs.Spec) {
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/work", Type: "bind", Source: absent, Options: []string{"bind"}})
		}, nil, absent},
		{"no rootfs", func(spec *specs.Spec) { spec.Root.Path = absent }, nil, "no"},
		{"no args", func(spec *specs.Spec) { spec.Process.Args = nil }, errdefs.ErrInvalidArgument, "args"},
		{"relative cwd", func(spec *specs.Spec) { spec.Process.Cwd = "tmp" }, errdefs.ErrInvalidArgument, "cwd"},
		{"no process", func(spec *specs.Spec) { spec.Process = nil }, errdefs.ErrInvalidArgument, "process"},
		{"no cgroup of its own", func(spec *specs.Spec) { spec.Linux.CgroupsPath = "" }, errdefs.ErrInvalidArgument, "cgroupsPath"},
		{"no such namespace", func(spec *specs.Spec) {
			spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: absent})
		}, nil, absent},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := s.lab.Prepare(t, s.factory(t), []string{"true"}, tc.edit)
			err := c.Create()
			if err == nil || tc.class != nil && !errors.Is(err, tc.class) || !strings.Contains(fmt.Sprint(err), tc.says) {
				t.Errorf("error %v, want class %v and a word of %q", err, tc.class, tc.says)
			}
			c.AssertGone()
			if _, err := os.Lstat(absent); err == nil {
				t.Errorf("the runtime has made %s", absent)
			}
		})
	}
	t.Run("no bundle", func(t *testing.T) {
		c := s.lab.Prepare(t, s.factory(t), []string{"true"})
		c.Bundle += "-not"
		want(t, "Create", c.Create(), errdefs.ErrInvalidArgument)
	})
}

func (s *suite) createTwice(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, []string{"sleep", "60"})
	_, err := rt.Create(t.Context(), c.Container, ociruntime.CreateRequest{Bundle: c.Bundle})
	want(t, "second Create", err, errdefs.ErrAlreadyExists)
	s.wantState(t, c, ociruntime.Running) // the first is unharmed

	other := s.lab.Prepare(t, rt, []string{"true"}, func(spec *specs.Spec) {
		spec.Linux.CgroupsPath = filepath.Join(s.lab.parent, c.ID)
	})
	want(t, "Create in the cgroup of another", other.Create(), errdefs.ErrFailedPrecondition)
	s.wantState(t, c, ociruntime.Running)
}

func (s *suite) createUndone(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Prepare(t, rt, []string{"true"}, func(spec *specs.Spec) {
		// A create that hangs: the hook runs in the container's cgroup.
		spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 60"}}}}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_, err := rt.Create(ctx, c.Container, ociruntime.CreateRequest{Bundle: c.Bundle})
	want(t, "Create", err, context.DeadlineExceeded)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	c.AssertGone()
}

func (s *suite) startOnce(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Create(t, rt, []string{"sleep", "60"})
	c.Start()
	want(t, "second Start", rt.Start(t.Context(), c.Container), errdefs.ErrFailedPrecondition)
	s.wantState(t, c, ociruntime.Running)

	dead := s.lab.Create(t, rt, []string{"sleep", "60"})
	if err := rt.Signal(t.Context(), dead.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	dead.Wait()
	want(t, "Start of a dead container", rt.Start(t.Context(), dead.Container), errdefs.ErrFailedPrecondition)
}

func (s *suite) exitCodes(t *testing.T) {
	for script, code := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -TERM $$; sleep 60": 0, "sh -c 'kill -SEGV $$'; exit $?": 128 + 11} {
		c := s.lab.Create(t, s.factory(t), []string{"sh", "-c", "trap 'exit 0' TERM; " + script})
		c.Start()
		if got := c.Wait(); got != code {
			t.Errorf("%q: exit code %d, want %d", script, got, code)
		}
	}
}

func (s *suite) stdio(t *testing.T) {
	c := s.lab.Run(t, s.factory(t), []string{"sh", "-c", `
		id -u; pwd; echo $GREETING; hostname
		echo reopened > /dev/stdout
		cat && echo stdin is empty
		ls /proc/self/fd | wc -l`},
		func(spec *specs.Spec) {
			spec.Process.User = specs.User{UID: 1000, GID: 1001}
			spec.Process.Cwd = "/work"
			spec.Process.Env = append(spec.Process.Env, "GREETING=hello world")
		})
	if got := c.Wait(); got != 0 {
		t.Errorf("exit code %d", got)
	}
	// ls has open: 0, 1, 2 and the directory.
	const wanted = "1000\n/work\nhello world\nlab\nreopened\nstdin is empty\n4\n"
	if got := c.Output(); got != wanted {
		t.Errorf("output %q, want %q", got, wanted)
	}
}

// userNamespace runs processes in a user namespace that is there already. They are who
// they are said to be, and whose their stdio is.
func (s *suite) userNamespace(t *testing.T) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 200000, Size: 2000}}
	holder := exec.Command("sleep", "1000")
	holder.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true, Pdeathsig: syscall.SIGKILL,
	}
	if err := holder.Start(); err != nil {
		t.Skipf("probe: user namespace: %v", err)
	}
	defer func() { holder.Process.Kill(); holder.Wait() }()
	user := specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7}}
	mapping := []specs.LinuxIDMapping{{HostID: 200000, Size: 2000}}
	c := s.lab.Run(t, s.factory(t), []string{"sh", "-c", `
		cat /proc/self/uid_map | tr -s ' '; id -u; id -G
		echo reopened > /dev/stdout
		stat -L -c '%u %g' /dev/stdout
		sleep 60`},
		func(spec *specs.Spec) {
			spec.Process.User = user
			spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{
				Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", holder.Process.Pid),
			})
			spec.Linux.UIDMappings, spec.Linux.GIDMappings = mapping, mapping
		})
	c.Expect(" 0 200000 2000\n1000\n1001 7\nreopened\n1000 1001\n")
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", c.Started.Pid), &st); err != nil || st.Uid != 201000 {
		t.Errorf("outside it is user %d, %v; want 201000", st.Uid, err)
	}

	p := c.Process("sh", "-c", "id -u; echo reopened > /dev/stdout; cat /dev/stdin")
	p.User = user
	out, code, err := c.Exec(p, "from stdin\n")
	if want := "1000\nreopened\nfrom stdin\n"; out != want || code != 0 || err != nil {
		t.Errorf("exec: output %q, exit code %d, error %v; want %q", out, code, err, want)
	}
	p.User = specs.User{UID: 2000}
	_, _, err = c.Exec(p, "")
	want(t, "Exec as a user who is not there", err, errdefs.ErrInvalidArgument)
}

func (s *suite) terminal(t *testing.T) {
	c := s.lab.Create(t, s.factory(t), []string{"sh", "-c", "test -t 0 && test -t 2 && stty size; tty; read line; echo got $line"}, func(spec *specs.Spec) {
		spec.Process.Terminal = true
		spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 99}
	})
	if c.Started.Console == nil {
		t.Fatal("no console")
	}
	c.Start()
	if _, err := c.Started.Console.WriteString("a line\n"); err != nil {
		t.Fatal(err)
	}
	out := readConsole(t, c.Started.Console)
	for _, w := range []string{"/dev/", "got a line"} {
		if !strings.Contains(out, w) {
			t.Errorf("output %q lacks %q", out, w)
		}
	}
	if got := c.Wait(); got != 0 {
		t.Errorf("exit code %d", got)
	}
}

// readConsole reads a terminal's master until the last process has closed it.
func readConsole(t *testing.T, console *os.File) string {
	t.Helper()
	if err := console.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Errorf("the console is not in the poller's hands: %v", err)
	}
	var out []byte
	chunk := make([]byte, 4096)
	for {
		n, err := console.Read(chunk)
		out = append(out, chunk[:n]...)
		if errors.Is(err, unix.EIO) {
			return string(out)
		}
		if err != nil {
			t.Errorf("output %q, then %v", out, err)
			return string(out)
		}
	}
}

func (s *suite) exec(t *testing.T) {
	c := s.lab.Run(t, s.factory(t), []string{"sleep", "60"})
	p := c.Process("sh", "-c", "id -u; id -g; id -G; pwd; echo $A; hostname; cat; exit 3")
	p.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 7}}
	p.Cwd = "/work"
	p.Env = append(p.Env, "A=b")
	out, code, err := c.Exec(p, "from stdin\n")
	if err != nil {
		t.Fatal(err)
	}
	const wanted = "1000\n1001\n1001 5 7\n/work\nb\nlab\nfrom stdin\n"
	if out != wanted || code != 3 {
		t.Errorf("output %q, exit code %d; want %q, 3", out, code, wanted)
	}

	// It is in the container's namespaces and cgroup, and dies with it.
	started, err := c.rt.Exec(t.Context(), c.Container, ociruntime.ExecRequest{Process: c.Process("sleep", "60")})
	if err != nil {
		t.Fatal(err)
	}
	pids, err := c.rt.Pids(t.Context(), c.Container)
	if err != nil || !slices.Contains(pids, started.Pid) {
		t.Errorf("pids %v, error %v; want %d among them", pids, err, started.Pid)
	}
	if err := c.rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if got := exitCode(reap(t, started)); got != 128+9 {
		t.Errorf("exit code %d after the container was killed, want 137", got)
	}
}

func (s *suite) execRefuses(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Create(t, rt, []string{"sleep", "60"})
	_, _, err := c.Exec(c.Process("true"), "")
	want(t, "Exec before Start", err, errdefs.ErrFailedPrecondition)
	c.Start()
	_, _, err = c.Exec(c.Process("no-such-program"), "")
	if err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("Exec of what is not there: error %v", err)
	}
	_, _, err = c.Exec(&specs.Process{Cwd: "/"}, "")
	want(t, "Exec of nothing", err, errdefs.ErrInvalidArgument)
	p := c.Process("true")
	p.Cwd = "/no/such/directory"
	if _, _, err = c.Exec(p, ""); err == nil {
		t.Error("Exec in a directory that is not there: no error")
	}
	if err := rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	_, _, err = c.Exec(c.Process("true"), "")
	want(t, "Exec after the end", err, errdefs.ErrFailedPrecondition)
}

func (s *suite) execTerminal(t *testing.T) {
	c := s.lab.Run(t, s.factory(t), []string{"sleep", "60"})
	// crun sets the size when the process runs already; of none stty says nothing, and exits with 0.
	p := c.Process("sh", "-c", `i=0; until size=$(stty size 2>/dev/null) && [ -n "$size" ] || [ $i = 100 ]; do i=$((i+1)); sleep 0.1; done; echo $size; read line; echo got $line; exit 4`)
	p.Terminal = true
	p.ConsoleSize = &specs.Box{Height: 33, Width: 99}
	started, err := c.rt.Exec(t.Context(), c.Container, ociruntime.ExecRequest{Process: p})
	if err != nil {
		t.Fatal(err)
	}
	defer started.Console.Close()
	if _, err := started.Console.WriteString("a line\n"); err != nil {
		t.Fatal(err)
	}
	out := readConsole(t, started.Console)
	for _, w := range []string{"33 99", "got a line"} {
		if !strings.Contains(out, w) {
			t.Errorf("output %q lacks %q", out, w)
		}
	}
	if got := exitCode(reap(t, started)); got != 4 {
		t.Errorf("exit code %d, want 4", got)
	}
}

func (s *suite) signal(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, []string{"sh", "-c", `
		trap 'echo first' USR1
		sh -c 'trap "echo second" USR1; echo ready; while :; do sleep 0.05; done' &
		trap 'exit 9' TERM
		while :; do sleep 0.05; done`})
	c.Expect("ready\n")
	if err := rt.Signal(t.Context(), c.Container, unix.SIGUSR1, false); err != nil {
		t.Fatal(err)
	}
	c.Expect("first\n")
	if strings.Contains(c.Output(), "second") {
		t.Error("a signal for the first process went to another")
	}
	if err := rt.Signal(t.Context(), c.Container, unix.SIGUSR1, true); err != nil {
		t.Fatal(err)
	}
	c.Expect("second\n")
	if err := rt.Signal(t.Context(), c.Container, unix.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if got := c.Wait(); got != 9 {
		t.Errorf("exit code %d, want 9", got)
	}
	want(t, "Signal after the end", rt.Signal(t.Context(), c.Container, unix.SIGTERM, false), errdefs.ErrFailedPrecondition)
	if err := rt.Signal(t.Context(), c.Container, unix.SIGKILL, true); err != nil {
		t.Errorf("Signal to all after the end: %v", err)
	}
}

// sharedPIDs: in a PID namespace that outlives the container, the kernel does
// not kill the rest when the first process dies.
func (s *suite) sharedPIDs(t *testing.T) {
	rt := s.factory(t)
	pod := s.lab.Run(t, rt, []string{"sleep", "60"})
	share := func(spec *specs.Spec) {
		spec.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", pod.Started.Pid)
	}
	script := []string{"sh", "-c", "(trap '' TERM HUP; sleep 60 & echo ready; wait) & wait"}

	killed := s.lab.Run(t, rt, script, share)
	killed.Expect("ready\n")
	if err := rt.Signal(t.Context(), killed.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	killed.Wait()
	eventually(t, "SIGKILL kills all", func() bool {
		pids, err := rt.Pids(t.Context(), killed.Container)
		return err == nil && len(pids) == 0
	})

	deleted := s.lab.Run(t, rt, script, share)
	deleted.Expect("ready\n")
	deleted.Delete()
	deleted.AssertGone()
	s.wantState(t, pod, ociruntime.Running)
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 500 {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("not in 5 s: %s", what)
}

// limit reads a limit of the container by its v1 and v2 names.
func (c *Container) limit(t *testing.T, v1, v2 string) string {
	t.Helper()
	own, err := host.CgroupOf(c.Started.Pid)
	if err != nil {
		t.Fatal(err)
	}
	controller, _, _ := strings.Cut(v1, ".")
	path := filepath.Join(own[controller], v1)
	if own[controller] == "" {
		path = filepath.Join(own[""], v2)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func (s *suite) update(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, []string{"sleep", "60"}, func(spec *specs.Spec) {
		spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr[int64](64 << 20)}
		spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr[int64](50)}
		spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr[int64](50000), Period: ptr[uint64](100000)}
	})
	check := func(when, memory, pids, cpu string) {
		t.Helper()
		quota := c.limit(t, "cpu.cfs_quota_us", "cpu.max")
		quota, _, _ = strings.Cut(quota, " ")
		for _, l := range []struct{ name, got, want string }{
			{"memory", c.limit(t, "memory.limit_in_bytes", "memory.max"), memory},
			{"pids", c.limit(t, "pids.max", "pids.max"), pids},
			{"cpu quota", quota, cpu},
		} {
			if l.got != l.want {
				t.Errorf("%s %s: %s, want %s", l.name, when, l.got, l.want)
			}
		}
	}
	check("after Create", "67108864", "50", "50000")
	update := func(r *specs.LinuxResources) {
		t.Helper()
		if err := rt.Update(t.Context(), c.Container, r); err != nil {
			t.Fatal(err)
		}
	}
	update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr[int64](20000), Period: ptr[uint64](100000)}})
	check("after an update of cpu", "67108864", "50", "20000")
	update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr[int64](128 << 20)}})
	check("after an update of memory", "134217728", "50", "20000")
	update(&specs.LinuxResources{})
	check("after an update of nothing", "134217728", "50", "20000")

	err := rt.Update(t.Context(), c.Container, &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr[int64](1), Period: ptr[uint64](1)}})
	if err == nil {
		t.Error("an update to what the kernel refuses: no error")
	}
	check("after an update that failed", "134217728", "50", "20000")

	if err := rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	want(t, "Update after the end", rt.Update(t.Context(), c.Container, &specs.LinuxResources{}), errdefs.ErrFailedPrecondition)
}

func ptr[T any](v T) *T { return &v }

func (s *suite) oomKills(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Create(t, rt, []string{"sh", "-c", "tail /dev/zero; exit 5"}, func(spec *specs.Spec) {
		spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr[int64](20 << 20), Swap: ptr[int64](20 << 20)}
	})
	if n, err := rt.OOMKills(c.Container); n != 0 || err != nil {
		t.Errorf("before: %d, error %v", n, err)
	}
	c.Start()
	if got := c.Wait(); got != 5 {
		t.Errorf("exit code %d, want 5: the shell survives its child", got)
	}
	if n, err := rt.OOMKills(c.Container); n != 1 || err != nil {
		t.Errorf("after the end: %d, error %v; want 1", n, err)
	}
}

func (s *suite) deleteAny(t *testing.T) {
	rt := s.factory(t)
	for _, state := range []string{"created", "running", "with execs", "stopped", "reaped"} {
		c := s.lab.Create(t, rt, []string{"sh", "-c", "sleep 60 & sleep 60 & wait"})
		var execs sync.WaitGroup
		if state != "created" {
			c.Start()
		}
		switch state {
		case "with execs":
			for range 2 {
				started, err := rt.Exec(t.Context(), c.Container, ociruntime.ExecRequest{Process: c.Process("sleep", "60")})
				if err != nil {
					t.Fatal(err)
				}
				execs.Go(func() { reap(t, started) })
			}
		case "stopped", "reaped":
			if err := rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
				t.Fatal(err)
			}
		}
		if state == "reaped" {
			c.Wait()
		}
		c.Delete()
		c.AssertGone()
		execs.Wait()
		if got := c.Wait(); got != 128+9 {
			t.Errorf("%s: exit code %d, want 137", state, got)
		}
	}
	if err := rt.Delete(t.Context(), ociruntime.Container{ID: "never", StateDir: filepath.Join(s.lab.dir, "never")}); err != nil {
		t.Errorf("Delete of what never was: %v", err)
	}
}

func (s *suite) deleteForkBomb(t *testing.T) {
	rt := s.factory(t)
	c := s.lab.Run(t, rt, []string{"sh", "-c", "echo go; while :; do sleep 0.01 & done"}, func(spec *specs.Spec) {
		spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr[int64](100)}
		// Without a PID namespace of its own nothing helps but the cgroup.
		spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
	})
	c.Expect("go\n")
	time.Sleep(50 * time.Millisecond)
	c.Delete()
	c.AssertGone()
	c.Wait()
	reapZombies(0)
}

// newProcess: what one Runtime began, another goes on with.
func (s *suite) newProcess(t *testing.T) {
	c := s.lab.Create(t, s.factory(t), []string{"sh", "-c", "echo hello; sleep 60"})
	c.rt = s.factory(t)
	s.wantState(t, c, ociruntime.Created)
	c.rt = s.factory(t)
	c.Start()
	c.Expect("hello\n")
	c.rt = s.factory(t)
	s.wantState(t, c, ociruntime.Running)
	if out, _, err := c.Exec(c.Process("hostname"), ""); err != nil || out != "lab\n" {
		t.Errorf("Exec: %q, error %v", out, err)
	}
	c.rt = s.factory(t)
	if err := c.rt.Update(t.Context(), c.Container, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr[int64](40)}}); err != nil {
		t.Error(err)
	}
	if err := c.rt.Signal(t.Context(), c.Container, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	c.rt = s.factory(t)
	if _, err := c.rt.OOMKills(c.Container); err != nil {
		t.Error(err)
	}
	c.Delete()
	c.AssertGone()
}

func (s *suite) concurrent(t *testing.T) {
	rt := s.factory(t)
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			c := s.lab.Prepare(t, rt, []string{"sleep", "60"})
			if err := c.Create(); err != nil {
				t.Error(err)
				return
			}
			if err := rt.Start(t.Context(), c.Container); err != nil {
				t.Error(err)
				return
			}
			var execs sync.WaitGroup
			for j := range 3 {
				execs.Go(func() {
					out, code, err := c.Exec(c.Process("sh", "-c", fmt.Sprintf("echo %d; exit %d", i, j)), "")
					if err != nil || out != strconv.Itoa(i)+"\n" || code != j {
						t.Errorf("exec: %q, exit code %d, error %v", out, code, err)
					}
				})
			}
			execs.Wait()
			c.Delete()
			c.Wait()
		})
	}
	all.Wait()
}

func (s *suite) hooks(t *testing.T) {
	c := s.lab.Prepare(t, s.factory(t), []string{"true"})
	dir := c.Bundle
	hook := func(name string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + filepath.Join(dir, name)}}}
	}
	h := s.lab.Create(t, s.factory(t), []string{"true"}, func(spec *specs.Spec) {
		spec.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststop: hook("poststop")}
	})
	h.Start()
	h.Wait()
	h.Delete()
	for _, name := range []string{"createRuntime", "poststop"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(data), h.Bundle) {
			t.Errorf("hook %s was told %q, error %v; want the bundle %s in it", name, data, err, h.Bundle)
		}
	}
}

func (s *suite) seccomp(t *testing.T) {
	filter := func(spec *specs.Spec) {
		spec.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64},
			Syscalls: []specs.LinuxSyscall{{
				Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(unix.EXDEV)),
			}},
		}
	}
	for _, noNewPrivileges := range []bool{true, false} {
		c := s.lab.Prepare(t, s.factory(t), []string{"sh", "-c", "mkdir /tmp/a; sleep 60"}, filter, func(spec *specs.Spec) {
			spec.Process.NoNewPrivileges = noNewPrivileges
		})
		err := c.Create()
		if err != nil && strings.Contains(err.Error(), "seccomp") && strings.Contains(err.Error(), "not supported") {
			t.Skipf("probe: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.Start()
		c.Expect("Invalid cross-device link")
		out, code, err := c.Exec(c.Process("mkdir", "/tmp/b"), "")
		if err != nil || code != 1 || !strings.Contains(out, "Invalid cross-device link") {
			t.Errorf("exec: %q, exit code %d, error %v; want the filter to hold there too", out, code, err)
		}
	}
}

// stock is what a process and the machine have that can leak.
type stock struct {
	fds, goroutines, children, mounts int
}

func (l *Lab) takeStock(t *testing.T) stock {
	t.Helper()
	runtime.GC() // libcontainer leaves the handle of each process to the collector
	runtime.GC()
	time.Sleep(20 * time.Millisecond)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := host.MountPoints(l.dir) // others on the machine may mount, too
	if err != nil {
		t.Fatal(err)
	}
	return stock{fds: len(fds), goroutines: runtime.NumGoroutine(), children: children(t), mounts: len(mounts)}
}

func children(t *testing.T) int {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var n int
	for _, path := range lists {
		data, _ := os.ReadFile(path) // the thread may have ended
		n += len(strings.Fields(string(data)))
	}
	return n
}

// compare fails the test if there is more of anything than before.
func (l *Lab) compare(t *testing.T, before stock) {
	t.Helper()
	var after stock
	for range 20 { // goroutines and collected handles may take a moment
		after = l.takeStock(t)
		if after.fds <= before.fds && after.goroutines <= before.goroutines && after.children <= before.children && after.mounts <= before.mounts {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("left behind: before %+v, after %+v", before, after)
}
