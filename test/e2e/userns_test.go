package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// userNS puts a pod into a user namespace whose root is user first outside.
func userNS(first uint32, pod *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
	ids := []*runtimeapi.IDMapping{{HostId: first, Length: 65536}}
	pod.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	return pod
}

// mapped is a mount as the kubelet makes it in a pod with a user namespace.
func mapped(pod *runtimeapi.PodSandboxConfig, m *runtimeapi.Mount) *runtimeapi.Mount {
	u := pod.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	m.UidMappings, m.GidMappings = u.GetUids(), u.GetGids()
	return m
}

// hasUserNamespaces skips a test if this host has none to give; the daemon must say so too.
func hasUserNamespaces(t *testing.T, l *lab.Lab, handler string) {
	t.Helper()
	r, err := l.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range r.GetRuntimeHandlers() {
		if h.GetName() == handler && !h.GetFeatures().GetUserNamespaces() {
			_, refusal := l.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: userNS(1<<20, l.PodConfig("probe")), RuntimeHandler: handler})
			if probe := lab.ProbeUserNamespaces(t); probe == nil {
				t.Fatalf("the host can, and the daemon says: %v", refusal)
			} else if refusal == nil {
				t.Error("the daemon runs a pod that it says it cannot run")
			} else {
				t.Skipf("probe: %v; the daemon says: %v", probe, refusal)
			}
		}
	}
	if !r.GetFeatures().GetUserNamespacesHostNetwork() {
		t.Error("the daemon does not say that a pod can have a user namespace and the host's network")
	}
}

// script runs commands in a container and returns what they print.
func script(t *testing.T, l *lab.Lab, id, text string) string {
	t.Helper()
	r := l.ExecSync(t, id, "sh", "-c", text)
	if r.GetExitCode() != 0 {
		t.Errorf("%s: exit code %d\n%s", text, r.GetExitCode(), r.GetStderr())
	}
	return string(r.GetStdout())
}

func owner(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestUserNamespace runs pods whose root is nobody outside, side by side with one whose root
// is the host's. Inside, all is as ever: it is root's what is root's in the image and
// on volumes. That stays so when the daemon and the keeper's worker are replaced.
func TestUserNamespace(t *testing.T) {
	t.Run("builtin", func(t *testing.T) { testUserNamespace(t, "", "") })
	t.Run("runc", func(t *testing.T) {
		runc, err := lab.Tool("runc")
		if err != nil {
			t.Fatal(err)
		}
		testUserNamespace(t, "runc", fmt.Sprintf("[handlers.runc]\npath = %q\n", runc))
	})
}

func testUserNamespace(t *testing.T, handler, config string) {
	l := lab.New(t, lab.Options{Config: config})
	hasUserNamespaces(t, l, handler)
	box, data := l.Pull(t, "busybox"), l.Pull(t, "nginx")
	for _, tt := range []struct {
		name  string
		first uint32 // who root is outside; 0 for a pod of the host's users
		edit  func(*runtimeapi.NamespaceOption)
	}{
		{"own-network", 200000, func(o *runtimeapi.NamespaceOption) {}},
		{"host-network", 300000, func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }},
		{"shared-processes", 400000, func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_POD }},
		{"host-users", 0, func(o *runtimeapi.NamespaceOption) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := l.PodConfig(tt.name)
			if tt.first > 0 {
				userNS(tt.first, pod)
			}
			tt.edit(pod.Linux.SecurityContext.NamespaceOptions)
			u := userNSTest{l: l, pod: pod, first: tt.first, box: box, data: data}
			r, err := l.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: pod, RuntimeHandler: handler})
			if err != nil {
				t.Fatal(err)
			}
			u.podID = r.GetPodSandboxId()
			u.makeVolumes(t)
			id := u.run(t, "first")
			u.check(t, id)
			u.checkOutside(t, id)
			l.Kill(t)
			l.Start(t)
			u.check(t, id)
			killKeeper(t, l, "worker")
			u.check(t, id)
			u.check(t, u.run(t, "second"))
			// The other pods stay, to be in each other's way if they can.
		})
	}
	for _, pod := range list(t, l) {
		l.RemovePod(t, pod)
	}
	l.RemoveImage(t, box)
	l.RemoveImage(t, data)
	l.CheckClean(t)
}

