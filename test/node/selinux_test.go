package node

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// ownLabel is the label of containers that ask for nothing; its part is their level.
var ownLabel = regexp.MustCompile(`^system_u:system_r:container_t:(s0:c\d+,c\d+)$`)

const fileLabel = "system_u:object_r:container_file_t:"

func needSELinux(t *testing.T) *lab.Lab {
	t.Helper()
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
		t.Skip("this machine was booted without SELinux: ", err)
	}
	return newLab(t)
}

// TestSELinuxLabels: processes and mounts of containers have the labels that are
// asked for, and else a level that is their pod's alone.
func TestSELinuxLabels(t *testing.T) {
	l := needSELinux(t)
	pod := l.PodConfig("one")
	podID, id := container(t, l, pod, nil, "sleep", "1000")
	label := processLabel(t, l, id)
	parts := ownLabel.FindStringSubmatch(label)
	if parts == nil {
		t.Fatalf("a container that asks for nothing has the label %q", label)
	}
	level := parts[1]
	t.Log("a container that asks for nothing has the label ", label)
	checkMounts(t, l, id, fileLabel+level, "/", "/dev", "/dev/shm")

	privileged := l.PodConfig("privileged")
	privileged.Linux.SecurityContext.Privileged = true
	privilegedID := l.RunPod(t, privileged)
	host := l.PodConfig("host")
	host.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	hostID := l.RunPod(t, host)
	keepers := l.Keepers(t, "worker")
	if len(keepers) == 0 {
		t.Fatal("no keeper")
	}
	unconfined := strings.TrimRight(read(t, "/proc", strconv.Itoa(keepers[0]), "attr/current"), "\x00")
	t.Log("the keeper has the label ", unconfined)
	all := &runtimeapi.SELinuxOption{User: "system_u", Role: "system_r", Type: "container_other_t", Level: "s0:c1,c2"}
	for _, tt := range []struct {
		name   string
		podID  string
		pod    *runtimeapi.PodSandboxConfig
		change func(*runtimeapi.LinuxContainerSecurityContext)
		want   string
	}{
		{"second", podID, pod, func(*runtimeapi.LinuxContainerSecurityContext) {}, label},
		{"all", podID, pod, func(c *runtimeapi.LinuxContainerSecurityContext) { c.SelinuxOptions = all }, "system_u:system_r:container_other_t:s0:c1,c2"},
		{"type", podID, pod, func(c *runtimeapi.LinuxContainerSecurityContext) {
			c.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "container_other_t"}
		}, "system_u:system_r:container_other_t:" + level},
		{"privileged", privilegedID, privileged, func(c *runtimeapi.LinuxContainerSecurityContext) { c.Privileged = true }, unconfined},
		{"host-network", hostID, host, func(*runtimeapi.LinuxContainerSecurityContext) {}, unconfined},
		{"host-network-asks", hostID, host, func(c *runtimeapi.LinuxContainerSecurityContext) { c.SelinuxOptions = all }, "system_u:system_r:container_other_t:s0:c1,c2"},
	} {
		c := l.ContainerConfig(tt.name, busybox, "sleep", "1000")
		tt.change(c.Linux.SecurityContext)
		id := l.CreateContainer(t, tt.podID, tt.pod, c)
		l.StartContainer(t, id)
		if got := processLabel(t, l, id); got != tt.want {
			t.Errorf("%s has the label %q, want %q", tt.name, got, tt.want)
		}
		if tt.name == "all" {
			checkMounts(t, l, id, fileLabel+"s0:c1,c2", "/", "/dev") // /dev/shm is the pod's
		}
	}

	_, other := container(t, l, l.PodConfig("two"), nil, "sleep", "1000")
	if got := processLabel(t, l, other); got == label || !ownLabel.MatchString(got) {
		t.Errorf("a container of another pod has the label %q", got)
	}
	chosen := l.PodConfig("chosen")
	chosen.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c7,c9"}
	_, id = container(t, l, chosen, nil, "sleep", "1000")
	if got, want := processLabel(t, l, id), "system_u:system_r:container_t:s0:c7,c9"; got != want {
		t.Errorf("in a pod with a level a container has the label %q, want %q", got, want)
	}

	wrong := l.ContainerConfig("wrong", busybox, "true")
	wrong.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "nobody_knows_t"}
	_, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: wrong, SandboxConfig: pod})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a type that is not in the policy: %v", err)
	}
}

