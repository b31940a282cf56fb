package reset

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network/builtin"
)

// TestAll makes one of each thing there is to remove, in a network namespace of
// its own, and one of each that must stay.
func TestAll(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const link = "smpr0"
	dir := t.TempDir()
	target := Target{
		Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"), RemoveNetwork: func() error { return builtin.Remove("", link) }, UnloadProfile: func() error { return nil },
		NetNS: filepath.Join(dir, "netns"), Cgroup: fmt.Sprintf("smp-reset-test-%d", os.Getpid()),
		Keepers: fmt.Sprintf("smp-reset-test-%d.keeper-*", os.Getpid()),
		Marks:   filepath.Join(dir, "logs", "*", ".mark"),
	}
	logs := [...]string{filepath.Join(dir, "logs", "ours"), filepath.Join(dir, "logs", "others")}
	const pod = "0123456789abcdef0123456789abcdef"
	volume := filepath.Join(dir, "volume")
	kept := filepath.Join(volume, "kept")
	mountPoint := filepath.Join(target.State, "containers", "c", "bundle", "rootfs")
	lower, upper, work := filepath.Join(target.Root, "layers", "l"), filepath.Join(target.Root, "upper"), filepath.Join(target.Root, "work")
	for _, d := range []string{volume, mountPoint, filepath.Join(lower, "bin"), upper, work, filepath.Join(target.Root, "pods", pod), target.NetNS, logs[0], logs[1], filepath.Join(target.Root, "bin")} {
		must(t, os.MkdirAll(d, 0o755))
	}
	must(t, os.WriteFile(kept, nil, 0o644))
	must(t, os.WriteFile(filepath.Join(logs[0], ".mark"), nil, 0o644))
	t.Cleanup(func() {
		host.UnmountUnder(dir)
		removeCgroups(target, []string{pod})
	})

	busy := binary(t, filepath.Join(target.Root, "bin", "keeper-1"))
	contained := filepath.Join(lower, "bin", "app")
	must(t, exec.Command("cp", busy, contained).Run())
	must(t, unix.Mount("overlay", mountPoint, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)))
	must(t, os.Mkdir(filepath.Join(mountPoint, "data"), 0o755))
	must(t, unix.Mount(volume, filepath.Join(mountPoint, "data"), "", unix.MS_BIND, ""))
	keeper, other := exec.Command(busy), exec.Command("sleep", "60")
	container := exec.Command("unshare", "--mount", "sh", "-c", "mount --make-rprivate / && cd "+mountPoint+
		" && mkdir -p old proc && pivot_root . old && exec /bin/app")
	for _, c := range []*exec.Cmd{keeper, container, other} {
		must(t, c.Start())
		t.Cleanup(func() {
			if c.ProcessState == nil {
				c.Process.Kill()
				c.Wait()
			}
		})
	}
	for range 500 { // until it has its root
		if mounts, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", container.Process.Pid)); rootIsIn(target.Root, string(mounts)) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if len(cgroups) > 0 {
		for _, name := range []string{target.Cgroup + "-" + pod[:16] + "/a", target.Cgroup + ".keeper-a"} {
			must(t, os.MkdirAll(filepath.Join(filepath.Dir(cgroups[0]), name), 0o755))
		}
	}

	pin, own := filepath.Join(target.NetNS, "sampan-"+pod[:16]), filepath.Join(dir, "own-netns")
	for _, p := range []string{pin, own} {
		must(t, host.Namespaces{Net: p}.Create())
	}
	t.Cleanup(func() { host.Unpin(own) })

	for range 2 { // the second time there is nothing left
		must(t, host.InNetNS(own, func() error {
			for _, name := range []string{link, "smpr0x"} {
				if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil && name != "smpr0x" {
					return err
				}
			}
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			for _, name := range []string{link, "other"} {
				conn.AddTable(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
			}
			if err := conn.Flush(); err != nil {
				return err
			}
			if err := All(t.Context(), target); err != nil {
				return err
			}
			return leftInNetwork(conn)
		}))
	}
	for _, killed := range []*exec.Cmd{keeper, container} {
		if err := killed.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("%s: %v", killed.Path, err)
		}
	}
	for _, path := range []string{target.Root, target.State, pin, logs[0]} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	for _, path := range []string{kept, logs[1]} {
		if _, err := os.Stat(path); err != nil {
			t.Error("removed what is not ours:", err)
		}
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/" + target.Cgroup + "*"); len(left) > 0 {
		t.Error("cgroups are left:", left)
	}
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Error("killed a process that is none of ours")
	}
}

func leftInNetwork(conn *nftables.Conn) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return err
	}
	for _, table := range tables {
		names = append(names, "table "+table.Name)
	}
	if got := strings.Join(names, ", "); got != "lo, smpr0x, table other" {
		return fmt.Errorf("the network has %s", got)
	}
	return nil
}

// binary builds a static program that sleeps.
func binary(t *testing.T, path string) string {
	t.Helper()
	source := filepath.Join(t.TempDir(), "sleep.c")
	must(t, os.WriteFile(source, []byte("#include <unistd.h>\nint main(void) { sleep(60); return 0; }\n"), 0o644))
	if out, err := exec.Command("gcc", "-static", "-o", path, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRemoveTreeKeepsWhatIsMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "disk"), 0o755))
	must(t, unix.Mount("tmpfs", filepath.Join(dir, "disk"), "tmpfs", 0, ""))
	t.Cleanup(func() { host.UnmountUnder(dir) })
	must(t, os.WriteFile(filepath.Join(dir, "disk", "f"), nil, 0o644))
	if err := removeTree(dir); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(filepath.Join(dir, "disk", "f")); err != nil {
		t.Error(err)
	}
	// As ROOT itself it is emptied and stays mounted.
	must(t, removeTree(filepath.Join(dir, "disk")))
	if _, err := os.Stat(filepath.Join(dir, "disk", "f")); err == nil {
		t.Error("the disk was not emptied")
	}
	if points, _ := host.MountPoints(dir); len(points) != 1 {
		t.Errorf("mounted: %v", points)
	}
}
