package spec

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// The tests in this file run specs with the OCI runtimes that are installed and
// look from inside. They are root's, and leave no mount, namespace or cgroup.

// report is what testdata/inspect prints.
type report struct {
	Args, Env  []string
	Cwd        string
	Hostname   string
	Pid        int
	UID, GID   int
	Groups     []int
	Status     map[string]string
	OOMScore   string
	OpenFiles  uint64
	Mounts     map[string]string
	Namespaces map[string]string
	Reads      map[string]string
	Writes     map[string]string
}

// lab runs containers of one pod with one OCI runtime.
type lab struct {
	command []string // the runtime, with what has to go before it
	dir     string
	rootfs  string
	spaces  host.Namespaces
	facts   host.Facts
	count   int
}

func TestRuntimes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can run containers")
	}
	inspect := buildInspect(t)
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, name, inspect)
			for _, tt := range []struct {
				name string
				run  func(*testing.T, *lab)
			}{
				{"Default", testDefault},
				{"Restricted", testRestricted},
				{"Privileged", testPrivileged},
				{"NodeNamespaces", testNodeNamespaces},
				{"JoinedPID", testJoinedPID},
				{"Limits", testLimits},
				{"Ambient", testAmbient},
				{"Mounts", testMounts},
				{"Devices", testDevices},
				{"Init", testInit},
			} {
				t.Run(tt.name, func(t *testing.T) { tt.run(t, l) })
			}
		})
	}
}

func buildInspect(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "inspect")
	cmd := exec.Command("go", "build", "-o", bin, "./testdata/inspect")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build inspect: %v\n%s", err, out)
	}
	return bin
}

func newLab(t *testing.T, name, inspect string) *lab {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	facts, err := host.ProbeFacts()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l := &lab{
		command: []string{path}, dir: dir, rootfs: filepath.Join(dir, "rootfs"), facts: facts,
		spaces: host.Namespaces{Net: filepath.Join(dir, "net"), IPC: filepath.Join(dir, "ipc"), UTS: filepath.Join(dir, "uts"), Hostname: "pod-of-the-test"},
	}
	for _, d := range []string{"etc", "proc", "dev", "sys", "tmp", "home/web"} {
		must(t, os.MkdirAll(filepath.Join(l.rootfs, d), 0o755))
	}
	must(t, os.Chmod(filepath.Join(l.rootfs, "tmp"), 0o1777))
	data, err := os.ReadFile(inspect)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(l.rootfs, "inspect"), data, 0o755))
	must(t, l.spaces.Create())
	t.Cleanup(func() {
		if err := l.spaces.Remove(); err != nil {
			t.Error(err)
		}
	})
	if err := l.probe(t); err != nil && facts.Cgroup == host.CgroupHybrid {
		// crun refuses a v1 host that has the v2 hierarchy as well. Show it one
		// that has not.
		l.command = []string{"unshare", "--mount", "--propagation", "unchanged", "sh", "-c",
			`mount --make-rprivate /sys/fs/cgroup && umount /sys/fs/cgroup/unified && exec "$0" "$@"`, path}
	}
	if err := l.probe(t); err != nil {
		t.Skipf("%s cannot run its own spec on this host: %v", name, err)
	}
	return l
}

// probe runs the spec that the runtime makes up itself.
func (l *lab) probe(t *testing.T) error {
	t.Helper()
	bundle := t.TempDir()
	spec := exec.Command(l.command[len(l.command)-1], "spec")
	spec.Dir = bundle
	if out, err := spec.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", spec, err, out)
	}
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	must(t, err)
	var s specs.Spec
	must(t, json.Unmarshal(data, &s))
	s.Root.Path = l.rootfs
	s.Process.Terminal = false
	s.Process.Args = []string{"/inspect"}
	s.Process.Rlimits = nil
	for _, set := range []*[]string{&s.Process.Capabilities.Bounding, &s.Process.Capabilities.Effective, &s.Process.Capabilities.Permitted, &s.Process.Capabilities.Inheritable, &s.Process.Capabilities.Ambient} {
		*set = onHost(*set, l.facts.Capabilities)
	}
	_, err = l.runSpec(t, &s)
	return err
}

