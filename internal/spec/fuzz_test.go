package spec

import (
	"encoding/json"
	"errors"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// FuzzBuild sends whatever a client can put on the wire: nothing panics, every
// error is a FieldError, and a spec that comes out keeps what a container may
// never get past.
func FuzzBuild(f *testing.F) {
	for _, edit := range goldens {
		in := testInput()
		edit(&in)
		pod, err := proto.Marshal(in.Pod)
		if err != nil {
			f.Fatal(err)
		}
		container, err := proto.Marshal(in.Container)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(pod, container, in.Image.User)
	}
	f.Fuzz(func(t *testing.T, pod, container []byte, imageUser string) {
		in := testInput()
		in.Pod, in.Container = &runtimeapi.PodSandboxConfig{}, &runtimeapi.ContainerConfig{}
		if proto.Unmarshal(pod, in.Pod) != nil || proto.Unmarshal(container, in.Container) != nil {
			t.Skip("not a message")
		}
		in.Image.User = imageUser
		in.Namespaces.PID, in.Namespaces.User = "/proc/1/ns/pid", "/proc/1/ns/user"
		in.SeccompProfile = []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`)
		in.Host.Capabilities = allCaps[:20]
		in.Devices = map[string][]host.Device{}
		for _, m := range in.Container.Mounts {
			in.Sources = append(in.Sources, Source{Path: "/source" + m.GetHostPath(), Shared: true})
		}
		for _, d := range in.Container.Devices {
			in.Devices[d.GetHostPath()] = []host.Device{{Path: d.GetHostPath(), Type: "c", Major: 1, Minor: 3}}
		}

		s, err := build(in)
		if err != nil {
			var field *FieldError
			if !errors.As(err, &field) || field.Field == "" {
				t.Errorf("%v names no field", err)
			}
			return
		}
		checkSpec(t, in, s)
	})
}

func checkSpec(t *testing.T, in Input, s *specs.Spec) {
	t.Helper()
	caps := s.Process.Capabilities
	for _, set := range [][]string{caps.Bounding, caps.Effective, caps.Permitted, caps.Inheritable, caps.Ambient} {
		for _, c := range set {
			if !slices.Contains(in.Host.Capabilities, c) {
				t.Errorf("capability %s is not the host's to give", c)
			}
		}
	}
	for _, m := range s.Mounts {
		if !path.IsAbs(m.Destination) || path.Clean(m.Destination) == "/" {
			t.Errorf("a mount on %q", m.Destination)
		}
	}
	if !path.IsAbs(s.Process.Cwd) || len(s.Process.Args) == 0 || len(s.Process.User.AdditionalGids) == 0 {
		t.Errorf("an incomplete process: %+v", s.Process)
	}
	for _, kv := range s.Process.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.ContainsRune(kv, 0) {
			t.Errorf("environment %q", kv)
		}
	}
	if pod := NamespacesOf(in.Pod); pod.Network && !slices.ContainsFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.NetworkNamespace && ns.Path == in.Namespaces.Network
	}) {
		t.Error("the pod's network is forgotten")
	}

	// The runtime reads the spec from a file: nothing may get lost on the way.
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var again specs.Spec
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	data2, err := json.Marshal(&again)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(data), string(data2)); diff != "" {
		t.Errorf("the spec changes as JSON:\n%s", diff)
	}
	second, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, second); diff != "" {
		t.Errorf("the same input gives another spec:\n%s", diff)
	}
	if !proto.Equal(ContainerUser(s), ContainerUser(&again)) {
		t.Error("the status' user differs from the spec's")
	}
}
