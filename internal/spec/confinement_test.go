package spec

//lint:file-ignore SA1019 the deprecated fields are tested as well

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCapabilities(t *testing.T) {
	type list = []string
	without := func(from list, caps ...string) list {
		return slices.DeleteFunc(slices.Clone(from), func(c string) bool { return slices.Contains(caps, c) })
	}
	// The defaults in the order of the kernel's numbers.
	defaults := onHost(defaultCapabilities, allCaps)

	for _, tt := range []struct {
		name               string
		add, drop, ambient list
		privileged         bool
		host               list // nil for all
		want               list
		wantAmbient        list
	}{
		{name: "default", want: defaults},
		{name: "add", add: list{"NET_ADMIN"}, want: onHost(append(list{"CAP_NET_ADMIN"}, defaults...), allCaps)},
		{name: "names in every form", add: list{"cap_net_admin", "CAP_SYS_TIME", "sys_nice"}, want: onHost(append(list{"CAP_NET_ADMIN", "CAP_SYS_TIME", "CAP_SYS_NICE"}, defaults...), allCaps)},
		{name: "drop", drop: list{"NET_RAW", "CAP_CHOWN"}, want: without(defaults, "CAP_NET_RAW", "CAP_CHOWN")},
		{name: "drop what is not there", drop: list{"SYS_ADMIN"}, want: defaults},
		{name: "add all", add: list{"ALL"}, want: allCaps},
		{name: "add all but", add: list{"all"}, drop: list{"SYS_ADMIN"}, want: without(allCaps, "CAP_SYS_ADMIN")},
		{name: "drop all", drop: list{"ALL"}},
		{name: "drop all, add one", add: list{"NET_BIND_SERVICE"}, drop: list{"ALL"}, want: list{"CAP_NET_BIND_SERVICE"}},
		{name: "drop wins over add", add: list{"SYS_TIME"}, drop: list{"SYS_TIME"}, want: defaults},
		{name: "ambient goes to all sets", ambient: list{"NET_BIND_SERVICE"}, drop: list{"ALL"}, want: list{"CAP_NET_BIND_SERVICE"}, wantAmbient: list{"CAP_NET_BIND_SERVICE"}},
		{name: "ambient and added", add: list{"SYS_TIME"}, ambient: list{"SYS_TIME"}, drop: list{"ALL"}, want: list{"CAP_SYS_TIME"}, wantAmbient: list{"CAP_SYS_TIME"}},
		{name: "drop wins over ambient", ambient: list{"SYS_TIME"}, drop: list{"SYS_TIME"}, want: defaults},
		{name: "ambient all", ambient: list{"ALL"}, want: allCaps, wantAmbient: allCaps},
		{name: "privileged", privileged: true, drop: list{"ALL"}, want: allCaps},
		{name: "the host keeps one back", add: list{"ALL"}, host: without(allCaps, "CAP_SYS_RESOURCE"), want: without(allCaps, "CAP_SYS_RESOURCE")},
		{name: "the host lacks what is asked for", add: list{"SYS_RESOURCE"}, host: without(allCaps, "CAP_SYS_RESOURCE"), want: defaults},
		{name: "the host has next to nothing", host: list{"CAP_CHOWN"}, want: list{"CAP_CHOWN"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			in.podContext().Privileged, in.context().Privileged = tt.privileged, tt.privileged
			in.context().Capabilities = &runtimeapi.Capability{AddCapabilities: tt.add, DropCapabilities: tt.drop, AddAmbientCapabilities: tt.ambient}
			if tt.host != nil {
				in.Host.Capabilities = tt.host
			}
			want := &specs.LinuxCapabilities{Bounding: tt.want, Permitted: tt.want, Effective: tt.want, Inheritable: tt.wantAmbient, Ambient: tt.wantAmbient}
			if diff := cmp.Diff(want, mustBuild(t, in).Process.Capabilities); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestUnknownCapability(t *testing.T) {
	in := testInput()
	in.context().Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"NET_RAWW"}}
	_, err := build(in)
	wantError(t, err, errdefs.ErrInvalidArgument, `linux.security_context.capabilities.drop_capabilities: "NET_RAWW": there is no such capability`)
}

func TestSeccomp(t *testing.T) {
	const localhost = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}`
	profile := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	for _, tt := range []struct {
		name       string
		field      *runtimeapi.SecurityProfile
		path       string
		privileged bool
		kernelHas  bool
		want       specs.LinuxSeccompAction // "" for no filter
		file       string
		err        string
		kind       error
	}{
		{name: "nothing is unconfined", kernelHas: true},
		{name: "empty profile is the default", field: &runtimeapi.SecurityProfile{}, kernelHas: true, want: specs.ActErrno},
		{name: "unconfined", field: profile(runtimeapi.SecurityProfile_Unconfined, ""), kernelHas: true},
		{name: "localhost", field: profile(runtimeapi.SecurityProfile_Localhost, "/p.json"), kernelHas: true, want: specs.ActAllow, file: "/p.json"},
		{name: "runtime/default", path: "runtime/default", kernelHas: true, want: specs.ActErrno},
		{name: "docker/default", path: "docker/default", kernelHas: true, want: specs.ActErrno},
		{name: "string unconfined", path: "unconfined", kernelHas: true},
		{name: "string localhost", path: "localhost//p.json", kernelHas: true, want: specs.ActAllow, file: "/p.json"},
		{name: "the field wins", field: profile(runtimeapi.SecurityProfile_Unconfined, ""), path: "runtime/default", kernelHas: true},
		{name: "privileged ignores it", field: profile(runtimeapi.SecurityProfile_Localhost, "/p.json"), privileged: true, kernelHas: true},
		{name: "unconfined needs no kernel", field: profile(runtimeapi.SecurityProfile_Unconfined, "")},

		{name: "a kernel without", field: &runtimeapi.SecurityProfile{}, err: "no seccomp filters", kind: errdefs.ErrFailedPrecondition},
		{name: "localhost without file", field: profile(runtimeapi.SecurityProfile_Localhost, ""), kernelHas: true, err: "needs one", kind: errdefs.ErrInvalidArgument},
		{name: "relative file", field: profile(runtimeapi.SecurityProfile_Localhost, "p.json"), kernelHas: true, err: "not absolute", kind: errdefs.ErrInvalidArgument},
		{name: "relative file by string", path: "localhost/p.json", kernelHas: true, err: "not absolute", kind: errdefs.ErrInvalidArgument},
		{name: "default with file", field: profile(runtimeapi.SecurityProfile_RuntimeDefault, "/p.json"), kernelHas: true, err: "only a profile of type Localhost", kind: errdefs.ErrInvalidArgument},
		{name: "unknown string", path: "/p.json", kernelHas: true, err: "no such kind of profile", kind: errdefs.ErrInvalidArgument},
		{name: "unknown type", field: profile(7, ""), kernelHas: true, err: "no such type", kind: errdefs.ErrInvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			in.podContext().Privileged, in.context().Privileged = tt.privileged, tt.privileged
			in.context().Seccomp, in.context().SeccompProfilePath = tt.field, tt.path
			in.Host.Seccomp = tt.kernelHas
			in.SeccompProfile = []byte(localhost)
			s, err := build(in)
			if tt.err != "" {
				wantError(t, err, tt.kind, tt.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got specs.LinuxSeccompAction
			if s.Linux.Seccomp != nil {
				got = s.Linux.Seccomp.DefaultAction
			}
			if got != tt.want {
				t.Errorf("the filter's default is %q, want %q", got, tt.want)
			}
			if file, err := SeccompFile(in.Container); err != nil || file != tt.file {
				t.Errorf("SeccompFile = %q, %v, want %q", file, err, tt.file)
			}
		})
	}
}

func TestSeccompProfileThatIsNone(t *testing.T) {
	in := testInput()
	in.context().Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/p.json"}
	in.SeccompProfile = []byte("not JSON")
	_, err := build(in)
	wantError(t, err, errdefs.ErrInvalidArgument, `"/p.json": the file is no seccomp profile`)
}

// TestDefaultSeccompFollowsCapabilities: the default filter opens what a
// capability is for.
func TestDefaultSeccompFollowsCapabilities(t *testing.T) {
	in := testInput()
	in.context().Seccomp = &runtimeapi.SecurityProfile{}
	allows := func(syscall string) bool {
		for _, s := range mustBuild(t, in).Linux.Seccomp.Syscalls {
			if s.Action == specs.ActAllow && slices.Contains(s.Names, syscall) {
				return true
			}
		}
		return false
	}
	if allows("mount") {
		t.Error("mount is allowed without CAP_SYS_ADMIN")
	}
	in.context().Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	if !allows("mount") {
		t.Error("mount is not allowed with CAP_SYS_ADMIN")
	}
}

func TestAppArmorProfile(t *testing.T) {
	profile := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	implied, asked := AppArmorRequest{Confined: true}, AppArmorRequest{Confined: true, Asked: true}
	named := AppArmorRequest{Confined: true, Asked: true, Profile: "p"}
	for _, tt := range []struct {
		name       string
		field      *runtimeapi.SecurityProfile
		deprecated string
		privileged bool
		want       AppArmorRequest
	}{
		{name: "nothing is the default", want: implied},
		{name: "default", field: &runtimeapi.SecurityProfile{}, want: asked},
		{name: "unconfined", field: profile(runtimeapi.SecurityProfile_Unconfined, "")},
		{name: "localhost", field: profile(runtimeapi.SecurityProfile_Localhost, "p"), want: named},
		{name: "localhost with prefix", field: profile(runtimeapi.SecurityProfile_Localhost, "localhost/p"), want: named},
		{name: "string", deprecated: "localhost/p", want: named},
		{name: "string default", deprecated: "runtime/default", want: asked},
		{name: "string unconfined", deprecated: "unconfined"},
		{name: "the field wins", field: profile(runtimeapi.SecurityProfile_Localhost, "localhost/p"), deprecated: "localhost/q", want: named},
		{name: "privileged", field: profile(runtimeapi.SecurityProfile_Localhost, "p"), privileged: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			in.podContext().Privileged, in.context().Privileged = tt.privileged, tt.privileged
			in.context().Apparmor, in.context().ApparmorProfile = tt.field, tt.deprecated
			got, err := AppArmorOf(in.Container)
			if err != nil || got != tt.want {
				t.Errorf("%+v, %v, want %+v", got, err, tt.want)
			}
			found := ""
			if tt.want.Confined {
				found = "found"
			}
			in.AppArmorProfile = "found"
			if s := mustBuild(t, in); s.Process.ApparmorProfile != found {
				t.Errorf("spec has %q, want %q", s.Process.ApparmorProfile, found)
			}
			in.Handler.AppArmor = false
			if s, err := build(in); tt.want.Asked {
				wantError(t, err, errdefs.ErrFailedPrecondition, `apparmor: "found": the handler's OCI runtime knows no AppArmor`)
			} else if err != nil || s.Process.ApparmorProfile != "" {
				t.Errorf("handler without AppArmor: %q, %v", s.Process.ApparmorProfile, err)
			}
		})
	}
}

