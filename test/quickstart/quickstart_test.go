// Package quickstart tests what newcomers run first, as they run it: on the
// default paths, with the built binary.
package quickstart

import (
	"bytes"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// TestQuickstart runs the scripts behind `make quickstart`, twice, and `make
// quickstart-down`. What follows the build must take less than 20 seconds.
func TestQuickstart(t *testing.T) {
	lab.Require(t)
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	if binary := os.Getenv(lab.Binary); binary != filepath.Join(root, "bin", "sampan") {
		t.Fatalf("%s is %s; the scripts take the bin/sampan of this tree", lab.Binary, binary)
	}
	// The machine's own directories stay as they are.
	for _, dir := range []string{"/var/lib", "/var/log", "/etc/cni"} {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	before := traces(t)
	t.Cleanup(func() { script(t, root, "quickstart-down") })
	for range 2 {
		start := time.Now()
		out := script(t, root, "quickstart")
		if took := time.Since(start); took > time.Minute {
			t.Errorf("it took %v", took)
		}
		for _, part := range []string{"RuntimeReady: yes", "NetworkReady: yes", "sampan.dev/hello:latest", "Hello from pod hello.", "GET / from", "hello:running", "make quickstart-down"} {
			if !strings.Contains(out, part) {
				t.Fatalf("%q is missing in:\n%s", part, out)
			}
		}
	}
	publish(t, root)
	script(t, root, "quickstart-down")
	script(t, root, "quickstart-down") // nothing to do is no error
	if after := traces(t); !slices.Equal(before, after) {
		t.Errorf("before: %q\nafter: %q", before, after)
	}
}

// publish runs the example that the quickstart ends with.
func publish(t *testing.T, root string) {
	command(t, root, "bin/sampan", "run", "-p", "8080:80", "--name", "web", "sampan.dev/hello:latest")
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{Proxy: nil}}
	var err error
	for range 50 {
		var answer *http.Response
		if answer, err = client.Get("http://127.0.0.1:8080/"); err == nil {
			answer.Body.Close()
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
	command(t, root, "bin/sampan", "pod", "rm", "web")
}

func script(t *testing.T, root, name string) string {
	t.Helper()
	return command(t, root, "scripts/"+name)
}

func command(t *testing.T, root, name string, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(filepath.Join(root, name), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, &out, &out
	// The daemon that stays must not keep the test waiting for its output.
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out.String())
	}
	return out.String()
}

// traces lists what there is of everything that Sampan makes.
func traces(t *testing.T) []string {
	t.Helper()
	var found []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.HasPrefix(strings.Fields(line)[4], os.TempDir()+"/") {
			continue // other tests'
		}
		found = append(found, "mount "+strings.Fields(line)[4])
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		found = append(found, "link "+l.Attrs().Name)
	}
	tables, err := exec.Command("nft", "list", "tables").Output()
	if err != nil {
		t.Fatal(err)
	}
	found = append(found, "tables "+string(tables))
	for _, dir := range []string{"/var/lib", "/var/log", "/run"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			// Directories that others use too may stay.
			if path != "/run/netns" && path != "/var/log/pods" {
				found = append(found, "file "+path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, pattern := range []string{"sampan", "sampan.*", "*/sampan", "*/sampan.*"} {
		cgroups, err := filepath.Glob("/sys/fs/cgroup/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, cgroups...)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if exe, err := os.Readlink(p); err == nil && strings.Contains(exe, "sampan") {
			found = append(found, "process "+exe)
		}
	}
	slices.Sort(found)
	return found
}
