package spec

import (
	"encoding/json"
	"errors"
	"maps"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// FuzzBuild sends what a client can put on the wire: nothing panics, every
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
		checkInput(t, in)
	})
}

// FuzzBuildFields changes a few fields of a good request to values that are
// good, odd or bad for them: nearer to what clients get wrong than bytes are.
func FuzzBuildFields(f *testing.F) {
	for seed := range uint64(32) {
		f.Add(seed)
	}
	names := slices.Sorted(maps.Keys(goldens))
	f.Fuzz(func(t *testing.T, seed uint64) {
		in := testInput()
		random := rand.New(rand.NewPCG(seed, 0))
		goldens[names[random.IntN(len(names))]](&in)
		for range 1 + random.IntN(4) {
			changeField(random, in.Container.ProtoReflect())
		}
		if random.IntN(2) == 0 {
			changeField(random, in.Pod.ProtoReflect())
		}
		checkInput(t, in)
	})
}

var (
	oddStrings = []string{"", "/", "/a", "/a/b", "a/../../b", "..", "root", "web", "1000", "-1", "ALL", "NET_ADMIN", "localhost//p", "runtime/default", "0-3", "rw", "noexec", "a\nb", "a\x00b", "2MB", "net.core.somaxconn", strings.Repeat("/x", 3000)}
	oddNumbers = []int64{0, 1, -1, 2, 3, 7, 80, 999, 1000, 65535, 65536, 1 << 31, 1<<31 - 1, 1<<32 - 1, 1 << 40, math.MaxInt64, math.MinInt64}
)

// changeField sets a random field of m, or of a message in it, to a random
// value.
func changeField(random *rand.Rand, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	if fields.Len() == 0 {
		return
	}
	fd := fields.Get(random.IntN(fields.Len()))
	switch {
	case fd.IsMap():
		m.Mutable(fd).Map().Set(protoreflect.ValueOfString(oddStrings[random.IntN(len(oddStrings))]).MapKey(), randomValue(random, m, fd.MapValue()))
	case fd.IsList() && fd.Message() != nil:
		changeField(random, m.Mutable(fd).List().AppendMutable().Message())
	case fd.IsList():
		m.Mutable(fd).List().Append(randomValue(random, m, fd))
	case fd.Message() != nil && random.IntN(8) == 0:
		m.Clear(fd)
	case fd.Message() != nil:
		changeField(random, m.Mutable(fd).Message())
	default:
		m.Set(fd, randomValue(random, m, fd))
	}
}

func randomValue(random *rand.Rand, m protoreflect.Message, fd protoreflect.FieldDescriptor) protoreflect.Value {
	n := oddNumbers[random.IntN(len(oddNumbers))]
	s := oddStrings[random.IntN(len(oddStrings))]
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(s)
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(s))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(n%2 == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(random.IntN(5)))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(n)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	}
	return m.NewField(fd)
}

// checkInput builds in with an answer to each of the questions it asks of the
// host.
func checkInput(t *testing.T, in Input) {
	t.Helper()
	in.Namespaces.PID, in.Namespaces.User = "/proc/1/ns/pid", "/proc/1/ns/user"
	in.SeccompProfile = []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`)
	in.Host.Capabilities = allCaps[:20]
	in.Sources, in.Devices = nil, map[string][]host.Device{}
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
