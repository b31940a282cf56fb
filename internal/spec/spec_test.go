package spec

import (
	"encoding/json"
	"flag"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// allCaps is what root has on a host that keeps nothing back.
var allCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
	"CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD",
	"CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
	"CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

const (
	testPasswd = `root:x:0:0:root:/root:/bin/sh
# a comment
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
web:x:1000:1000:Web server,,,:/home/web:/bin/sh
homeless:x:1001:1001::
broken:x:abc:0::/:/bin/sh
`
	testGroup = `root:x:0:
adm:x:4:root,web
wheel:x:10:root
web:x:1000:
data:x:50000:daemon,web
broken:x:-1:web
`
)

// testInput is a pod with a namespace of each kind the kubelet asks for, and a
// container that asks for nothing but a program.
func testInput() Input {
	return Input{
		PodID:       strings.Repeat("a", 64),
		ContainerID: strings.Repeat("b", 64),
		Pod: &runtimeapi.PodSandboxConfig{
			Metadata:     &runtimeapi.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "uid"},
			LogDirectory: "/var/log/pods/ns_pod_uid",
			Linux: &runtimeapi.LinuxPodSandboxConfig{
				SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
					NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				},
			},
		},
		Container: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "container"},
			Image:    &runtimeapi.ImageSpec{Image: "sha256:1234"},
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources: &runtimeapi.LinuxContainerResources{},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				},
			},
		},
		Image: ocispec.ImageConfig{
			Entrypoint: []string{"/entry"},
			Cmd:        []string{"cmd"},
			Env:        []string{"PATH=/bin", "LANG=C.UTF-8"},
		},
		Rootfs:      "/run/sampan/containers/b/bundle/rootfs",
		Passwd:      []byte(testPasswd),
		Group:       []byte(testGroup),
		Hostname:    "pod",
		CgroupsPath: "/kubepods/poduid/b",
		Namespaces: Namespaces{
			Network: "/run/netns/sampan-a",
			IPC:     "/run/sampan/pods/a/ns/ipc",
			UTS:     "/run/sampan/pods/a/ns/uts",
		},
		Files: Files{
			ResolvConf: "/run/sampan/pods/a/resolv.conf",
			Hostname:   "/run/sampan/pods/a/hostname",
			Hosts:      "/run/sampan/pods/a/hosts",
			Shm:        "/run/sampan/pods/a/shm",
		},
		Host: host.Facts{
			Capabilities:      allCaps,
			Cgroup:            host.CgroupV2,
			SwapLimit:         true,
			HugepageSizes:     []string{"1GB", "2MB"},
			Seccomp:           true,
			RecursiveReadOnly: true,
			MaxOpenFiles:      1 << 30,
			MinOOMScoreAdj:    -1000,
		},
		Handler: BuiltinFeatures(),
	}
}

// context returns the container's security context.
func (in Input) context() *runtimeapi.LinuxContainerSecurityContext {
	return in.Container.Linux.SecurityContext
}

// podContext returns the pod's security context.
func (in Input) podContext() *runtimeapi.LinuxSandboxSecurityContext {
	return in.Pod.Linux.SecurityContext
}

// build validates and builds, as a caller does.
func build(in Input) (*specs.Spec, error) {
	if err := ValidatePod(in.Pod); err != nil {
		return nil, err
	}
	if err := ValidateContainer(in.Pod, in.Container); err != nil {
		return nil, err
	}
	return Build(in)
}

