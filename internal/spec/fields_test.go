package spec

import (
	"maps"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// notForSpec are the fields that neither a spec nor a validation depends on, and
// why. A name stands for all fields below it.
var notForSpec = map[string]string{
	"container.metadata.attempt":                                   "part of the container's name",
	"container.image.annotations":                                  "choose the platform when the image is pulled",
	"container.image.user_specified_image":                         "for the status",
	"container.image.runtime_handler":                              "chooses the image",
	"container.image.image_ref":                                    "for the status",
	"container.mounts.selinux_relabel":                             "done by the caller, before the mount",
	"container.mounts.image.image":                                 "resolved by the caller",
	"container.mounts.image.annotations":                           "as for the container's image",
	"container.mounts.image.user_specified_image":                  "as for the container's image",
	"container.mounts.image.runtime_handler":                       "as for the container's image",
	"container.mounts.image.image_ref":                             "as for the container's image",
	"container.labels":                                             "for lists and the status",
	"container.annotations":                                        "must not influence what a runtime does",
	"container.stdin":                                              "the keeper's",
	"container.stdin_once":                                         "the keeper's",
	"container.linux.security_context.selinux_options":             "become ProcessLabel and MountLabel",
	"container.linux.security_context.namespace_options.target_id": "answered by PIDMode",
	"pod.metadata.attempt":                                         "part of the pod's name",
	"pod.labels":                                                   "for lists and the status",
	"pod.annotations":                                              "must not influence what a runtime does",
	"pod.linux.overhead":                                           "the kubelet sets the pod's cgroup",
	"pod.linux.resources":                                          "the kubelet sets the pod's cgroup",
	"pod.linux.security_context.namespace_options.target_id":       "a pod targets no container",
	"pod.linux.security_context.selinux_options":                   "labels of the pod's own process",
	"pod.linux.security_context.seccomp":                           "for the pod's own process, which may do nothing anyway",
	"pod.linux.security_context.seccomp_profile_path":              "for the pod's own process, which may do nothing anyway",
	"pod.linux.security_context.apparmor":                          "for the pod's own process, which may do nothing anyway",
	"pod.linux.security_context.readonly_rootfs":                   "the root of the pod's own process is read-only anyway",
	"pod.linux.security_context.privileged":                        "allows containers to be privileged",
}

// TestEveryFieldCounts sets each field of a request to something bad or at
// least unusual. If neither an error nor another spec comes of it, nobody looks
// at the field, and it has to be in notForSpec. A field that is new in the CRI
// fails here until somebody has thought about it.
func TestEveryFieldCounts(t *testing.T) {
	counts := make(map[string]bool) // by field, false if nobody looks at it
	for _, mount := range []*runtimeapi.Mount{{ContainerPath: "/mnt", HostPath: "/mnt"}, {ContainerPath: "/mnt", Image: &runtimeapi.ImageSpec{Image: "i"}}} {
		in := fullInput(mount)
		base := mustBuild(t, in)
		check := func(name string, changed Input) {
			if mount.Image == nil && strings.HasPrefix(name, "container.mounts.image.") {
				return // refused for being a second source
			}
			s, err := build(changed)
			counts[name] = counts[name] || err != nil || !cmp.Equal(base, s)
		}
		for _, change := range changes(in.Container.ProtoReflect().Descriptor(), "container", 0) {
			changed := in
			changed.Container = proto.Clone(in.Container).(*runtimeapi.ContainerConfig)
			change.set(changed.Container.ProtoReflect())
			check(change.name, changed)
		}
		for _, change := range changes(in.Pod.ProtoReflect().Descriptor(), "pod", 0) {
			changed := in
			changed.Pod = proto.Clone(in.Pod).(*runtimeapi.PodSandboxConfig)
			change.set(changed.Pod.ProtoReflect())
			check(change.name, changed)
		}
	}

	unused := maps.Clone(notForSpec)
	for name, looked := range counts {
		if looked {
			continue
		}
		reason, ok := reasonFor(name)
		if !ok {
			t.Errorf("nobody looks at %s", name)
		}
		delete(unused, reason)
	}
	for name := range unused {
		t.Errorf("%s is in notForSpec, but it counts or does not exist", name)
	}
}

// fullInput has one of each element, so that a change is of one that is right
// otherwise.
func fullInput(mount *runtimeapi.Mount) Input {
	in := testInput()
	goldens["user-namespace"](&in)
	in.Container.Mounts = []*runtimeapi.Mount{mount}
	in.Sources = []Source{{Path: "/mnt"}}
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/fuse"}}
	in.Devices = map[string][]host.Device{"/dev/fuse": {{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}}
	in.Container.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB"}}
	in.Pod.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80}}
	return in
}

// reasonFor returns the entry of notForSpec that is name or is above it.
func reasonFor(name string) (string, bool) {
	for notForSpec[name] == "" {
		i := strings.LastIndexByte(name, '.')
		if i < 0 {
			return "", false
		}
		name = name[:i]
	}
	return name, true
}

// change sets one field of a message or of a message in it.
type change struct {
	name string
	set  func(protoreflect.Message)
}

// changes lists a change for every field below a message.
func changes(d protoreflect.MessageDescriptor, name string, depth int) []change {
	if depth > 8 {
		return nil // no message of the CRI is as deep
	}
	var list []change
	for i := range d.Fields().Len() {
		fd := d.Fields().Get(i)
		name := name + "." + string(fd.Name())
		if fd.Message() == nil || fd.IsMap() {
			list = append(list, change{name, func(m protoreflect.Message) { setUnusual(m, fd) }})
			continue
		}
		for _, below := range changes(fd.Message(), name, depth+1) {
			list = append(list, change{below.name, func(m protoreflect.Message) { below.set(descend(m, fd)) }})
		}
	}
	return list
}

// descend returns the message in a field, the first one of a list.
func descend(m protoreflect.Message, fd protoreflect.FieldDescriptor) protoreflect.Message {
	if !fd.IsList() {
		return m.Mutable(fd).Message()
	}
	list := m.Mutable(fd).List()
	if list.Len() == 0 {
		return list.AppendMutable().Message()
	}
	return list.Get(0).Message()
}

func setUnusual(m protoreflect.Message, fd protoreflect.FieldDescriptor) {
	switch {
	case fd.IsMap():
		m.Mutable(fd).Map().Set(protoreflect.ValueOfString("\x00").MapKey(), protoreflect.ValueOfString("\x00"))
	case fd.IsList():
		m.Mutable(fd).List().Append(unusual(fd))
	case fd.Kind() == protoreflect.BoolKind:
		m.Set(fd, protoreflect.ValueOfBool(!m.Get(fd).Bool()))
	default:
		m.Set(fd, unusual(fd))
	}
}

func unusual(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("\x00")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0})
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(99)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(math.MinInt64)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(math.MinInt32)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(math.MaxUint64)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(math.MaxUint32)
	}
	panic("the CRI has a kind of field it never had: " + fd.Kind().String())
}
