package apparmor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// fakeHost is a host's AppArmor in a directory. Its parser is a script that does to
// the list of profiles what the real one makes the kernel do.
type fakeHost struct {
	dir string
	*AppArmor
}

func newHost(t *testing.T, parserDoes string) *fakeHost {
	h := &fakeHost{dir: t.TempDir()}
	for _, d := range []string{"kernel", "policies/abi", "attr/apparmor", "proc"} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.write(t, "kernel/profiles", "/usr/bin/man (enforce)\nname with (blanks) (complain)\n")
	h.write(t, "attr/apparmor/current", "unconfined\n")
	h.write(t, "parser", "#!/bin/sh\necho run >>"+h.path("runs")+"\necho \"$@\" >"+h.path("args")+"\ncat >"+h.path("text")+"\n"+parserDoes+"\n")
	h.restart(t)
	return h
}

func (h *fakeHost) restart(t *testing.T) {
	h.AppArmor = New(Config{
		Enabled: true, Kernel: h.path("kernel"), Policies: h.path("policies"), Label: h.path("attr"), Parser: h.path("parser"),
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
}

func (h *fakeHost) path(name string) string { return filepath.Join(h.dir, name) }

func (h *fakeHost) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(h.path(name), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (h *fakeHost) read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(h.path(name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

func (h *fakeHost) runs(t *testing.T) int { return strings.Count(h.read(t, "runs"), "run") }

// loads is what a working parser does: the profile is there.
const loads = `d=$(dirname $0); grep -q '^sampan-default ' $d/kernel/profiles || echo 'sampan-default (enforce)' >>$d/kernel/profiles`

func (h *fakeHost) wantDefault(t *testing.T) {
	t.Helper()
	if name, err := h.Profile(t.Context(), ""); name != DefaultProfile || err != nil {
		t.Errorf("default profile: %q, %v", name, err)
	}
}

func TestDefaultIsLoadedOnDemand(t *testing.T) {
	h := newHost(t, loads)
	if n := h.runs(t); n != 0 {
		t.Errorf("the parser ran %d times before anybody wanted a profile", n)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { h.wantDefault(t) })
	}
	wg.Wait()
	if n := h.runs(t); n != 1 {
		t.Errorf("the parser ran %d times, want once", n)
	}
	if text := h.read(t, "text"); text != profile("", "") {
		t.Errorf("loaded:\n%s", text)
	}
	if args := h.read(t, "args"); !strings.Contains(args, "--replace") {
		t.Errorf("the parser was called with %s", args)
	}
	if err := h.Problem(); err != nil {
		t.Error(err)
	}

	// aa-remove-unknown and the like take it away.
	h.write(t, "kernel/profiles", "")
	h.wantDefault(t)
	// A new version has a new text.
	h.restart(t)
	h.wantDefault(t)
	if n := h.runs(t); n != 3 {
		t.Errorf("the parser ran %d times, want three times", n)
	}
}

func TestTextFitsHost(t *testing.T) {
	h := newHost(t, loads)
	h.write(t, "policies/abi/3.0", "")
	h.write(t, "attr/apparmor/current", "/opt/bin/my daemon//hat (enforce)\n")
	h.wantDefault(t)
	text := h.read(t, "text")
	if !strings.HasPrefix(text, "abi <abi/3.0>,\n") || !strings.Contains(text, `signal (receive) peer="/opt/bin/my daemon//hat",`) {
		t.Errorf("loaded:\n%s", text)
	}
}

func TestNamedProfiles(t *testing.T) {
	h := newHost(t, loads)
	for _, name := range []string{"/usr/bin/man", "name with (blanks)"} {
		if got, err := h.Profile(t.Context(), name); got != name || err != nil {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"man", "/usr/bin/man (enforce)", "name with", "absent"} {
		_, err := h.Profile(t.Context(), name)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), fmt.Sprintf("%q is not loaded", name)) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if n := h.runs(t); n != 0 {
		t.Errorf("the parser ran %d times", n)
	}
}

func TestFailures(t *testing.T) {
	t.Run("no parser", func(t *testing.T) {
		h := newHost(t, loads)
		h.Parser = "no-such-apparmor_parser"
		_, err := h.Profile(t.Context(), "")
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "install the package apparmor") {
			t.Error(err)
		}
		if h.Problem() == nil {
			t.Error("the problem is not told")
		}
	})
	t.Run("no parser, but somebody loaded it", func(t *testing.T) {
		h := newHost(t, loads)
		h.Parser = "no-such-apparmor_parser"
		h.write(t, "kernel/profiles", "sampan-default (enforce)\n")
		h.wantDefault(t)
	})
	t.Run("parser fails", func(t *testing.T) {
		h := newHost(t, "echo syntax error in line 3 >&2; exit 1")
		for range 5 {
			_, err := h.Profile(t.Context(), "")
			if err == nil || !strings.Contains(err.Error(), "syntax error in line 3") {
				t.Error(err)
			}
		}
		if n := h.runs(t); n != 1 {
			t.Errorf("the parser ran %d times in a row, want once", n)
		}
		// After a while it is tried again.
		h.at = time.Now().Add(-retryTime)
		h.write(t, "parser", "#!/bin/sh\n"+loads)
		h.wantDefault(t)
		if err := h.Problem(); err != nil {
			t.Error(err)
		}
	})
	t.Run("parser says it has, the kernel has not", func(t *testing.T) {
		h := newHost(t, "exit 0")
		if _, err := h.Profile(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "is not loaded") {
			t.Error(err)
		}
	})
	t.Run("parser hangs", func(t *testing.T) {
		h := newHost(t, "exec sleep 1000")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := h.Profile(ctx, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("no securityfs", func(t *testing.T) {
		h := newHost(t, loads)
		h.Kernel = h.path("nowhere/apparmor")
		if _, err := h.Profile(t.Context(), "p"); err == nil || !strings.Contains(err.Error(), "mount securityfs on "+h.path("nowhere")) {
			t.Error(err)
		}
	})
	t.Run("no AppArmor", func(t *testing.T) {
		h := newHost(t, loads)
		h.Enabled = false
		for _, name := range []string{"", "/usr/bin/man"} {
			if _, err := h.Profile(t.Context(), name); !errors.Is(err, ErrDisabled) {
				t.Errorf("%q: %v", name, err)
			}
		}
	})
}

func TestUnload(t *testing.T) {
	h := newHost(t, loads)
	removed := func() string { return h.read(t, "kernel/.remove") }
	if err := h.unload(h.path("proc")); err != nil || removed() != "" {
		t.Errorf("never loaded: %v, %q", err, removed())
	}
	h.wantDefault(t)
	if err := os.MkdirAll(h.path("proc/17/attr"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.write(t, "proc/17/attr/current", "sampan-default (enforce)\n")
	if err := h.unload(h.path("proc")); err != nil || removed() != "" {
		t.Errorf("in use: %v, %q", err, removed())
	}
	h.write(t, "proc/17/attr/current", "unconfined\n")
	if err := h.unload(h.path("proc")); err != nil || removed() != DefaultProfile {
		t.Errorf("%v, %q", err, removed())
	}
}

// TestRules: the patterns of the profile deny what they are meant to, no more.
func TestRules(t *testing.T) {
	denied := func(path string) bool {
		for line := range strings.Lines(rules) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "deny" && strings.Contains(f[2], "w") && pattern(f[1]).MatchString(path) {
				return true
			}
		}
		return false
	}
	for _, path := range []string{
		"/proc/sysrq-trigger", "/proc/kcore", "/proc/mtrr", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug",
		"/proc/sys/kernel/sysrq", "/proc/sys/kernel/sem", "/proc/sys/kernel/randomize_va_space", "/proc/sys/kernel/keys/maxkeys", "/proc/sys/vm/panic_on_oom",
		"/proc/sys/net/ipv4/ip_forward", "/proc/sys/fs/binfmt_misc/register", "/proc/irq/1/smp_affinity", "/proc/bus/pci/00", "/proc/fs/xfs/stat",
		"/proc/scsi/scsi", "/proc/sysvipc/shm", "/proc/acpi/wakeup", "/proc/tty/drivers", "/proc/0x/y",
		"/sys/kernel/uevent_helper", "/sys/firmware/efi/efivars/x", "/sys/module/x/parameters/y", "/sys/fs/pstore/x", "/sys/fs/bpf/x", "/sys/fs/cfoo/x", "/sys/block/sda/x",
		"/sys/kernel/security/apparmor/.remove", "/sys/devices/virtual/powercap/intel-rapl/x", "/sys/class/net/eth0/mtu",
	} {
		if !denied(path) {
			t.Errorf("%s can be written", path)
		}
	}
	for _, path := range []string{
		"/proc/1/oom_score_adj", "/proc/17/task/17/comm", "/proc/4711/uid_map", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/shm_rmid_forced",
		"/sys/fs/cgroup/x/memory.max", "/sys/fs/cgroup/cgroup.procs", "/etc/passwd", "/dev/null", "/process/x", "/system/x",
	} {
		if denied(path) {
			t.Errorf("%s cannot be written", path)
		}
	}
}

// pattern makes a regular expression of one of AppArmor's.
func pattern(glob string) *regexp.Regexp {
	var b strings.Builder
	for i := 0; i < len(glob); i++ {
		switch c := glob[i]; {
		case strings.HasPrefix(glob[i:], "/**"): // a directory has more than itself
			b.WriteString("/.+")
			i += 2
		case strings.HasPrefix(glob[i:], "/*"):
			b.WriteString("/[^/]+")
			i++
		case strings.HasPrefix(glob[i:], "**"):
			b.WriteString(".*")
			i++
		case c == '*':
			b.WriteString("[^/]*")
		case c == '[' || c == ']' || c == '^':
			b.WriteByte(c)
		default:
			b.WriteString(regexp.QuoteMeta(string(c)))
		}
	}
	// A set without a slash does not match one.
	return regexp.MustCompile("^" + strings.ReplaceAll(b.String(), "[^", "[^/") + "$")
}

// TestParses has the real parser read the profile, for a kernel that has all it
// mentions.
func TestParses(t *testing.T) {
	path, err := exec.LookPath(parser())
	if err != nil {
		t.Skipf("probe: %v", err)
	}
	for _, label := range []string{"", "/usr/bin/my daemon"} {
		cmd := exec.Command(path, "--skip-kernel-load", "--skip-cache", "--stdout")
		cmd.Stdin = strings.NewReader(profile("", label))
		var complaints strings.Builder
		cmd.Stderr = &complaints
		if out, err := cmd.Output(); err != nil || len(out) == 0 {
			t.Errorf("label %q: %v\n%s", label, err, complaints.String())
		}
	}
}