func list(t *testing.T, l *lab.Lab) (ids []string) {
	t.Helper()
	r, err := l.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.GetItems() {
		ids = append(ids, p.GetId())
	}
	return ids
}

type userNSTest struct {
	l            *lab.Lab
	pod          *runtimeapi.PodSandboxConfig
	podID        string
	first        uint32
	box, data    string
	volume, tmpf string
}

// makeVolumes makes a volume on disk and one in memory, as the kubelet has them: what is root's
// is for nobody else.
func (u *userNSTest) makeVolumes(t *testing.T) {
	t.Helper()
	base := filepath.Join(t.TempDir(), "volumes")
	u.volume, u.tmpf = filepath.Join(base, "disk"), filepath.Join(base, "memory")
	for _, dir := range []string{u.volume, u.tmpf} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", u.tmpf, "tmpfs", 0, "mode=700,size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(u.tmpf, unix.MNT_DETACH) })
	for _, dir := range []string{u.volume, u.tmpf} {
		for name, uid := range map[string]int{"root": 0, "user": 1000} {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(name+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, uid, uid); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (u *userNSTest) run(t *testing.T, name string) string {
	t.Helper()
	c := u.l.ContainerConfig(name, u.box, "sh", "-c", "echo to-stdout > /dev/stdout; echo to-stderr > /dev/stderr; sleep 600")
	c.Linux.SecurityContext.NamespaceOptions = u.pod.Linux.SecurityContext.NamespaceOptions
	mount := func(m *runtimeapi.Mount) { c.Mounts = append(c.Mounts, mapped(u.pod, m)) }
	mount(&runtimeapi.Mount{ContainerPath: "/disk", HostPath: u.volume})
	mount(&runtimeapi.Mount{ContainerPath: "/memory", HostPath: u.tmpf})
	mount(&runtimeapi.Mount{ContainerPath: "/read-only", HostPath: u.volume, Readonly: true, RecursiveReadOnly: true})
	mount(&runtimeapi.Mount{ContainerPath: "/slave", HostPath: u.volume, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER})
	mount(&runtimeapi.Mount{ContainerPath: "/one-file", HostPath: filepath.Join(u.volume, "root")})
	mount(&runtimeapi.Mount{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: u.data}})
	c.Mounts = append(c.Mounts, &runtimeapi.Mount{ContainerPath: "/host-ids", HostPath: u.volume})
	id := u.l.CreateContainer(t, u.podID, u.pod, c)
	u.l.StartContainer(t, id)
	return id
}

// check looks from inside.
func (u *userNSTest) check(t *testing.T, id string) {
	t.Helper()
	for text, want := range map[string]string{
		"id -u":                                          "0\n",
		"cat /disk/root /memory/root":                    "root\nroot\n",
		"cat /one-file /slave/root":                      "root\nroot\n",
		"stat -c '%u:%g %n' /disk/*":                     "0:0 /disk/root\n1000:1000 /disk/user\n",
		"stat -c '%u:%g %n' /memory/*":                   "0:0 /memory/root\n1000:1000 /memory/user\n",
		"touch /read-only/x 2>/dev/null || echo refused": "refused\n",
		"stat -c '%u:%g' / /bin/busybox /dev/shm":        "0:0\n0:0\n0:0\n",
		"stat -c '%u:%g' /image /image/etc/nginx":        "0:0\n0:0\n",
		"stat -c '%u:%g' /etc/hosts /etc/hostname":       "0:0\n0:0\n",
		"echo x >> /etc/hosts && echo written":           "written\n",
		"touch /dev/shm/x && stat -c %u /dev/shm/x":      "0\n",
		// What the image has can be changed, owned and removed.
		"cp /bin/busybox /bin/b; chown 7:8 /bin/b; stat -c '%u:%g' /bin/b; rm /bin/b": "7:8\n",
		"echo x > /dev/null; head -c 3 /dev/zero | wc -c":                             "3\n",
		"cat /proc/sys/kernel/hostname > /dev/null; ls /sys/class > /dev/null; pwd":   "/\n",
	} {
		if got := script(t, u.l, id, text); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	ids := strings.Fields(script(t, u.l, id, "cat /proc/self/uid_map /proc/self/gid_map"))
	want := []string{"0", "0", "4294967295"}
	if u.first > 0 {
		want = []string{"0", fmt.Sprint(u.first), "65536"}
	}
	if got := strings.Join(ids, " "); got != strings.Join(append(want, want...), " ") {
		t.Errorf("ids of the user namespace: %s, want %v twice", got, want)
	}
	// A mount without ids shows whose the files are outside: nobody's here.
	wantOwner := "0:0"
	if u.first > 0 {
		wantOwner = "65534:65534"
		if got := script(t, u.l, id, "cat /host-ids/root 2>/dev/null || echo refused"); got != "refused\n" {
			t.Errorf("what is the host's root's: %q", got)
		}
	}
	if got := strings.TrimSpace(script(t, u.l, id, "stat -c '%u:%g' /host-ids")); got != wantOwner {
		t.Errorf("what is the host's root's is of %s inside, want %s", got, wantOwner)
	}
}

// checkOutside looks from the host.
func (u *userNSTest) checkOutside(t *testing.T, id string) {
	t.Helper()
	script(t, u.l, id, "touch /disk/new /memory/new; chown 7:8 /memory/new; touch /in-rootfs")
	if got := owner(t, filepath.Join(u.volume, "new")); got != "0:0" {
		t.Errorf("what root makes on a volume is of %s there, want 0:0", got)
	}
	if got := owner(t, filepath.Join(u.tmpf, "new")); got != "7:8" {
		t.Errorf("what is given to 7:8 on a volume is of %s there", got)
	}
	for _, dir := range []string{u.volume, u.tmpf} {
		if err := os.Remove(filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := owner(t, filepath.Join(u.l.Root, "containers", id, "upper", "in-rootfs")), fmt.Sprintf("%d:%d", u.first, u.first); got != want {
		t.Errorf("what root makes in its root file system is of %s on disk, want %s", got, want)
	}
	log, err := os.ReadFile(filepath.Join(u.pod.LogDirectory, "first.log"))
	for _, line := range []string{" stdout F to-stdout\n", " stderr F to-stderr\n"} {
		if !strings.Contains(string(log), line) {
			t.Errorf("the log lacks %q: %q, %v", line, log, err)
		}
	}
}

// TestUserNamespaceRefused: what cannot be is refused, in words that say why, and leaves
// nothing; no file's owner is ever changed to make it work.
func TestUserNamespaceRefused(t *testing.T) {
	l := lab.New(t, lab.Options{Config: "[handlers.old]\npath = \"/bin/false\"\n"})
	hasUserNamespaces(t, l, "")
	box := l.Pull(t, "busybox")
	pod := userNS(200000, l.PodConfig("refused"))
	podID := l.RunPod(t, pod)
	before := l.Mark(t)

	create := func(m *runtimeapi.Mount) error {
		c := l.ContainerConfig("c", box, "true")
		c.Linux.SecurityContext.NamespaceOptions = pod.Linux.SecurityContext.NamespaceOptions
		c.Mounts = []*runtimeapi.Mount{m}
		ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
		defer cancel()
		_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: c, SandboxConfig: pod})
		return err
	}
	for name, tt := range map[string]struct {
		err  error
		says string
	}{
		"a volume that cannot be mapped": {create(mapped(pod, &runtimeapi.Mount{ContainerPath: "/p", HostPath: "/proc/sys"})), "mounts[0].host_path: map ids /proc/sys: invalid argument: its file system cannot"},
		"other ids":                      {create(mapped(userNS(1, l.PodConfig("other")), &runtimeapi.Mount{ContainerPath: "/p", HostPath: "/tmp"})), "mounts[0].uidMappings: they are not those of the pod's"},
		"a handler that cannot": {func() error {
			_, err := l.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: userNS(200000, l.PodConfig("old")), RuntimeHandler: "old"})
			return err
		}(), "namespace_options.userns_options: "},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.says) {
			t.Errorf("%s: %v, want an error that says %q", name, tt.err, tt.says)
		}
	}
	l.CheckSince(t, before)
	l.RemovePod(t, podID)
}