// input is that of a container that runs inspect in the lab's pod.
func (l *lab) input(t *testing.T, args ...string) Input {
	t.Helper()
	in := testInput()
	l.count++
	in.Image.Entrypoint, in.Image.Cmd = []string{"/inspect"}, args
	in.Rootfs = l.rootfs
	in.Hostname = l.spaces.Hostname
	in.CgroupsPath = l.cgroup()
	in.Namespaces = Namespaces{Network: l.spaces.Net, IPC: l.spaces.IPC, UTS: l.spaces.UTS}
	in.Host = l.facts
	in.Files = Files{}
	for file, content := range map[*string]string{&in.Files.ResolvConf: "nameserver 10.0.0.10\n", &in.Files.Hosts: "127.0.0.1 localhost\n", &in.Files.Hostname: "pod-of-the-test\n"} {
		f, err := os.CreateTemp(l.dir, "file")
		must(t, err)
		_, err = f.WriteString(content)
		must(t, err)
		must(t, f.Chmod(0o644))
		must(t, f.Close())
		*file = f.Name()
	}
	in.Files.Shm = filepath.Join(l.dir, "shm")
	must(t, os.MkdirAll(in.Files.Shm, 0o755))
	return in
}

func (l *lab) id() string     { return fmt.Sprintf("sampan-spec-test-%d-%d", os.Getpid(), l.count) }
func (l *lab) cgroup() string { return "/" + l.id() }

// run builds the spec, runs it, and returns what the process saw.
func (l *lab) run(t *testing.T, in Input) report {
	t.Helper()
	r, err := l.runSpec(t, mustBuild(t, in))
	must(t, err)
	return r
}

func (l *lab) runSpec(t *testing.T, s *specs.Spec) (r report, err error) {
	t.Helper()
	bundle := t.TempDir()
	data, err := json.Marshal(s)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600))

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	state := filepath.Join(l.dir, "state")
	var stdout, stderr bytes.Buffer
	cmd := l.cli(ctx, "--root", state, "run", "--bundle", bundle, l.id())
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		// Something may be left, or nothing.
		l.cli(context.Background(), "--root", state, "delete", "--force", l.id()).Run()
		return r, fmt.Errorf("%s: %w: %s", cmd, err, stderr.Bytes())
	}
	return r, json.Unmarshal(stdout.Bytes(), &r)
}

// cli is a call of the runtime's command line.
func (l *lab) cli(ctx context.Context, args ...string) *exec.Cmd {
	argv := slices.Concat(l.command, args)
	return exec.CommandContext(ctx, argv[0], argv[1:]...)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func contains(t *testing.T, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("%s: %q, want it to contain %q", what, got, want)
	}
}

// capMask is the mask of capabilities as /proc/PID/status shows it.
func capMask(names []string) string {
	var mask uint64
	for _, c := range capability.ListKnown() {
		if slices.Contains(names, "CAP_"+strings.ToUpper(c.String())) {
			mask |= 1 << uint(c)
		}
	}
	return fmt.Sprintf("%016x", mask)
}

