package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/criu"
)

// Lab is a place to run containers in: a root file system with busybox, a parent
// cgroup, and a process (the test's own) that reaps.
type Lab struct {
	dir    string // for bundles and state directories
	rootfs string
	parent string // cgroup of all containers of this lab
	names  atomic.Int64
}

// NewLab makes a lab and becomes a child subreaper, as the processes of runtimes
// that are commands are left to one. It skips the test if it cannot: it takes root.
func NewLab(t testing.TB) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("probe: effective user is not root, who alone may make containers")
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	l := &Lab{dir: t.TempDir(), parent: fmt.Sprintf("/sampan-conformance-%d", os.Getpid())}
	l.rootfs = filepath.Join(l.dir, "rootfs")
	if err := makeRootfs(l.rootfs); err != nil {
		t.Fatalf("%v (the Debian package busybox-static has it)", err)
	}
	// A t.TempDir is open to its owner alone, but a container's user has to
	// walk through it while runtimes still resolve paths.
	if err := errors.Join(os.Chmod(l.dir, 0o755), os.Chmod(filepath.Dir(l.dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.removeParent(t) })
	return l
}

func makeRootfs(dir string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755); err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	for name := range bytes.FieldsSeq(applets) {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", string(name))); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

// cgroupDirs returns the directories of the lab's parent cgroup, or of a
// container's below it.
func (l *Lab) cgroupDirs(name string) host.Cgroup {
	c := make(host.Cgroup)
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		found, _ := filepath.Glob(pattern + filepath.Join(l.parent, name))
		for _, dir := range found {
			c[strings.TrimPrefix(strings.TrimSuffix(dir, filepath.Join(l.parent, name)), "/sys/fs/cgroup")] = dir
		}
	}
	return c
}

func (l *Lab) removeParent(t testing.TB) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := l.cgroupDirs("")
	if err := errors.Join(c.Kill(ctx), c.Remove(ctx)); err != nil {
		t.Error(err)
	}
}

// Spec returns a spec for a container that runs args: namespaces for all but the
// network, a read-only root, the usual mounts, a few capabilities.
func (l *Lab) Spec(name string, args ...string) *specs.Spec {
	capabilities := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	return &specs.Spec{
		Version:  "1.0.2",
		Hostname: "lab",
		Root:     &specs.Root{Path: l.rootfs, Readonly: true},
		Process: &specs.Process{
			Args: args,
			Cwd:  "/",
			Env:  []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: capabilities, Effective: capabilities, Permitted: capabilities,
			},
			NoNewPrivileges: true,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=1777"}},
		},
		Annotations: map[string]string{criu.ConfigAnnotation: filepath.Join(l.dir, name, "criu.conf")},
		Linux: &specs.Linux{
			CgroupsPath: filepath.Join(l.parent, name),
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
			MaskedPaths:   []string{"/proc/keys"},
			ReadonlyPaths: []string{"/proc/sys"},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
		},
	}
}

// Container is a container under test.
type Container struct {
	ociruntime.Container
	Bundle  string
	Started ociruntime.Started

	t        testing.TB
	lab      *Lab
	rt       ociruntime.Runtime
	out      *os.File // read end of the FIFO that is its stdout and stderr
	fifo     *os.File // the container's end
	buf      bytes.Buffer
	reapOnce sync.Once
	status   unix.WaitStatus
}

// name returns a name for a container that nobody else in this lab has.
func (l *Lab) name() string {
	return "c" + strconv.FormatInt(l.names.Add(1), 10) + "-" + strconv.Itoa(os.Getpid())
}

// Prepare writes a bundle and makes the FIFO for the output of a container that
// runs args. Each edit may change the spec first. Whatever the test does with the
// container, it is deleted in the end.
func (l *Lab) Prepare(t testing.TB, rt ociruntime.Runtime, args []string, edits ...func(*specs.Spec)) *Container {
	t.Helper()
	name := l.name()
	c := &Container{
		Container: ociruntime.Container{ID: name, StateDir: filepath.Join(l.dir, name+".state")},
		Bundle:    filepath.Join(l.dir, name), t: t, lab: l, rt: rt,
	}
	spec := l.Spec(name, args...)
	for _, edit := range edits {
		edit(spec)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(c.Bundle, "out")
	if err := errors.Join(os.Mkdir(c.Bundle, 0o755), os.WriteFile(filepath.Join(c.Bundle, "config.json"), data, 0o644), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	// As the keeper does it: the container's end is open for both, so that it
	// never lacks a reader.
	if c.fifo, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	if c.out, err = os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	return c
}

// Create is Prepare and the runtime's Create, which must succeed.
func (l *Lab) Create(t testing.TB, rt ociruntime.Runtime, args []string, edits ...func(*specs.Spec)) *Container {
	t.Helper()
	c := l.Prepare(t, rt, args, edits...)
	if err := c.Create(); err != nil {
		t.Fatal(err)
	}
	return c
}

// Run is Create and Start.
func (l *Lab) Run(t testing.TB, rt ociruntime.Runtime, args []string, edits ...func(*specs.Spec)) *Container {
	t.Helper()
	c := l.Create(t, rt, args, edits...)
	c.Start()
	return c
}

// Create creates the container.
func (c *Container) Create() error {
	ctx, cancel := c.context()
	defer cancel()
	return c.create(ctx, nil)
}

func (c *Container) create(ctx context.Context, from *ociruntime.Checkpoint) (err error) {
	c.Started, err = c.rt.Create(ctx, c.Container, ociruntime.CreateRequest{
		Bundle:  c.Bundle,
		Stdio:   ociruntime.Stdio{Stdout: c.fifo, Stderr: c.fifo},
		Restore: from,
	})
	return err
}

// Start starts the container, which must succeed.
func (c *Container) Start() {
	c.t.Helper()
	ctx, cancel := c.context()
	defer cancel()
	if err := c.rt.Start(ctx, c.Container); err != nil {
		c.t.Fatal(err)
	}
}

func (c *Container) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 20*time.Second)
}

