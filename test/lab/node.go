package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Node is the environment variable that gives this whole machine, which is one
// with systemd and made to be thrown away, to the tests: there are no namespaces
// around them, and the daemon runs as its unit.
const Node = "SAMPAN_TEST_NODE"

// nodeConfig is TOML for the configuration of daemons on a node: tables only.
const nodeConfig = "SAMPAN_TEST_NODE_CONFIG"

// Unit is the daemon's unit on a node.
const Unit = "sampan.service"

// PowerOn is what a test on a node prints when it works and its power may fail.
const PowerOn = "power: at work"

// OnNode tells whether the tests have the machine to themselves.
func OnNode() bool { return os.Getenv(Node) != "" }

// RequireNode skips a test that needs a machine to itself.
func RequireNode(t testing.TB) {
	t.Helper()
	if !OnNode() {
		t.Skipf("%s is not set: `make test-vm` runs this in a virtual machine", Node)
	}
}

// prepareNode finds what the host has brought, and this lab's directory.
func prepareNode() error {
	dir, err := Cache()
	if err != nil {
		return err
	}
	sets, err := filepath.Glob(filepath.Join(dir, "images", "*"))
	if err != nil || len(sets) != 1 {
		return fmt.Errorf("want one set of images, have %q (%v)", sets, err)
	}
	if err := os.MkdirAll("/var/lib/sampan-test", 0o755); err != nil {
		return err
	}
	return setEnv(map[string]string{Images: sets[0], "SAMPAN_LAB_DIR": "/var/lib/sampan-test"})
}

func setEnv(values map[string]string) error {
	for name, value := range values {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

// installUnit installs the unit that packages have, with the lab's binary,
// configuration and environment.
func (l *Lab) installUnit() error {
	root, err := repository()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(root, "packaging", Unit))
	if err != nil {
		return err
	}
	dropIn := fmt.Sprintf("[Service]\nTimeoutStartSec=300\nExecStart=\nExecStart=%s serve --config %s --log-level debug\n", l.Binary, l.config)
	for _, e := range l.env {
		if strings.Contains(e, "_PROXY=") {
			dropIn += "Environment=" + e + "\n"
		}
	}
	dir := "/run/systemd/system/"
	if err := os.MkdirAll(dir+Unit+".d", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(dir+Unit, text, 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(dir+Unit+".d/lab.conf", []byte(dropIn), 0o644); err != nil {
		return err
	}
	return systemctl("daemon-reload")
}

// startUnit starts the daemon's unit, which is started when the daemon answers.
func (l *Lab) startUnit() error {
	if err := l.installUnit(); err != nil {
		return err
	}
	if err := systemctl("start", Unit); err != nil {
		return err
	}
	pid, err := UnitPid()
	l.unitPid = pid
	return err
}

// UnitPid is the pid of the daemon as systemd knows it.
func UnitPid() (int, error) {
	text, err := UnitProperty(Unit, "MainPID")
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(text)
	if err == nil && pid == 0 {
		err = fmt.Errorf("%s has no process", Unit)
	}
	return pid, err
}

// UnitProperty is a property of a unit as systemctl shows it.
func UnitProperty(unit, name string) (string, error) {
	out, err := exec.Command("systemctl", "show", "--value", "--property="+name, unit).Output()
	return strings.TrimSpace(string(out)), err
}

// killUnit kills the daemon so that it stays dead, as New's caller expects.
func (l *Lab) killUnit() error {
	if err := systemctl("kill", "--kill-who=main", "--signal=KILL", Unit); err != nil {
		return err
	}
	l.unitPid = 0
	// systemd starts it again a second later: that is what is stopped.
	if err := systemctl("stop", Unit); err != nil {
		return err
	}
	return systemctl("reset-failed", Unit)
}

func (l *Lab) stopUnit() error {
	l.unitPid = 0
	return systemctl("stop", Unit)
}

func systemctl(args ...string) error {
	cmd := exec.Command("timeout", append([]string{"300", "systemctl"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// journalTail is the end of what the daemon has said.
func journalTail(lines int) string {
	out, err := exec.Command("journalctl", "--no-pager", "--unit="+Unit, "--lines="+strconv.Itoa(lines)).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return "daemon's journal ends:\n" + string(out)
}

// ours are those processes, cgroups and mounts of a node that can be Sampan's.
// A slice stays when its last unit has gone: systemd does not end it.
var (
	ours    = regexp.MustCompile(`^cgroup .*(/sampan[-.]|/kubepods)|^process \d+ \S*/bin/(keeper|init)-|^mount .*(sampan|netns)|^(link|netns|file|nft|element) `)
	notOurs = regexp.MustCompile(`^cgroup .*/(sampan\.service|[^/]*\.slice)$`)
)

// onlyOurs forgets what the rest of the machine does meanwhile.
func (s snapshot) onlyOurs() {
	for line := range s {
		if !ours.MatchString(line) || notOurs.MatchString(line) {
			delete(s, line)
		}
	}
}

// AwaitUnit waits until a property of a unit has a value.
func AwaitUnit(unit, name, want string, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		got, err := UnitProperty(unit, name)
		switch {
		case err == nil && got == want:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("%s of %s is %q after %v, want %q (%v)", name, unit, got, limit, want, err)
		}
	}
}
