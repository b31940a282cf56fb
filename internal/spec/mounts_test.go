package spec

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// mountsAt returns the mounts on a path, in order.
func mountsAt(s *specs.Spec, destination string) []specs.Mount {
	var list []specs.Mount
	for _, m := range s.Mounts {
		if m.Destination == destination {
			list = append(list, m)
		}
	}
	return list
}

func TestMountOptions(t *testing.T) {
	const (
		private = runtimeapi.MountPropagation_PROPAGATION_PRIVATE
		slave   = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		shared  = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	)
	for _, tt := range []struct {
		name  string
		mount *runtimeapi.Mount
		from  Source
		old   bool // a kernel without recursive read-only mounts
		poor  bool // a handler of which nothing is known
		want  []string
		root  string
		err   string
	}{
		{name: "plain", mount: &runtimeapi.Mount{}, want: []string{"rbind", "rprivate", "rw"}},
		{name: "read-only", mount: &runtimeapi.Mount{Readonly: true}, want: []string{"rbind", "rprivate", "ro"}},
		{name: "recursively read-only", mount: &runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true}, want: []string{"rbind", "rprivate", "rro"}},
		{name: "recursively read-only, old kernel", mount: &runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true}, old: true, err: "mounts[0].recursive_read_only: true: RROUnsupported: this kernel cannot"},
		{name: "recursively read-only, poor handler", mount: &runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true}, poor: true, err: "mounts[0].recursive_read_only: true: RROUnsupported: the handler's"},
		{name: "slave of shared", mount: &runtimeapi.Mount{Propagation: slave}, from: Source{Shared: true}, want: []string{"rbind", "rslave", "rw"}, root: "rslave"},
		{name: "slave of slave", mount: &runtimeapi.Mount{Propagation: slave}, from: Source{Slave: true}, want: []string{"rbind", "rslave", "rw"}, root: "rslave"},
		{name: "slave of private", mount: &runtimeapi.Mount{Propagation: slave}, err: "/real is not on a shared or slave mount"},
		{name: "shared", mount: &runtimeapi.Mount{Propagation: shared}, from: Source{Shared: true}, want: []string{"rbind", "rshared", "rw"}, root: "rshared"},
		{name: "shared of slave", mount: &runtimeapi.Mount{Propagation: shared}, from: Source{Slave: true}, err: "/real is not on a shared mount"},
		{name: "private of shared", mount: &runtimeapi.Mount{Propagation: private}, from: Source{Shared: true}, want: []string{"rbind", "rprivate", "rw"}},
		{name: "image", mount: &runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: "i"}}, want: []string{"rbind", "rprivate", "ro", "nosuid", "nodev"}},
		{name: "image of data", mount: &runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: "i"}, MountOptions: []string{"noexec"}}, want: []string{"rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"}},
		{name: "options, poor handler", mount: &runtimeapi.Mount{MountOptions: []string{"noexec"}}, poor: true, want: []string{"rbind", "rprivate", "rw", "noexec"}},
		{name: "late option", mount: &runtimeapi.Mount{MountOptions: []string{"nosymfollow"}}, want: []string{"rbind", "rprivate", "rw", "nosymfollow"}},
		{name: "late option, poor handler", mount: &runtimeapi.Mount{MountOptions: []string{"nosymfollow"}}, poor: true, err: `mounts[0].mount_options: "nosymfollow": the handler's`},
		{name: "options", mount: &runtimeapi.Mount{MountOptions: []string{"noexec", "nodev"}}, want: []string{"rbind", "rprivate", "rw", "noexec", "nodev"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			tt.mount.ContainerPath = "/mnt"
			if tt.mount.Image == nil {
				tt.mount.HostPath = "/link"
			}
			tt.from.Path = "/real"
			in.Container.Mounts, in.Sources = []*runtimeapi.Mount{tt.mount}, []Source{tt.from}
			in.Host.RecursiveReadOnly = !tt.old
			if tt.poor {
				in.Handler = Minimal()
			}
			s, err := build(in)
			if tt.err != "" {
				wantError(t, err, errdefs.ErrFailedPrecondition, tt.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			m := mountsAt(s, "/mnt")
			if len(m) != 1 || m[0].Source != "/real" || !slices.Equal(m[0].Options, tt.want) {
				t.Errorf("got %+v, want options %q from /real", m, tt.want)
			}
			if s.Linux.RootfsPropagation != tt.root {
				t.Errorf("the root's propagation is %q, want %q", s.Linux.RootfsPropagation, tt.root)
			}
		})
	}
}