func TestHiddenPaths(t *testing.T) {
	in := testInput()
	s := mustBuild(t, in)
	if !slices.Equal(s.Linux.MaskedPaths, defaultMasked) || !slices.Equal(s.Linux.ReadonlyPaths, defaultReadonly) {
		t.Error("a container that gives no list does not get the defaults")
	}

	in.context().ReadonlyPaths = []string{"/tmp"}
	s = mustBuild(t, in)
	if len(s.Linux.MaskedPaths) != 0 || !slices.Equal(s.Linux.ReadonlyPaths, []string{"/tmp"}) {
		t.Errorf("a container that gives one list gets %q and %q", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}

	in = testInput()
	goldens["user-namespace"](&in)
	if s = mustBuild(t, in); len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) != 0 {
		t.Error("a container in a user namespace cannot be unmasked")
	}
}

func TestSELinuxLabels(t *testing.T) {
	const node = runtimeapi.NamespaceMode_NODE
	asks := func(in *Input) {
		in.context().SelinuxOptions = &runtimeapi.SELinuxOption{Type: "t"}
	}
	for _, tt := range []struct {
		name string
		edit func(*Input)
		want bool // unlabelled
	}{
		{"nothing", func(*Input) {}, false},
		{"asks", asks, false},
		{"privileged", func(in *Input) { in.context().Privileged = true }, true},
		{"privileged asks", func(in *Input) { asks(in); in.context().Privileged = true }, true},
		{"host network", func(in *Input) { in.podContext().NamespaceOptions.Network = node }, true},
		{"host network asks", func(in *Input) { asks(in); in.podContext().NamespaceOptions.Network = node }, false},
		{"host IPC", func(in *Input) { in.podContext().NamespaceOptions.Ipc = node }, true},
		{"host PIDs", func(in *Input) { in.context().NamespaceOptions.Pid = node }, true},
		{"empty options", func(in *Input) {
			in.context().SelinuxOptions = &runtimeapi.SELinuxOption{}
			in.podContext().NamespaceOptions.Network = node
		}, true},
	} {
		in := testInput()
		tt.edit(&in)
		if got := Unlabelled(in.Pod, in.Container); got != tt.want {
			t.Errorf("%s: unlabelled is %v", tt.name, got)
		}
	}

	in := testInput()
	in.ProcessLabel, in.MountLabel = "process", "mount"
	if s := mustBuild(t, in); s.Process.SelinuxLabel != "process" || s.Linux.MountLabel != "mount" {
		t.Errorf("labels %q and %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
	}
	in.Handler.SELinux = false
	if s := mustBuild(t, in); s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" {
		t.Errorf("handler without SELinux: labels %q and %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
	}
	asks(&in)
	_, err := build(in)
	wantError(t, err, errdefs.ErrFailedPrecondition, "the handler's OCI runtime knows no SELinux")
}