func testDefault(t *testing.T, l *lab) {
	in := l.input(t, "-write", "/proc/sys/kernel/domainname", "-write", "/sys/kernel/uevent_seqnum", "-read", "/proc/interrupts", "-read", "/etc/resolv.conf", "-write", "/tmp/x", "-read", "/dev/null")
	in.Container.Envs = []*runtimeapi.KeyValue{{Key: "GREETING", Value: []byte("grüß\ngott")}}
	r := l.run(t, in)

	equal(t, "uid", r.UID, 0)
	equal(t, "groups", fmt.Sprint(r.Groups), "[0 4 10]")
	equal(t, "pid", r.Pid, 1)
	equal(t, "cwd", r.Cwd, "/")
	equal(t, "host name", r.Hostname, "pod-of-the-test")
	equal(t, "oom_score_adj", r.OOMScore, strconv.Itoa(max(0, l.facts.MinOOMScoreAdj)))
	equal(t, "open files", r.OpenFiles, min(1<<20, l.facts.MaxOpenFiles))
	if !slices.Contains(r.Env, "GREETING=grüß\ngott") || !slices.Contains(r.Env, "HOME=/root") || !slices.Contains(r.Env, "PATH=/bin") {
		t.Errorf("environment %q", r.Env)
	}

	caps := capMask(onHost(defaultCapabilities, l.facts.Capabilities))
	for set, want := range map[string]string{"CapBnd": caps, "CapEff": caps, "CapPrm": caps, "CapInh": capMask(nil), "CapAmb": capMask(nil)} {
		equal(t, set, r.Status[set], want)
	}
	equal(t, "NoNewPrivs", r.Status["NoNewPrivs"], "0")
	equal(t, "Seccomp", r.Status["Seccomp"], "0")

	contains(t, "/proc/sys", r.Writes["/proc/sys/kernel/domainname"], "read-only")
	contains(t, "/sys", r.Writes["/sys/kernel/uevent_seqnum"], "error")
	equal(t, "/proc/interrupts", r.Reads["/proc/interrupts"], "")
	equal(t, "/etc/resolv.conf", r.Reads["/etc/resolv.conf"], "nameserver 10.0.0.10")
	equal(t, "/tmp", r.Writes["/tmp/x"], "ok")
	equal(t, "/dev/null", r.Reads["/dev/null"], "")
	for _, p := range []string{"/dev/shm", "/dev/mqueue", "/dev/pts", "/etc/hosts", "/etc/hostname", "/sys/fs/cgroup"} {
		if r.Mounts[p] == "" {
			t.Errorf("nothing is mounted on %s", p)
		}
	}
	for ns, path := range map[string]string{"net": l.spaces.Net, "ipc": l.spaces.IPC, "uts": l.spaces.UTS} {
		equal(t, ns+" namespace", r.Namespaces[ns], namespaceAt(t, ns, path))
	}
	if own := ownNamespace(t, "pid"); r.Namespaces["pid"] == own {
		t.Error("the container has the host's PID namespace")
	}
}

func testRestricted(t *testing.T, l *lab) {
	in := l.input(t, "-write", "/x", "-write", "/data/x", "-read", "/proc/self/cmdline")
	data := filepath.Join(l.dir, "volume")
	must(t, os.MkdirAll(data, 0o755))
	must(t, os.Chown(data, 1000, 2000))
	in.Image.Volumes = map[string]struct{}{"/data": {}}
	in.Volumes = map[string]string{"/data": data}
	in.Container.WorkingDir = "/home/web"
	sc := in.context()
	sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = id64(1000), id64(2000), []int64{3000}
	sc.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
	sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	r := l.run(t, in)

	equal(t, "uid", r.UID, 1000)
	equal(t, "gid", r.GID, 2000)
	equal(t, "groups", fmt.Sprint(r.Groups), "[2000 3000]")
	equal(t, "cwd", r.Cwd, "/home/web")
	equal(t, "CapBnd", r.Status["CapBnd"], capMask(nil))
	equal(t, "NoNewPrivs", r.Status["NoNewPrivs"], "1")
	equal(t, "Seccomp", r.Status["Seccomp"], "2")
	contains(t, "the root", r.Writes["/x"], "read-only")
	equal(t, "the volume", r.Writes["/data/x"], "ok")
}

func testPrivileged(t *testing.T, l *lab) {
	in := l.input(t, "-write", "/proc/sys/net/ipv4/ip_forward", "-write", "/dev/kmsg-of-the-host")
	in.podContext().Privileged, in.context().Privileged = true, true
	var err error
	in.HostDevices, err = host.AllDevices()
	must(t, err)
	kmsg, err := host.Devices("/dev/kmsg")
	must(t, err)
	in.Devices = map[string][]host.Device{"/dev/kmsg": kmsg}
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/kmsg", ContainerPath: "/dev/kmsg-of-the-host"}}
	r := l.run(t, in)

	all := capMask(l.facts.Capabilities)
	equal(t, "CapEff", r.Status["CapEff"], all)
	equal(t, "CapBnd", r.Status["CapBnd"], all)
	equal(t, "/proc/sys", r.Writes["/proc/sys/net/ipv4/ip_forward"], "ok")
	contains(t, "/sys", r.Mounts["/sys"], "rw")
	equal(t, "the host's /dev/kmsg", r.Writes["/dev/kmsg-of-the-host"], "ok")
}