// TestUserNamespaceServes: servers, terminals, streams, sysctls and privileged containers are in a
// pod with a user namespace as in any other.
func TestUserNamespaceServes(t *testing.T) {
	l := lab.New(t, lab.Options{})
	hasUserNamespaces(t, l, "")
	pod := userNS(200000, l.PodConfig("serves"))
	pod.Linux.SecurityContext.Privileged = true
	pod.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80", "fs.mqueue.msg_max": "42"}
	podID := l.RunPod(t, pod)
	run := func(name, image string, edit func(*runtimeapi.ContainerConfig), args ...string) string {
		c := l.ContainerConfig(name, l.Pull(t, image), args...)
		edit(c)
		id := l.CreateContainer(t, podID, pod, c)
		l.StartContainer(t, id)
		return id
	}

	// nginx is root, has workers who are not, and logs to /dev/stdout.
	run("web", "nginx", func(*runtimeapi.ContainerConfig) {})
	if page := get(t, "http://"+podStatus(t, l, podID).GetNetwork().GetIp()); !strings.Contains(page, "Welcome to nginx!") {
		t.Errorf("got %q", page)
	}
	forward := startCrictl(t, l, "port-forward", podID, "18299:80")
	forward.sees("Forwarding from")
	if page := get(t, "http://127.0.0.1:18299"); !strings.Contains(page, "Welcome to nginx!") {
		t.Errorf("over a forwarded port: got %q", page)
	}
	forward.cmd.Process.Signal(syscall.SIGINT)
	forward.ends()
	if log, err := os.ReadFile(filepath.Join(pod.LogDirectory, "web.log")); !strings.Contains(string(log), "GET / HTTP") {
		t.Errorf("nginx's log: %q, %v", log, err)
	}

	id := run("terminal", "busybox", func(c *runtimeapi.ContainerConfig) {
		c.Tty, c.Stdin = true, true
		c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	}, "sh", "-c", "while read x; do eval $x; done")
	testTerminal(t, l, transports[0], id)
	cmd, err := l.CrictlCommand("attach", "-it", id)
	if err != nil {
		t.Fatal(err)
	}
	master, attached := inTerminal(t, cmd, 80, 24)
	time.Sleep(500 * time.Millisecond) // nothing tells when it is attached
	if _, err := master.WriteString("id -u > /dev/tty; stat -c %u $(tty); test -t 0 && echo a-terminal; exit\n"); err != nil {
		t.Fatal(err)
	}
	attached.sees("1000\r\n1000\r\na-terminal\r\n")
	attached.ends()

	id = run("privileged", "busybox", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Privileged = true
	}, "sleep", "600")
	for text, want := range map[string]string{
		"cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/fs/mqueue/msg_max": "1\n80\n42\n",
		"mkdir /m && mount -t tmpfs tmpfs /m && touch /m/x && stat -c %u /m/x && umount /m":                              "0\n",
		"hostname changed && hostname":                          "changed\n",
		"ip link set lo down && ip link set lo up && echo done": "done\n",
		// Privileges end at the pod's border.
		"mknod /n b 8 0 2>/dev/null || echo refused":                                       "refused\n",
		"echo 1 2>/dev/null > /proc/sys/vm/drop_caches || echo refused":                    "refused\n",
		"echo 0 2>/dev/null > /proc/1/oom_score_adj; dmesg -c 2>/dev/null | wc -c":         "0\n",
		"echo x 2>/dev/null > /sys/kernel/mm/transparent_hugepage/enabled || echo refused": "refused\n",
	} {
		if got := script(t, l, id, text); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	l.RemovePod(t, podID)
}

// TestUserNamespacePropagation: what the host mounts on a volume arrives in a container with a
// user namespace.
func TestUserNamespacePropagation(t *testing.T) {
	l := lab.New(t, lab.Options{})
	hasUserNamespaces(t, l, "")
	pod := userNS(200000, l.PodConfig("propagation"))
	podID := l.RunPod(t, pod)
	volume := t.TempDir()
	target := filepath.Join(volume, "sub")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	c := l.ContainerConfig("c", l.Pull(t, "busybox"), "sleep", "600")
	c.Mounts = []*runtimeapi.Mount{
		mapped(pod, &runtimeapi.Mount{ContainerPath: "/slave", HostPath: volume, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}),
	}
	id := l.CreateContainer(t, podID, pod, c)
	l.StartContainer(t, id)
	if err := unix.Mount("tmpfs", target, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(target, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(target, "x"), []byte("arrived\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := script(t, l, id, "cat /slave/sub/x"); got != "arrived\n" {
		t.Errorf("in the container: %q", got)
	}
	l.RemovePod(t, podID)
}
