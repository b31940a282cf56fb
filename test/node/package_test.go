package node

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
)

// TestPackage installs, upgrades, removes and purges the Debian package. Pods live
// through all but the last, which leaves nothing.
func TestPackage(t *testing.T) {
	lab.RequireNode(t)
	files, err := filepath.Glob("../../bin/*.deb")
	if err != nil || len(files) != 1 {
		t.Fatalf("want one package, have %q (%v): make deb", files, err)
	}
	if files[0], err = filepath.Abs(files[0]); err != nil {
		t.Fatal(err)
	}
	// The unit that other tests have left goes before that of the package.
	unit := "/run/systemd/system/" + lab.Unit
	if err := os.RemoveAll(unit + ".d"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(unit); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "daemon-reload")
	before := traces(t)

	sh(t, "dpkg", "--install", files[0])
	first := property(t, lab.Unit, "MainPID")
	sh(t, "sampan", "image", "load", "--builtin")
	sh(t, "sampan", "run", "--name", "web", "-p", "8080:80", "sampan.dev/hello:latest")
	answers(t, "after the installation")

	sh(t, "dpkg", "--install", newer(t, files[0]))
	if now := property(t, lab.Unit, "MainPID"); now == first || now == "0" {
		t.Errorf("after the upgrade the daemon is %s, it was %s", now, first)
	}
	answers(t, "after the upgrade")
	if out := sh(t, "sampan", "pod", "ls"); !strings.Contains(out, "web") {
		t.Errorf("after the upgrade the pods are\n%s", out)
	}

	sh(t, "dpkg", "--remove", "sampan")
	if state := property(t, lab.Unit, "ActiveState"); state != "inactive" {
		t.Errorf("the removed daemon is %s", state)
	}
	answers(t, "after the removal")
	sh(t, "dpkg", "--install", files[0])
	if out := sh(t, "sampan", "pod", "ls"); !strings.Contains(out, "web") {
		t.Errorf("installed again, the pods are\n%s", out)
	}

	sh(t, "dpkg", "--purge", "sampan")
	if left := traces(t); left != before {
		t.Errorf("the purge has left\n%s\nbefore there was\n%s", left, before)
	}
}

// traces is what a node shows of Sampan.
func traces(t *testing.T) string {
	t.Helper()
	return sh(t, "sh", "-c", `ls -d /var/lib/sampan* /run/sampan* /etc/sampan* /run/netns/* /usr/bin/sampan /var/log/pods/* 2>/dev/null | grep -v /var/lib/sampan-test
systemctl list-units --all --plain --no-legend 'sampan[-.]*' | grep -v 'sampan.slice'
ip -brief link | grep sampan
nft list tables | grep sampan
pgrep -fl '/[k]eeper-' # not this shell
grep sampan /proc/mounts | grep -v -e sampan-test -e /payload
true`)
}

func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command("timeout", append([]string{"120", name}, args...)...)
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func answers(t *testing.T, when string) {
	t.Helper()
	var last error
	for range 50 {
		r, err := http.Get("http://127.0.0.1:8080/")
		if err == nil {
			r.Body.Close()
			return
		}
		last = err
		time.Sleep(200 * time.Millisecond)
	}
	t.Errorf("%s the pod does not answer: %v", when, last)
}

// newer makes a package of the next version, with the same files.
func newer(t *testing.T, file string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	sh(t, "dpkg-deb", "--raw-extract", file, dir)
	control := filepath.Join(dir, "DEBIAN", "control")
	sh(t, "sed", "-i", "s/^Version: .*/&.1/", control)
	sh(t, "dpkg-deb", "-Znone", "--build", dir, dir+".deb")
	return dir + ".deb"
}