func testNodeNamespaces(t *testing.T, l *lab) {
	in := l.input(t)
	o := &runtimeapi.NamespaceOption{Network: modeNode, Pid: modeNode, Ipc: modeNode}
	in.podContext().NamespaceOptions, in.context().NamespaceOptions = o, o
	in.Namespaces = Namespaces{}
	r := l.run(t, in)
	for _, ns := range []string{"net", "pid", "ipc", "uts", "user"} {
		equal(t, ns+" namespace", r.Namespaces[ns], ownNamespace(t, ns))
	}
}

// testJoinedPID puts the container into the PID namespace of another process,
// as for a pod with a shared one and for a TARGET.
func testJoinedPID(t *testing.T, l *lab) {
	other := exec.Command("sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	must(t, other.Start())
	defer other.Wait()
	defer other.Process.Kill()

	in := l.input(t)
	in.context().NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "other"}
	in.Namespaces.PID = fmt.Sprintf("/proc/%d/ns/pid", other.Process.Pid)
	want := namespaceAt(t, "pid", in.Namespaces.PID)
	r := l.run(t, in)
	equal(t, "PID namespace", r.Namespaces["pid"], want)
	if r.Pid == 1 {
		t.Error("the container's process is PID 1 of a namespace it joined")
	}
}

func testLimits(t *testing.T, l *lab) {
	files := map[string]string{
		"/sys/fs/cgroup/memory/memory.limit_in_bytes": strconv.Itoa(64 << 20),
		"/sys/fs/cgroup/cpu/cpu.cfs_quota_us":         "20000",
		"/sys/fs/cgroup/cpu/cpu.shares":               "204",
		"/sys/fs/cgroup/cpuset/cpuset.cpus":           "0",
	}
	if l.facts.SwapLimit {
		files["/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"] = strconv.Itoa(96 << 20)
	}
	resources := &runtimeapi.LinuxContainerResources{
		CpuShares: 204, CpuQuota: 20000, CpuPeriod: 100000, CpusetCpus: "0",
		MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 96 << 20, OomScoreAdj: 900,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}},
	}
	if l.facts.Cgroup == host.CgroupV2 {
		files = map[string]string{
			"/sys/fs/cgroup/memory.max":      strconv.Itoa(64 << 20),
			"/sys/fs/cgroup/memory.swap.max": strconv.Itoa(32 << 20),
			"/sys/fs/cgroup/memory.high":     strconv.Itoa(60 << 20),
			"/sys/fs/cgroup/cpu.max":         "20000 100000",
			"/sys/fs/cgroup/cpuset.cpus":     "0",
		}
		resources.Unified = map[string]string{"memory.high": strconv.Itoa(60 << 20)}
	}
	var args []string
	for file := range files {
		args = append(args, "-read", file)
	}
	in := l.input(t, args...)
	in.Container.Linux.Resources = resources
	r := l.run(t, in)
	for file, want := range files {
		equal(t, file, r.Reads[file], want)
	}
	equal(t, "oom_score_adj", r.OOMScore, "900")
}

// testAmbient: an ordinary user keeps a capability that is added as ambient.
func testAmbient(t *testing.T, l *lab) {
	in := l.input(t)
	in.context().RunAsUser = id64(1000)
	in.context().Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}, DropCapabilities: []string{"ALL"}}
	r := l.run(t, in)
	want := capMask([]string{"CAP_NET_BIND_SERVICE"})
	for _, set := range []string{"CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"} {
		equal(t, set, r.Status[set], want)
	}
}