// UseRuntime has another Runtime go on with the container.
func (c *Container) UseRuntime(rt ociruntime.Runtime) { c.rt = rt }

// Wait waits for the end of the first process, reaps it and returns its exit
// code, or 128+signal.
func (c *Container) Wait() int {
	c.t.Helper()
	c.reapOnce.Do(func() { c.status = reap(c.t, c.Started) })
	return exitCode(c.status)
}

func exitCode(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// reap waits for a process as the keeper does.
func reap(t testing.TB, s ociruntime.Started) unix.WaitStatus {
	t.Helper()
	var status unix.WaitStatus
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(time.Millisecond) {
		switch pid, err := unix.Wait4(s.Pid, &status, unix.WNOHANG, nil); {
		case err != nil && !errors.Is(err, unix.EINTR):
			t.Errorf("reap process %d: %v", s.Pid, err)
			return status
		case pid == s.Pid:
			return status
		}
		if !s.Child && time.Since(begin) > 500*time.Millisecond {
			// Commands leave processes behind that nobody was told of, e.g. that of
			// an exec that failed. It keeps its PID namespace from ending.
			reapZombies(s.Pid)
		}
	}
	t.Errorf("process %d has not ended in 20 s", s.Pid)
	return status
}

// reapZombies reaps all children that have ended, but not one that is waited
// for elsewhere. It must not run while others wait for theirs.
func reapZombies(except int) {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, list := range lists {
		data, _ := os.ReadFile(list) // the thread may have ended
		for field := range bytes.FieldsSeq(data) {
			if pid, err := strconv.Atoi(string(field)); err == nil && pid != except {
				unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}

// Expect reads the output until want has been written, in 10 s.
func (c *Container) Expect(want string) {
	c.t.Helper()
	c.read(func() bool { return strings.Contains(c.buf.String(), want) }, want)
}

func (c *Container) read(enough func() bool, want string) {
	c.t.Helper()
	c.out.SetReadDeadline(time.Now().Add(10 * time.Second))
	chunk := make([]byte, 64<<10)
	for !enough() {
		n, err := c.out.Read(chunk)
		c.buf.Write(chunk[:n])
		if err != nil {
			c.t.Fatalf("output is %q without %q: %v", c.buf.String(), want, err)
		}
	}
}

// Output returns what has been written so far.
func (c *Container) Output() string {
	c.out.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	chunk := make([]byte, 64<<10)
	for {
		n, err := c.out.Read(chunk)
		c.buf.Write(chunk[:n])
		if err != nil {
			return c.buf.String()
		}
	}
}

// Delete deletes the container, which must succeed.
func (c *Container) Delete() {
	c.t.Helper()
	ctx, cancel := c.context()
	defer cancel()
	if err := c.rt.Delete(ctx, c.Container); err != nil {
		c.t.Error(err)
	}
}

// end deletes the container if the test has not, and checks that nothing is left.
func (c *Container) end() {
	c.t.Helper()
	c.Delete()
	if c.Started.Pid != 0 {
		c.Wait()
	}
	if c.Started.Console != nil {
		c.Started.Console.Close()
	}
	c.out.Close()
	c.fifo.Close()
	c.AssertGone()
}

// AssertGone checks that there is no trace of the container.
func (c *Container) AssertGone() {
	c.t.Helper()
	if _, err := os.Lstat(c.StateDir); !os.IsNotExist(err) {
		c.t.Errorf("state directory %s is there (%v)", c.StateDir, err)
	}
	for _, dir := range c.lab.cgroupDirs(c.ID) {
		c.t.Errorf("cgroup %s is there", dir)
	}
	if mounts, err := host.MountPoints(c.lab.dir); err != nil || len(mounts) > 0 {
		c.t.Errorf("mounts %v, error %v", mounts, err)
	}
}

// Exec runs a process in the container to its end and returns its output and
// exit code.
func (c *Container) Exec(p *specs.Process, stdin string) (string, int, error) {
	c.t.Helper()
	ctx, cancel := c.context()
	defer cancel()
	in, out := pipe(c.t), pipe(c.t)
	defer in.close()
	defer out.close()
	started, err := c.rt.Exec(ctx, c.Container, ociruntime.ExecRequest{
		Process: p,
		Stdio:   ociruntime.Stdio{Stdin: in.r, Stdout: out.w, Stderr: out.w},
	})
	if err != nil {
		return "", 0, err
	}
	in.w.WriteString(stdin)
	in.close()
	out.w.Close()
	var output bytes.Buffer
	output.ReadFrom(out.r)
	return output.String(), exitCode(reap(c.t, started)), nil
}

// Process returns a process for Exec that is like the container's first.
func (c *Container) Process(args ...string) *specs.Process {
	return c.lab.Spec(c.ID, args...).Process
}

type ends struct{ r, w *os.File }

func pipe(t testing.TB) ends {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	return ends{r, w}
}

func (e ends) close() {
	e.r.Close()
	e.w.Close()
}
