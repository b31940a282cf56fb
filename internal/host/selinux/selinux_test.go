package selinux

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// known is what the policy of these tests takes.
var known = regexp.MustCompile(`^(system|other)_u:(system_r:(container|spc|virt)_t|object_r:container(_ro)?_file_t):s0(-s0)?(:c\d+([,.]c\d+)*)?$`)

func newHost() *SELinux {
	return New(Config{
		Process: "system_u:system_r:container_t:s0", File: "system_u:object_r:container_file_t:s0:c1022,c1023",
		Image: "system_u:object_r:container_ro_file_t:s0",
		Check: func(label string) error {
			if !known.MatchString(label) {
				return unix.EINVAL
			}
			return nil
		},
		Protected: []string{"/srv/sampan"},
	})
}

func (s *SELinux) mustPod(t *testing.T, id string, o Options) Labels {
	t.Helper()
	l, err := s.Pod(id, o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLevels(t *testing.T) {
	s := newHost()
	format := regexp.MustCompile(`^system_u:system_r:container_t:(s0:c\d+,c\d+)$`)
	seen := make(map[string]bool)
	for i := range 500 {
		l := s.mustPod(t, fmt.Sprint(i), Options{})
		m := format.FindStringSubmatch(l.Process)
		if m == nil || l.Mount != "system_u:object_r:container_file_t:"+m[1] {
			t.Fatalf("labels %+v", l)
		}
		if seen[m[1]] {
			t.Fatalf("level %s twice", m[1])
		}
		seen[m[1]] = true
	}

	// The next daemon must not give away what pods have.
	next := newHost()
	for level := range seen {
		next.Adopt("pod "+level, Labels{Process: "system_u:system_r:container_t:" + level})
	}
	for i := range 800 {
		if l := next.mustPod(t, fmt.Sprint(i), Options{}); seen[parse(l.Process).level] {
			t.Fatalf("level of %s is another pod's", l.Process)
		}
	}

	s.Release("7")
	s.Release("7")
	if n := len(s.levels); n != 499 {
		t.Errorf("%d levels are kept, want 499", n)
	}
}

func TestNoLevelFree(t *testing.T) {
	s := newHost()
	for a := range categories {
		for b := range a {
			s.levels[fmt.Sprint(a, b)] = fmt.Sprintf("s0:c%d,c%d", b, a)
		}
	}
	if _, err := s.Pod("one too many", Options{}); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	s := newHost()
	pod := s.mustPod(t, "pod", Options{Level: "s0:c1,c2"})
	if want := (Labels{"system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"}); pod != want {
		t.Errorf("pod: %+v, want %+v", pod, want)
	}
	// Two pods that name one level share it.
	if other := s.mustPod(t, "other", Options{Level: "s0:c1,c2"}); other != pod {
		t.Errorf("other: %+v, want %+v", other, pod)
	}
	for _, tt := range []struct {
		name string
		o    Options
		want Labels
	}{
		{"nothing", Options{}, pod},
		{"type", Options{Type: "spc_t"}, Labels{"system_u:system_r:spc_t:s0:c1,c2", pod.Mount}},
		{"level", Options{Level: "s0"}, Labels{"system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"}},
		{"all", Options{"other_u", "system_r", "virt_t", "s0:c4,c5"}, Labels{"other_u:system_r:virt_t:s0:c4,c5", "other_u:object_r:container_file_t:s0:c4,c5"}},
	} {
		if got, err := s.Container(pod, tt.o); err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}
	for _, o := range []Options{{Level: "s0,c4,c5"}, {Type: "no_t"}, {User: "nobody"}, {Role: "r"}, {Level: "s0:c1\",suid"}} {
		if _, err := s.Container(pod, o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
		if _, err := s.Pod("bad", o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, kept := s.levels["bad"]; kept {
		t.Error("a pod that got no labels keeps a level")
	}
	// A pod from before SELinux was switched on.
	if got, err := s.Container(Labels{}, Options{Type: "spc_t"}); err != nil || got != (Labels{}) {
		t.Errorf("container of a pod without labels: %+v, %v", got, err)
	}
}

func TestDisabled(t *testing.T) {
	s := New(Config{})
	if l, err := s.Pod("p", Options{Level: "nonsense"}); err != nil || l != (Labels{}) || s.Enabled() {
		t.Errorf("%+v, %v", l, err)
	}
	if l, err := s.Container(Labels{}, Options{Level: "nonsense"}); err != nil || l != (Labels{}) {
		t.Errorf("%+v, %v", l, err)
	}
}

const wanted = "system_u:object_r:container_file_t:s0:c1,c2"

// labelled skips the test where files cannot have labels; without SELinux too, a
// file system keeps them.
func labelled(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Lsetxattr(dir, attribute, []byte("probe"), 0); err != nil {
		t.Skipf("probe: set %s of %s: %v", attribute, dir, err)
	}
	return dir
}

func labelOf(t *testing.T, path string) string {
	t.Helper()
	var buf [512]byte
	n, err := unix.Lgetxattr(path, attribute, buf[:])
	if err != nil && !errors.Is(err, unix.ENODATA) {
		t.Fatal(err)
	}
	return string(buf[:max(n, 0)])
}

func TestRelabel(t *testing.T) {
	dir := labelled(t)
	outside := filepath.Join(t.TempDir(), "outside")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	volume := filepath.Join(dir, "volume")
	must(os.MkdirAll(filepath.Join(volume, "a/b/c"), 0o755))
	must(os.WriteFile(filepath.Join(volume, "a/file"), nil, 0o644))
	must(os.WriteFile(outside, nil, 0o644))
	must(os.Symlink(outside, filepath.Join(volume, "a/link")))
	must(os.Symlink(filepath.Dir(outside), filepath.Join(volume, "dirlink")))
	must(unix.Mkfifo(filepath.Join(volume, "fifo"), 0o600))
	for i := range batch + 10 {
		must(os.WriteFile(filepath.Join(volume, "a/b/c", fmt.Sprint(i)), nil, 0o644))
	}
	right := filepath.Join(volume, "a/right")
	must(os.WriteFile(right, nil, 0o644))
	must(unix.Lsetxattr(right, attribute, []byte(wanted+"\x00"), 0))
	var before, after unix.Stat_t
	must(unix.Lstat(right, &before))

	s := newHost()
	must(s.Relabel(t.Context(), volume+"/", wanted))
	must(filepath.WalkDir(volume, func(path string, _ os.DirEntry, err error) error {
		if got := labelOf(t, path); strings.TrimSuffix(got, "\x00") != wanted {
			t.Errorf("%s has %q", path, got)
		}
		return err
	}))
	if got := labelOf(t, outside); got != "" {
		t.Errorf("what a link leads to has %q", got)
	}
	if got := labelOf(t, dir); got != "probe" {
		t.Errorf("what is above has %q", got)
	}
	must(unix.Lstat(right, &after))
	if before.Ctim != after.Ctim {
		t.Error("a file that had its label was written to")
	}
	// A single file.
	file := filepath.Join(dir, "single")
	must(os.WriteFile(file, nil, 0o644))
	must(s.Relabel(t.Context(), file, wanted))
	if got := labelOf(t, file); got != wanted {
		t.Errorf("single file has %q", got)
	}
	must(s.Relabel(t.Context(), "/", "")) // nothing is asked for
}

// TestLabelImages: all below gets the label once, and the directory last, so that what
// was interrupted goes on with the next daemon.
func TestLabelImages(t *testing.T) {
	dir := labelled(t)
	file := filepath.Join(dir, "layer", "file")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	s := newHost()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.LabelImages(ctx, dir); !errors.Is(err, context.Canceled) || labelOf(t, dir) != "probe" {
		t.Errorf("interrupted: %v, %q", err, labelOf(t, dir))
	}
	if err := s.LabelImages(t.Context(), dir); err != nil || labelOf(t, dir) != s.cfg.Image || labelOf(t, file) != s.cfg.Image {
		t.Errorf("%v: directory %q, file %q", err, labelOf(t, dir), labelOf(t, file))
	}
	if err := unix.Lsetxattr(file, attribute, []byte("probe"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.LabelImages(t.Context(), dir); err != nil || labelOf(t, file) != "probe" {
		t.Errorf("what was done is done again: %v, %q", err, labelOf(t, file))
	}
	if err := New(Config{}).LabelImages(t.Context(), "/"); err != nil {
		t.Errorf("without SELinux: %v", err)
	}
}

func TestRelabelRefuses(t *testing.T) {
	s := newHost()
	for _, path := range []string{"/", "/etc", "/usr/", "/var/lib/", "/srv/sampan"} {
		if err := s.Relabel(t.Context(), path, wanted); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
	dir := labelled(t)
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Relabel(ctx, dir, wanted); !errors.Is(err, context.Canceled) {
		t.Errorf("late: %v", err)
	}
	if got := labelOf(t, dir); got != "probe" {
		t.Errorf("a directory whose content is not labelled has %q", got)
	}
}

func TestRelabelDeep(t *testing.T) {
	dir := labelled(t)
	wd, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range maxDepth + 5 {
		if err := unix.Mkdirat(int(wd.Fd()), "deeper", 0o755); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Openat(int(wd.Fd()), "deeper", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		wd.Close()
		wd = os.NewFile(uintptr(fd), "deeper")
	}
	wd.Close()
	if err := newHost().Relabel(t.Context(), dir, wanted); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// TestHost: on a host without SELinux, nothing is labelled.
func TestHost(t *testing.T) {
	c, err := HostConfig("/x")
	if _, serr := os.Stat("/sys/fs/selinux/enforce"); serr == nil {
		t.Skipf("probe: SELinux is here: %+v, %v", c, err)
	}
	if New(c).Enabled() || err != nil {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestConfirmed: labels that are named for containers and are not in the policy, as
// on Debian, are not given to any.
func TestConfirmed(t *testing.T) {
	good := newHost().cfg
	if c, err := confirmed(good); err != nil || c.Process != good.Process {
		t.Errorf("%+v, %v", c, err)
	}
	for name, spoil := range map[string]func(*Config){
		"no process":      func(c *Config) { c.Process = "" },
		"unknown image":   func(c *Config) { c.Image = "system_u:object_r:other_t:s0" },
		"no file":         func(c *Config) { c.File = "" },
		"unknown process": func(c *Config) { c.Process = "system_u:system_r:other_t:s0" },
		"unknown file":    func(c *Config) { c.File = "system_u:object_r:other_t:s0" },
	} {
		bad := good
		spoil(&bad)
		if c, err := confirmed(bad); err == nil || New(c).Enabled() {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}