func testMounts(t *testing.T, l *lab) {
	top := filepath.Join(l.dir, "mounts")
	must(t, os.MkdirAll(top, 0o755))
	must(t, unix.Mount("tmpfs", top, "tmpfs", 0, ""))
	t.Cleanup(func() {
		if err := host.UnmountUnder(top); err != nil {
			t.Error(err)
		}
	})
	must(t, unix.Mount("", top, "", unix.MS_SHARED, ""))
	group := peerGroup(t, top)
	for _, d := range []string{"plain", "read-only", "recursive", "recursive/below", "shared", "slave"} {
		must(t, os.Mkdir(filepath.Join(top, d), 0o755))
	}
	must(t, unix.Mount("tmpfs", filepath.Join(top, "recursive/below"), "tmpfs", 0, ""))

	in := l.input(t, "-write", "/m/plain/x", "-write", "/m/read-only/x", "-write", "/m/recursive/x", "-write", "/m/recursive/below/x")
	for _, m := range []*runtimeapi.Mount{
		{ContainerPath: "/m/recursive", Readonly: true, RecursiveReadOnly: true},
		{ContainerPath: "/m/plain", MountOptions: []string{"noexec", "nosuid"}},
		{ContainerPath: "/m/read-only", Readonly: true},
		{ContainerPath: "/m/shared", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		{ContainerPath: "/m/slave", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
	} {
		m.HostPath = filepath.Join(top, filepath.Base(m.ContainerPath))
		shared, slave, err := host.Propagation(m.HostPath)
		must(t, err)
		in.Container.Mounts = append(in.Container.Mounts, m)
		in.Sources = append(in.Sources, Source{Path: m.HostPath, Shared: shared, Slave: slave})
	}
	r := l.run(t, in)

	equal(t, "plain", r.Writes["/m/plain/x"], "ok")
	contains(t, "plain's options", r.Mounts["/m/plain"], "noexec")
	contains(t, "plain's options", r.Mounts["/m/plain"], "nosuid")
	if p := r.Mounts["/m/plain"]; slices.ContainsFunc(strings.Fields(p), func(f string) bool { return f == "shared"+group || f == "master"+group }) {
		t.Errorf("plain's propagation: %q, but it is to exchange nothing with the host", p)
	}
	contains(t, "read-only", r.Writes["/m/read-only/x"], "read-only")
	contains(t, "recursive", r.Writes["/m/recursive/x"], "read-only")
	contains(t, "below recursive", r.Writes["/m/recursive/below/x"], "read-only")
	contains(t, "shared's propagation", r.Mounts["/m/shared"], "shared"+group)
	contains(t, "slave's propagation", r.Mounts["/m/slave"], "master"+group)
}

func testDevices(t *testing.T, l *lab) {
	in := l.input(t, "-write", "/dev/full-rw", "-read", "/dev/full-rw", "-read", "/dev/kmsg")
	full, err := host.Devices("/dev/full")
	must(t, err)
	in.Devices = map[string][]host.Device{"/dev/full": full}
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/full", ContainerPath: "/dev/full-rw", Permissions: "rw"}}
	r := l.run(t, in)
	equal(t, "writing the device", r.Writes["/dev/full-rw"], "ok")
	equal(t, "reading the device", r.Reads["/dev/full-rw"], strings.Repeat("\x00", 64))
	contains(t, "a device of the host", r.Reads["/dev/kmsg"], "no such file")
}

func testInit(t *testing.T, l *lab) {
	in := l.input(t)
	s, err := BuildInit(in, "/inspect")
	must(t, err)
	r, err := l.runSpec(t, s)
	must(t, err)
	equal(t, "pid", r.Pid, 1)
	equal(t, "uid", r.UID, nobody)
	equal(t, "groups", fmt.Sprint(r.Groups), fmt.Sprint([]int{nobody}))
	equal(t, "CapBnd", r.Status["CapBnd"], capMask(nil))
	equal(t, "NoNewPrivs", r.Status["NoNewPrivs"], "1")
	equal(t, "net namespace", r.Namespaces["net"], namespaceAt(t, "net", l.spaces.Net))
	contains(t, "the root", r.Mounts["/"], "ro")
}

// peerGroup returns the peer group of the shared mount on path, as ":42".
func peerGroup(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); f[4] == path && strings.HasPrefix(f[6], "shared:") {
			return strings.TrimPrefix(f[6], "shared")
		}
	}
	t.Fatalf("no shared mount on %s", path)
	return ""
}

func ownNamespace(t *testing.T, name string) string {
	t.Helper()
	link, err := os.Readlink("/proc/self/ns/" + name)
	must(t, err)
	return link
}

// namespaceAt names the namespace at path as readlink names one of a process.
func namespaceAt(t *testing.T, name, path string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return fmt.Sprintf("%s:[%d]", name, st.Ino)
}
