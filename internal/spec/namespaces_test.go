package spec

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

const (
	modePod       = runtimeapi.NamespaceMode_POD
	modeContainer = runtimeapi.NamespaceMode_CONTAINER
	modeNode      = runtimeapi.NamespaceMode_NODE
	modeTarget    = runtimeapi.NamespaceMode_TARGET
)

func TestPIDMode(t *testing.T) {
	for _, tt := range []struct {
		pod, container, want runtimeapi.NamespaceMode
	}{
		{modePod, modePod, modePod},
		{modePod, modeContainer, modeContainer},
		{modePod, modeNode, modeNode},
		{modePod, modeTarget, modeTarget},
		{modeContainer, modeContainer, modeContainer},
		{modeContainer, modePod, modeContainer}, // a container that sets nothing
		{modeContainer, modeTarget, modeTarget},
		{modeNode, modeNode, modeNode},
		{modeNode, modePod, modeNode},
		{modeNode, modeContainer, modeContainer},
	} {
		in := testInput()
		in.podContext().NamespaceOptions.Pid = tt.pod
		in.context().NamespaceOptions = &runtimeapi.NamespaceOption{Pid: tt.container, TargetId: "t"}
		mode, target := PIDMode(in.Pod, in.Container)
		if mode != tt.want {
			t.Errorf("pod %v, container %v: %v, want %v", tt.pod, tt.container, mode, tt.want)
		}
		if (target == "t") != (mode == modeTarget) {
			t.Errorf("pod %v, container %v: target %q", tt.pod, tt.container, target)
		}
	}
	// Neither says anything: the CRI's default is a shared namespace.
	if mode, _ := PIDMode(&runtimeapi.PodSandboxConfig{}, &runtimeapi.ContainerConfig{}); mode != modePod {
		t.Errorf("by default: %v, want POD", mode)
	}
}

func TestNamespacesOf(t *testing.T) {
	mapping := []*runtimeapi.IDMapping{{HostId: 1, Length: 1}}
	for _, tt := range []struct {
		options *runtimeapi.NamespaceOption
		want    PodNamespaces
	}{
		{nil, PodNamespaces{Network: true, IPC: true, UTS: true, PID: true}},
		{&runtimeapi.NamespaceOption{Pid: modeContainer}, PodNamespaces{Network: true, IPC: true, UTS: true}},
		{&runtimeapi.NamespaceOption{Network: modeNode, Pid: modeNode}, PodNamespaces{IPC: true}},
		{&runtimeapi.NamespaceOption{Ipc: modeNode, Pid: modeContainer}, PodNamespaces{Network: true, UTS: true}},
		{&runtimeapi.NamespaceOption{Pid: modeContainer, UsernsOptions: &runtimeapi.UserNamespace{Uids: mapping, Gids: mapping}}, PodNamespaces{Network: true, IPC: true, UTS: true, User: true}},
		{&runtimeapi.NamespaceOption{Pid: modeContainer, UsernsOptions: &runtimeapi.UserNamespace{Mode: modeNode}}, PodNamespaces{Network: true, IPC: true, UTS: true}},
		{&runtimeapi.NamespaceOption{Pid: modeContainer, UsernsOptions: &runtimeapi.UserNamespace{}}, PodNamespaces{Network: true, IPC: true, UTS: true}},
	} {
		pod := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: tt.options}}}
		if got := NamespacesOf(pod); got != tt.want {
			t.Errorf("%v: %+v, want %+v", tt.options, got, tt.want)
		}
	}
}

func TestTargetNamespace(t *testing.T) {
	in := testInput()
	in.context().NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "other"}
	in.Namespaces.PID = "/proc/42/ns/pid"
	in.Host.Cgroup = host.CgroupV1
	want := []specs.LinuxNamespace{
		{Type: specs.MountNamespace},
		{Type: specs.NetworkNamespace, Path: in.Namespaces.Network},
		{Type: specs.IPCNamespace, Path: in.Namespaces.IPC},
		{Type: specs.UTSNamespace, Path: in.Namespaces.UTS},
		{Type: specs.PIDNamespace, Path: "/proc/42/ns/pid"},
	}
	if diff := cmp.Diff(want, mustBuild(t, in).Linux.Namespaces); diff != "" {
		t.Error(diff)
	}
}

// TestNamespaceNeverForgotten: a pod's namespace that is not given must not
// become the host's.
func TestNamespaceNeverForgotten(t *testing.T) {
	for name, forget := range map[string]func(*Input){
		"network": func(in *Input) { in.Namespaces.Network = "" },
		"ipc":     func(in *Input) { in.Namespaces.IPC = "" },
		"uts":     func(in *Input) { in.Namespaces.UTS = "" },
		"pid": func(in *Input) {
			in.podContext().NamespaceOptions.Pid, in.context().NamespaceOptions.Pid = modePod, modePod
		},
		"user": func(in *Input) { goldens["user-namespace"](in); in.Namespaces.User = "" },
	} {
		in := testInput()
		forget(&in)
		_, err := build(in)
		wantError(t, err, errdefs.ErrFailedPrecondition, "namespaces."+name)
	}
}

func TestIDsOutsideTheUserNamespace(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*runtimeapi.LinuxContainerSecurityContext)
		err  string
	}{
		{"user", func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = id64(65536) }, "run_as_user: 65536: the pod's user namespace has 65536 ids"},
		{"group", func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{70000} }, "supplemental_groups: 70000"},
	} {
		in := testInput()
		goldens["user-namespace"](&in)
		tt.edit(in.context())
		_, err := build(in)
		wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
	}
}

// TestSmallUserNamespace: what every container gets exists in a user namespace of a few
// ids too.
func TestSmallUserNamespace(t *testing.T) {
	in := testInput()
	goldens["user-namespace"](&in)
	few := []*runtimeapi.IDMapping{{HostId: 100000, Length: 3}}
	in.podContext().NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Uids: few, Gids: few}
	in.Container.Mounts, in.Sources, in.Group = nil, nil, nil
	s := mustBuild(t, in)
	for _, m := range s.Mounts {
		if m.Destination == "/dev/pts" && slices.Contains(m.Options, "gid=5") {
			t.Errorf("terminals are of group 5: %q", m.Options)
		}
	}
	init, err := BuildInit(in, "/init")
	if err != nil {
		t.Fatal(err)
	}
	if u := init.Process.User; u.UID != 2 || u.GID != 2 {
		t.Errorf("the pod's init is user %d of group %d, want the last there is", u.UID, u.GID)
	}
	if uid, gid := RootOf(in.Pod); uid != 100000 || gid != 100000 {
		t.Errorf("root is user %d of group %d", uid, gid)
	}
	if uid, gid := RootOf(testInput().Pod); uid != 0 || gid != 0 {
		t.Errorf("without a user namespace root is user %d of group %d", uid, gid)
	}
}

// TestImageMountHasNoIDs: an image is mounted with the pod's ids before the spec is made.
func TestImageMountHasNoIDs(t *testing.T) {
	in := testInput()
	goldens["user-namespace"](&in)
	in.Container.Mounts[0].HostPath, in.Container.Mounts[0].Image = "", &runtimeapi.ImageSpec{Image: "i"}
	for _, m := range mustBuild(t, in).Mounts {
		if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
			t.Errorf("%s has mappings", m.Destination)
		}
	}
}
