package builtin

import (
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// What a field of the runtime spec needs, with all below it. A field that is in
// none of the two lists fails the test: so does one that a new version brings.
var (
	// launched fields are carried out without libcontainer, if unfit finds nothing
	// in their values; see the cases below.
	launched = []string{
		"ociVersion", "hostname", "domainname", "annotations", "root.path", "root.readonly",
		"mounts.destination", "mounts.type", "mounts.source", "mounts.options",
		"process.terminal", "process.consoleSize", "process.user.uid", "process.user.gid", "process.user.umask",
		"process.user.additionalGids", "process.args", "process.env", "process.cwd", "process.capabilities",
		"process.rlimits", "process.apparmorProfile", "process.noNewPrivileges", "process.oomScoreAdj",
		"linux.sysctl", "linux.resources", "linux.cgroupsPath", "linux.namespaces", "linux.devices",
		"linux.rootfsPropagation", "linux.maskedPaths", "linux.readonlyPaths",
		"linux.seccomp.defaultAction", "linux.seccomp.defaultErrnoRet", "linux.seccomp.architectures",
		"linux.seccomp.flags", "linux.seccomp.syscalls",
	}
	// left fields are left to libcontainer as soon as they are set.
	left = []string{
		"hooks", "solaris", "windows", "vm", "zos", "freebsd",
		"mounts.uidMappings", "mounts.gidMappings",
		"process.user.username", "process.commandLine", "process.selinuxLabel",
		"process.scheduler", "process.ioPriority", "process.execCPUAffinity",
		"linux.uidMappings", "linux.gidMappings", "linux.netDevices", "linux.mountLabel", "linux.intelRdt",
		"linux.memoryPolicy", "linux.personality", "linux.timeOffsets",
		"linux.seccomp.listenerPath", "linux.seccomp.listenerMetadata",
	}
)

// plainSpec has nothing that does not fit.
func plainSpec() *specs.Spec {
	return &specs.Spec{
		Root:    &specs.Root{},
		Process: &specs.Process{Args: []string{"true"}, Cwd: "/"},
		Mounts:  []specs.Mount{{Destination: "/tmp", Type: "tmpfs"}},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}},
			Seccomp:    &specs.LinuxSeccomp{DefaultAction: specs.ActAllow},
		},
	}
}

func TestEveryFieldIsKnown(t *testing.T) {
	if what := unfit(plainSpec()); what != "" {
		t.Fatalf("the plain spec does not fit: %s", what)
	}
	seen := make(map[string]bool)
	walkFields(reflect.TypeFor[specs.Spec](), "", nil, func(path string, index [][]int, typ reflect.Type) (descend bool) {
		seen[path] = true
		switch {
		case contains(launched, path):
			return false
		case contains(left, path):
			spec := plainSpec()
			fill(fieldOf(reflect.ValueOf(spec), index))
			if unfit(spec) == "" {
				t.Errorf("%s is set, and the spec fits", path)
			}
			return false
		}
		if elem(typ).Kind() != reflect.Struct {
			t.Errorf("%s: neither launched nor left to libcontainer", path)
		}
		return true
	})
	for _, path := range append(launched, left...) {
		if !seen[path] {
			t.Errorf("%s: the runtime spec has no such field", path)
		}
	}
}

func contains(list []string, path string) bool {
	for _, p := range list {
		if p == path {
			return true
		}
	}
	return false
}

func elem(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t
}

// walkFields calls fn with every field by its name in JSON.
func walkFields(t reflect.Type, prefix string, index [][]int, fn func(string, [][]int, reflect.Type) bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		path, at := prefix+name, append(index[:len(index):len(index)], []int{i})
		if fn(path, at, f.Type) && elem(f.Type).Kind() == reflect.Struct {
			walkFields(elem(f.Type), path+".", at, fn)
		}
	}
}

// fieldOf returns a field, made with all above it if need be.
func fieldOf(v reflect.Value, index [][]int) reflect.Value {
	for _, i := range index {
		for v.Kind() == reflect.Pointer || v.Kind() == reflect.Slice {
			switch {
			case v.Kind() == reflect.Slice && v.Len() == 0:
				v.Set(reflect.MakeSlice(v.Type(), 1, 1))
				fallthrough
			case v.Kind() == reflect.Slice:
				v = v.Index(0)
			case v.IsNil():
				v.Set(reflect.New(v.Type().Elem()))
				fallthrough
			default:
				v = v.Elem()
			}
		}
		v = v.FieldByIndex(i)
	}
	return v
}

// fill sets a value to something that is not its zero.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.Zero(v.Type().Key()), reflect.Zero(v.Type().Elem()))
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	default:
		v.Set(reflect.ValueOf(1).Convert(v.Type()))
	}
}

func TestUnfitValues(t *testing.T) {
	for name, edit := range map[string]func(*specs.Spec){
		"user namespace": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		},
		"time namespace": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		},
		"new network": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		},
		"cgroup namespace of another": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace, Path: "/proc/1/ns/cgroup"})
		},
		"mount namespace of another": func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/1/ns/mnt" },
		"no mount namespace":         func(s *specs.Spec) { s.Linux.Namespaces = nil },
		"seccomp notify": func(s *specs.Spec) {
			s.Linux.Seccomp.Syscalls = []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}}
		},
		"seccomp flag":           func(s *specs.Spec) { s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_NEW"} },
		"seccomp architecture":   func(s *specs.Spec) { s.Linux.Seccomp.Architectures = []specs.Arch{"SCMP_ARCH_VAX"} },
		"environment without =":  func(s *specs.Spec) { s.Process.Env = []string{"A"} },
		"NUL in a profile":       func(s *specs.Spec) { s.Process.ApparmorProfile = "a\x00b" },
		"NUL in an argument":     func(s *specs.Spec) { s.Process.Args = []string{"a\x00b"} },
		"mount over the root":    func(s *specs.Spec) { s.Mounts[0].Destination = "/a/.." },
		"mount inside /proc":     func(s *specs.Spec) { s.Mounts[0].Destination = "/proc/1" },
		"mount over /proc":       func(s *specs.Spec) { s.Mounts[0].Destination = "/proc/" },
		"relative destination":   func(s *specs.Spec) { s.Mounts[0].Destination = "tmp" },
		"unknown file system":    func(s *specs.Spec) { s.Mounts[0].Type = "nfs" },
		"idmap without mappings": func(s *specs.Spec) { s.Mounts[0].Options = []string{"idmap"} },
		"copy up":                func(s *specs.Spec) { s.Mounts[0].Options = []string{"tmpcopyup"} },
		"sync":                   func(s *specs.Spec) { s.Mounts[0].Options = []string{"sync"} },
	} {
		t.Run(name, func(t *testing.T) {
			spec := plainSpec()
			edit(spec)
			if unfit(spec) != "" {
				return
			}
			spec.Root.Path = "/rootfs"
			config, err := convert("c", "/", spec)
			if err != nil {
				t.Fatal(err)
			}
			if unfitConfig(config) == "" {
				t.Error("it fits")
			}
		})
	}
}