func TestMountOrder(t *testing.T) {
	in := testInput()
	for _, p := range []string{"/a/b/c", "/a", "/z", "/a/b", "/dev/shm/x"} {
		in.Container.Mounts = append(in.Container.Mounts, &runtimeapi.Mount{ContainerPath: p, HostPath: p})
		in.Sources = append(in.Sources, Source{Path: p})
	}
	s := mustBuild(t, in)
	at := func(p string) int {
		return slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == p })
	}
	for _, pair := range [][2]string{{"/a", "/a/b"}, {"/a/b", "/a/b/c"}, {"/dev", "/dev/shm"}, {"/dev/shm", "/dev/shm/x"}, {"/sys", "/sys/fs/cgroup"}} {
		if at(pair[0]) < 0 || at(pair[0]) >= at(pair[1]) {
			t.Errorf("%s is not mounted before %s", pair[0], pair[1])
		}
	}
}

func TestOwnMountsReplaceGivenOnes(t *testing.T) {
	in := testInput()
	in.Image.Volumes = map[string]struct{}{"/data": {}, "/cache/": {}}
	in.Volumes = map[string]string{"/data": "/vol/data", "/cache": "/vol/cache"}
	for _, p := range []string{"/etc/hosts", "/dev/shm/", "/sys/fs/cgroup", "/data"} {
		in.Container.Mounts = append(in.Container.Mounts, &runtimeapi.Mount{ContainerPath: p, HostPath: "/own" + p})
		in.Sources = append(in.Sources, Source{Path: "/own" + p})
	}
	s := mustBuild(t, in)
	for _, p := range []string{"/etc/hosts", "/dev/shm/", "/sys/fs/cgroup", "/data"} {
		if m := mountsAt(s, p); len(m) != 1 || m[0].Source != "/own"+p {
			t.Errorf("on %s: %+v, want the container's own mount alone", p, m)
		}
	}
	if m := mountsAt(s, "/dev/shm"); len(m) != 0 {
		t.Errorf("the pod's shared memory is mounted as well: %+v", m)
	}
	if m := mountsAt(s, "/cache"); len(m) != 1 || m[0].Source != "/vol/cache" {
		t.Errorf("on /cache: %+v, want the volume", m)
	}
}

func TestImageVolumes(t *testing.T) {
	c := &runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{{ContainerPath: "/var/lib/db/"}}}
	image := ocispec.ImageConfig{Volumes: map[string]struct{}{"/var/lib/db": {}, "data": {}, "/data/": {}, "/": {}, "../etc": {}, "/b": {}}}
	if got, want := ImageVolumes(c, image), []string{"/b", "/data", "/etc"}; !slices.Equal(got, want) {
		t.Errorf("ImageVolumes = %q, want %q", got, want)
	}
}

func TestMissingSource(t *testing.T) {
	in := testInput()
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/mnt", HostPath: "/absent"}}
	_, err := build(in)
	wantError(t, err, errdefs.ErrFailedPrecondition, `mounts[0].host_path: "/absent": what stands at the source is not known`)
}

func TestShmFollowsIPC(t *testing.T) {
	in := testInput()
	in.podContext().NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
	if m := mountsAt(mustBuild(t, in), "/dev/shm"); len(m) != 1 || m[0].Source != "/dev/shm" {
		t.Errorf("with the node's IPC namespace: %+v, want the node's /dev/shm", m)
	}
}

func TestDevices(t *testing.T) {
	in := testInput()
	in.podContext().Privileged, in.context().Privileged = true, true
	in.HostDevices = []host.Device{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/other", ContainerPath: "/dev/fuse", Permissions: "r"}}
	in.Devices = map[string][]host.Device{"/dev/other": {{Path: "/dev/other", Type: "c", Major: 1, Minor: 2}}}
	s := mustBuild(t, in)
	if d := s.Linux.Devices; len(d) != 1 || d[0].Path != "/dev/fuse" || d[0].Major != 1 {
		t.Errorf("devices %+v, want the container's own in place of the host's", d)
	}
	if r := s.Linux.Resources.Devices; len(r) != 2 || !r[0].Allow || r[1].Access != "r" {
		t.Errorf("device rules %+v", r)
	}

	in.Devices = nil
	_, err := build(in)
	wantError(t, err, errdefs.ErrInvalidArgument, `devices[0].host_path: "/dev/other": no device stands there`)
}

// TestMountIDsAreNotForgotten: a runtime that does not know mappings would mount the volume
// without.
func TestMountIDsAreNotForgotten(t *testing.T) {
	in := testInput()
	goldens["user-namespace"](&in)
	in.Handler = Minimal()
	_, err := build(in)
	wantError(t, err, errdefs.ErrFailedPrecondition, "mounts[0].uidMappings: the handler's OCI runtime cannot")
}