func mustBuild(t *testing.T, in Input) *specs.Spec {
	t.Helper()
	s, err := build(in)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var goldens = map[string]func(*Input){
	"default": func(*Input) {},
	"kubelet": func(in *Input) {
		in.Container.Command = []string{"/bin/server"}
		in.Container.Args = []string{"--port", "80"}
		in.Container.WorkingDir = "/srv"
		in.Container.Envs = []*runtimeapi.KeyValue{{Key: "KUBERNETES_PORT", Value: []byte("tcp://10.0.0.1:443")}, {Key: "LANG", Value: []byte("de_DE.UTF-8")}}
		in.Container.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/var/run/secrets/token", HostPath: "/var/lib/kubelet/token", Readonly: true},
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/etc-hosts"},
			{ContainerPath: "/data", HostPath: "/mnt/data", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/models", Image: &runtimeapi.ImageSpec{Image: "sha256:5678"}, MountOptions: []string{"noexec", "nosuid"}},
		}
		in.Sources = []Source{{Path: "/var/lib/kubelet/token"}, {Path: "/var/lib/kubelet/etc-hosts"}, {Path: "/mnt/data", Shared: true}, {Path: "/run/sampan/images/m"}}
		in.Container.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuShares: 204, CpuQuota: 20000, CpuPeriod: 100000, CpusetCpus: "0-1", CpusetMems: "0",
			MemoryLimitInBytes: 128 << 20, OomScoreAdj: 999,
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 0}, {PageSize: "1GB", Limit: 1 << 30}},
			Unified:        map[string]string{"memory.high": "120000000"},
		}
		sc := in.context()
		sc.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: 2000}
		sc.SupplementalGroups = []int64{3000}
		sc.NoNewPrivs = true
		sc.ReadonlyRootfs = true
		sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"MKNOD", "CAP_NET_RAW"}}
		sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		sc.MaskedPaths = []string{"/proc/kcore"}
		sc.ReadonlyPaths = []string{"/proc/sys"}
		in.AppArmorProfile = "sampan-default"
	},
	"privileged": func(in *Input) {
		in.podContext().Privileged = true
		in.context().Privileged = true
		in.context().Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		in.HostDevices = []host.Device{{Path: "/dev/kmsg", Type: "c", Major: 1, Minor: 11, Mode: 0o600}, {Path: "/dev/vda", Type: "b", Major: 254, Mode: 0o660, GID: 6}}
		in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/var/lib/csi", HostPath: "/var/lib/csi", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		in.Sources = []Source{{Path: "/srv/csi", Shared: true}}
	},
	"node-namespaces-cgroup-v1": func(in *Input) {
		o := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE}
		in.podContext().NamespaceOptions = o
		in.context().NamespaceOptions = o
		in.Host.Cgroup = host.CgroupV1
		in.Namespaces = Namespaces{}
	},
	"shared-pid-tty-devices": func(in *Input) {
		o := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
		in.podContext().NamespaceOptions = o
		in.context().NamespaceOptions = o
		in.Namespaces.PID = "/proc/4711/ns/pid"
		in.Container.Tty = true
		in.Container.Devices = []*runtimeapi.Device{
			{HostPath: "/dev/fuse", Permissions: "rw"},
			{HostPath: "/dev/snd", ContainerPath: "/dev/audio"},
		}
		in.Devices = map[string][]host.Device{
			"/dev/fuse": {{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, Mode: 0o666}},
			"/dev/snd":  {{Path: "/dev/snd/seq", Type: "c", Major: 116, Minor: 1, Mode: 0o660, GID: 29}},
		}
	},
	"user-namespace": func(in *Input) {
		m := []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}
		o := &runtimeapi.NamespaceOption{
			Pid:           runtimeapi.NamespaceMode_CONTAINER,
			Network:       runtimeapi.NamespaceMode_NODE,
			UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: m, Gids: m},
		}
		in.podContext().NamespaceOptions = o
		in.context().NamespaceOptions = o
		in.Namespaces.User = "/run/sampan/pods/a/ns/user"
		in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: "/mnt/data", UidMappings: m, GidMappings: m}}
		in.Sources = []Source{{Path: "/mnt/data"}}
	},
	"user-namespace-own-network": func(in *Input) {
		m := []*runtimeapi.IDMapping{{HostId: 131072, Length: 65536}}
		o := &runtimeapi.NamespaceOption{
			Pid:           runtimeapi.NamespaceMode_CONTAINER,
			UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: m, Gids: m},
		}
		in.podContext().NamespaceOptions = o
		in.context().NamespaceOptions = o
		in.Namespaces.User = "/run/sampan/pods/a/ns/user"
		in.Container.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/etc-hosts", UidMappings: m, GidMappings: m},
			{ContainerPath: "/models", Image: &runtimeapi.ImageSpec{Image: "sha256:5678"}, UidMappings: m, GidMappings: m},
		}
		in.Sources = []Source{{Path: "/var/lib/kubelet/etc-hosts"}, {Path: "/run/sampan/images/m"}}
	},
}

func TestGolden(t *testing.T) {
	for name, edit := range goldens {
		t.Run(name, func(t *testing.T) {
			in := testInput()
			edit(&in)
			checkGolden(t, name, mustBuild(t, in))
		})
	}
	t.Run("init", func(t *testing.T) {
		s, err := BuildInit(testInput(), "/init")
		if err != nil {
			t.Fatal(err)
		}
		checkGolden(t, "init", s)
	})
}

func checkGolden(t *testing.T, name string, s *specs.Spec) {
	t.Helper()
	if s.Linux.Seccomp != nil {
		// The default filter is the library's, and not the same on every
		// machine.
		s.Linux.Seccomp.Syscalls, s.Linux.Seccomp.Architectures = nil, nil
	}
	got, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("the spec differs from %s (rewrite it with -update):\n%s", file, diff)
	}
}

func TestGoldenFilesAreAllUsed(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".json"); goldens[name] == nil && name != "init" {
			t.Errorf("%s belongs to no test", f)
		}
	}
}

// TestPure keeps the package from learning to do I/O.
func TestPure(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range f.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains([]string{"os", "os/exec", "net", "syscall", "time", "math/rand", "math/rand/v2", "log/slog", "sync"}, path) {
				t.Errorf("%s imports %s", file, path)
			}
		}
	}
}

func TestBuildLeavesItsInputAlone(t *testing.T) {
	in := testInput()
	goldens["kubelet"](&in)
	first := mustBuild(t, in)
	// A caller (CDI, NRI) edits what it gets.
	first.Process.Capabilities.Bounding[0] = "CAP_EDITED"
	if first.Process.Capabilities.Effective[0] == "CAP_EDITED" {
		t.Error("editing one capability set changes another")
	}
	first.Process.Args[0] = "edited"
	first.Process.User.AdditionalGids[0] = 4242
	first.Linux.MaskedPaths[0] = "/edited"
	first.Linux.Resources.Unified["edited"] = "1"
	*first.Linux.Resources.CPU.Shares = 4242
	for i := range first.Mounts {
		first.Mounts[i].Options[0] = "edited"
	}

	fresh := testInput()
	goldens["kubelet"](&fresh)
	if diff := cmp.Diff(mustBuild(t, fresh), mustBuild(t, in)); diff != "" {
		t.Errorf("editing one spec changed the next:\n%s", diff)
	}
	hidden := mustBuild(t, testInput())
	hidden.Linux.MaskedPaths[0], hidden.Linux.ReadonlyPaths[0] = "/edited", "/edited"
	if again := mustBuild(t, testInput()); slices.Contains(slices.Concat(again.Linux.MaskedPaths, again.Linux.ReadonlyPaths), "/edited") {
		t.Error("editing a spec changed the default lists")
	}
	if slices.Contains(allCaps, "CAP_EDITED") {
		t.Error("editing a spec changed the host's facts")
	}
}

func BenchmarkBuild(b *testing.B) {
	for _, name := range []string{"default", "kubelet"} {
		b.Run(name, func(b *testing.B) {
			in := testInput()
			goldens[name](&in)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := build(in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