// TestSELinuxRelabel: a volume gets the label of the container's files if that is
// asked for, and only then.
func TestSELinuxRelabel(t *testing.T) {
	l := needSELinux(t)
	dir := t.TempDir()
	volumes := map[bool]string{true: filepath.Join(dir, "relabelled"), false: filepath.Join(dir, "as-it-is")}
	before := ""
	for _, v := range volumes {
		if err := os.MkdirAll(filepath.Join(v, "below"), 0o755); err != nil {
			t.Fatal(err)
		}
		before = fileLabelOf(t, v)
	}
	_, id := container(t, l, l.PodConfig("volumes"), func(c *runtimeapi.ContainerConfig) {
		for relabel, v := range volumes {
			c.Mounts = append(c.Mounts, &runtimeapi.Mount{HostPath: v, ContainerPath: "/" + filepath.Base(v), SelinuxRelabel: relabel})
		}
	}, "sh", "-c", "touch /relabelled/below/new && exec sleep 1000")
	parts := ownLabel.FindStringSubmatch(processLabel(t, l, id))
	if parts == nil {
		t.Fatal("the container has no label of its own")
	}
	l.ExecSync(t, id, "ls", "/relabelled/below/new")
	for _, name := range []string{"", "below", "below/new"} {
		if got, want := fileLabelOf(t, filepath.Join(volumes[true], name)), fileLabel+parts[1]; got != want {
			t.Errorf("relabelled/%s has the label %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"", "below"} {
		if got := fileLabelOf(t, filepath.Join(volumes[false], name)); got != before {
			t.Errorf("as-it-is/%s has the label %q, want %q", name, got, before)
		}
	}
}

// TestSELinuxEnforced: where the policy is enforced, a container can use its pod's
// volume, but neither that of another pod nor what is the host's.
func TestSELinuxEnforced(t *testing.T) {
	l := needSELinux(t)
	dir := t.TempDir()
	shared, hosts := filepath.Join(dir, "shared"), filepath.Join(dir, "hosts")
	for _, d := range []string{shared, hosts} {
		if err := os.Mkdir(d, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "secret"), []byte("known\n"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	const enforce = "/sys/fs/selinux/enforce"
	before := read(t, enforce)
	if err := os.WriteFile(enforce, []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(enforce, []byte(before), 0o644); err != nil {
			t.Error(err)
		}
	})
	start := func(name string, relabel bool) string {
		_, id := container(t, l, l.PodConfig(name), func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{
				{HostPath: shared, ContainerPath: "/shared", SelinuxRelabel: relabel}, {HostPath: hosts, ContainerPath: "/hosts"},
			}
		}, "sleep", "1000")
		return id
	}
	owner, other := start("owner", true), start("other", false)
	if r := l.ExecSync(t, owner, "cat", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"); r.GetExitCode() != 0 {
		t.Errorf("what Sampan writes for the pod: %v", r)
	}
	for _, tt := range []struct {
		name, id, path string
		readable       bool
	}{
		{"the pod's own volume", owner, "/shared/secret", true},
		{"the volume of another pod", other, "/shared/secret", false},
		{"the host's files, in the first pod", owner, "/hosts/secret", false},
		{"the host's files, in the second pod", other, "/hosts/secret", false},
	} {
		r := l.ExecSync(t, tt.id, "cat", tt.path)
		if readable := string(r.GetStdout()) == "known\n"; readable != tt.readable {
			t.Errorf("%s can be read: %v, want %v: %v", tt.name, readable, tt.readable, r)
		}
		if !tt.readable && !strings.Contains(string(r.GetStderr()), "Permission denied") {
			t.Errorf("%s: %v", tt.name, r)
		}
	}
}

// processLabel is the label of a container's first process, which those of its execs
// have too.
func processLabel(t *testing.T, l *lab.Lab, id string) string {
	t.Helper()
	first := strings.TrimRight(read(t, "/proc", strconv.Itoa(pid(t, l, id)), "attr/current"), "\x00")
	r := l.ExecSync(t, id, "cat", "/proc/self/attr/current")
	if got := strings.Trim(string(r.GetStdout()), "\x00\n"); got != first {
		t.Errorf("an exec has the label %q, the container's first process %q", got, first)
	}
	return first
}

// checkMounts: file systems of a container have the label of its files.
func checkMounts(t *testing.T, l *lab.Lab, id, want string, places ...string) {
	t.Helper()
	table := read(t, "/proc", strconv.Itoa(pid(t, l, id)), "mountinfo")
	for _, at := range places {
		found := false
		for line := range strings.Lines(table) {
			found = found || strings.Fields(line)[4] == at && strings.Contains(line, `context="`+want+`"`)
		}
		if !found {
			t.Errorf("nothing with the label %s is mounted on %s:\n%s", want, at, table)
		}
	}
}

func fileLabelOf(t *testing.T, path string) string {
	t.Helper()
	var value [512]byte
	n, err := unix.Lgetxattr(path, "security.selinux", value[:])
	if err != nil {
		t.Fatal(&os.PathError{Op: "label of", Path: path, Err: err})
	}
	return strings.TrimRight(string(value[:n]), "\x00")
}
