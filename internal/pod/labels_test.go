package pod

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host/selinux"
)

// policy is that of a host with SELinux.
func policy() selinux.Config {
	level := regexp.MustCompile(`:s0:c\d+,c\d+$`)
	return selinux.Config{
		Process: "system_u:system_r:container_t:s0", File: "system_u:object_r:container_file_t:s0",
		Check: func(label string) error {
			if !level.MatchString(label) {
				return unix.EINVAL
			}
			return nil
		},
	}
}

// confined asks for a label: the pods of these tests are on the host's network,
// where only such containers get one.
func confined(name string) *runtimeapi.ContainerConfig {
	c := containerNamed(name)
	c.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "container_t"}
	return c
}

func TestSELinuxLabels(t *testing.T) {
	l := newLab(t)
	l.selinux = policy()
	s := l.start()
	run := func(name string) string {
		t.Helper()
		id, err := s.Run(t.Context(), podNamed(name), "")
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	labels := func(podID string, config *runtimeapi.ContainerConfig) selinux.Labels {
		t.Helper()
		id, err := s.CreateContainer(t.Context(), podID, config)
		if err != nil {
			t.Fatal(err)
		}
		oci := l.spec(s, id)
		if mounted := l.layers.label(s.paths.rootfs(id)); mounted != oci.Linux.MountLabel {
			t.Errorf("the root file system has label %q, the spec %q", mounted, oci.Linux.MountLabel)
		}
		return selinux.Labels{Process: oci.Process.SelinuxLabel, Mount: oci.Linux.MountLabel}
	}
	a, b := run("a"), run("b")
	first := labels(a, confined("1"))
	if !strings.HasPrefix(first.Process, "system_u:system_r:container_t:s0:c") || !strings.HasPrefix(first.Mount, "system_u:object_r:container_file_t:s0:c") {
		t.Errorf("labels: %+v", first)
	}
	if other := labels(b, confined("1")); other == first {
		t.Errorf("two pods have %+v", other)
	}

	// The next daemon goes on with the same.
	s.Close()
	s = l.start()
	if again := labels(a, confined("2")); again != first {
		t.Errorf("after a restart %+v, want %+v", again, first)
	}
	if got := labels(a, containerNamed("host network")); got != (selinux.Labels{Mount: first.Mount}) {
		t.Errorf("on the host's network, not asking: %+v", got)
	}
	privileged := confined("privileged")
	privileged.Linux.SecurityContext.Privileged = true
	if got := labels(a, privileged); got != (selinux.Labels{Mount: first.Mount}) {
		t.Errorf("privileged: %+v", got)
	}

	for _, p := range []bool{false, true} {
		wrong := confined("wrong")
		wrong.Linux.SecurityContext.SelinuxOptions.Level = "s0,c4,c5"
		wrong.Linux.SecurityContext.Privileged = p
		if _, err := s.CreateContainer(t.Context(), a, wrong); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "selinux_options") {
			t.Errorf("wrong level, privileged %v: %v", p, err)
		}
	}
	badPod := podNamed("bad")
	badPod.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "nonsense"}
	if _, err := s.Run(t.Context(), badPod, ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pod with a wrong level: %v", err)
	}
	for _, id := range []string{a, b} {
		if err := s.Remove(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	l.checkEmpty(s)
}

func TestSELinuxRelabel(t *testing.T) {
	l := newLab(t)
	l.selinux = policy()
	s := l.start()
	podID, err := s.Run(t.Context(), podNamed("p"), "")
	if err != nil {
		t.Fatal(err)
	}
	volume := filepath.Join(l.dir, "volume")
	if err := os.MkdirAll(filepath.Join(volume, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Lsetxattr(volume, "security.selinux", []byte("probe"), 0); err != nil {
		t.Skipf("probe: set a label: %v", err)
	}
	labelOf := func(path string) string {
		t.Helper()
		var buf [256]byte
		n, err := unix.Lgetxattr(path, "security.selinux", buf[:])
		if err != nil && !errors.Is(err, unix.ENODATA) {
			t.Fatal(err)
		}
		return string(buf[:max(n, 0)])
	}
	create := func(config *runtimeapi.ContainerConfig, path string) (string, error) {
		config.Mounts = []*runtimeapi.Mount{
			{HostPath: path, ContainerPath: "/v", SelinuxRelabel: true}, {HostPath: l.dir, ContainerPath: "/w"},
		}
		return s.CreateContainer(t.Context(), podID, config)
	}
	unconfined := containerNamed("unconfined")
	if _, err := create(unconfined, volume); err != nil || labelOf(volume) != "probe" {
		t.Errorf("a container that SELinux does not confine: %v, label %q", err, labelOf(volume))
	}
	id, err := create(confined("confined"), volume)
	if err != nil {
		t.Fatal(err)
	}
	want := l.spec(s, id).Linux.MountLabel
	for _, path := range []string{volume, filepath.Join(volume, "dir")} {
		if got := labelOf(path); got != want {
			t.Errorf("%s has %q, want %q", path, got, want)
		}
	}
	if got := labelOf(l.dir); got != "" {
		t.Errorf("a mount that does not ask has %q", got)
	}
	if _, err := create(confined("system"), "/usr"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mounts[0].selinux_relabel") {
		t.Errorf("/usr: %v", err)
	}
	// Files of the pod are its containers'.
	st, err := s.Get(podID)
	if err != nil {
		t.Fatal(err)
	}
	if got := labelOf(filepath.Join(s.paths.podState(st.ID), "hosts")); got != want {
		t.Errorf("/etc/hosts has %q, want %q", got, want)
	}
	if err := s.Remove(t.Context(), podID); err != nil {
		t.Error(err)
	}
	l.checkEmpty(s)
}
