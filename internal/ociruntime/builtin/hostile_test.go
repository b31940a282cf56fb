package builtin_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// TestSealed: what a container may see as its program before it executes the
// user's is not the file that the keeper runs from, and cannot be written to
// (CVE-2019-5736).
func TestSealed(t *testing.T) {
	for name, factory := range runtimes {
		t.Run(name, func(t *testing.T) {
			c := conformance.NewLab(t).Create(t, factory(t), []string{"true"})
			var exe, self unix.Stat_t
			var fs unix.Statfs_t
			path := fmt.Sprintf("/proc/%d/exe", c.Started.Pid)
			for _, err := range []error{unix.Stat(path, &exe), unix.Stat("/proc/self/exe", &self), unix.Statfs(path, &fs)} {
				if err != nil {
					t.Fatal(err)
				}
			}
			if exe.Dev == self.Dev {
				t.Error("it is on the same file system as the program itself")
			}
			switch fs.Type {
			case unix.OVERLAYFS_SUPER_MAGIC:
				if fs.Flags&unix.ST_RDONLY == 0 {
					t.Error("the overlay is writable")
				}
			case unix.TMPFS_MAGIC:
				assertSealed(t, path)
			default:
				t.Errorf("it is on a file system of type %#x, neither overlay nor a memfd's", fs.Type)
			}
		})
	}
}

// assertSealed checks that a file in memory cannot be changed by anybody.
func assertSealed(t *testing.T, path string) {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	const all = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if err != nil || seals&all != all {
		t.Errorf("seals %#x, error %v; want %#x", seals, err, all)
	}
	if w, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		if _, err := w.Write([]byte{0}); err == nil {
			t.Error("it can be written to")
		}
		w.Close()
	}
}

// ownRootfs gives a container a root file system that is not shared, for tests that
// prepare traps in it.
func ownRootfs(t *testing.T, spec *specs.Spec) string {
	root := t.TempDir()
	for _, dir := range []string{"proc", "dev", "sys", "tmp", "etc", "work", "bin"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(filepath.Join(root, "bin"), os.DirFS(filepath.Join(spec.Root.Path, "bin"))); err != nil {
		t.Fatal(err)
	}
	spec.Root = &specs.Root{Path: root}
	return root
}

// TestTraps: a root file system, or a volume, that is made so as to have something
// on the host changed or opened. Each is refused, or harmless.
func TestTraps(t *testing.T) {
	for name, trap := range map[string]struct {
		set func(t *testing.T, root string, s *specs.Spec)
		// says is in the error, or empty if the container is to start.
		says string
	}{
		"/proc is a symbolic link (CVE-2019-16884, CVE-2025-52881)": {func(t *testing.T, root string, s *specs.Spec) {
			replace(t, filepath.Join(root, "proc"), "/tmp")
		}, "proc"},
		"a volume is mounted at a link to /proc": {func(t *testing.T, root string, s *specs.Spec) {
			replace(t, filepath.Join(root, "work"), "/proc/self")
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/work/attr", Type: "bind", Source: t.TempDir(), Options: []string{"rbind"}})
		}, "/proc"},
		"a volume is mounted at a link to the root": {func(t *testing.T, root string, s *specs.Spec) {
			replace(t, filepath.Join(root, "work"), "..")
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/work", Type: "bind", Source: t.TempDir(), Options: []string{"rbind"}})
		}, "root"},
		"/dev/null is a symbolic link (CVE-2025-31133)": {func(t *testing.T, root string, s *specs.Spec) {
			s.Mounts = s.Mounts[:1] // no /dev of the container's own
			replace(t, filepath.Join(root, "dev/null"), "/proc/sys/kernel/core_pattern")
		}, "/dev/null"},
		"/dev/null is a file": {func(t *testing.T, root string, s *specs.Spec) {
			s.Mounts = s.Mounts[:1]
			if err := os.WriteFile(filepath.Join(root, "dev/null"), nil, 0o666); err != nil {
				t.Fatal(err)
			}
		}, "null"},
		"/dev/pts is a symbolic link (CVE-2025-52565)": {func(t *testing.T, root string, s *specs.Spec) {
			s.Mounts = s.Mounts[:1]
			replace(t, filepath.Join(root, "dev/pts"), "/proc/self")
			s.Process.Terminal = true
		}, "/dev/pts"},
		"/dev/console is a symbolic link (CVE-2025-52565)": {func(t *testing.T, root string, s *specs.Spec) {
			s.Mounts = append(s.Mounts[:1], s.Mounts[2]) // /dev/pts alone
			replace(t, filepath.Join(root, "dev/console"), "/proc/sys/kernel/core_pattern")
			s.Process.Terminal = true
		}, "/dev/console"},
		"/etc/passwd is a FIFO": {func(t *testing.T, root string, s *specs.Spec) {
			if err := unix.Mkfifo(filepath.Join(root, "etc/passwd"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"/etc/passwd is a link to the host's": {func(t *testing.T, root string, s *specs.Spec) {
			replace(t, filepath.Join(root, "etc/passwd"), "/../../../../../../etc/passwd")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := conformance.NewLab(t).Prepare(t, newLaunching(t), []string{"sh", "-c", "exit 3"}, func(s *specs.Spec) {
				trap.set(t, ownRootfs(t, s), s)
			})
			err := c.Create()
			switch {
			case trap.says == "" && err == nil:
				c.Start()
				if code := c.Wait(); code != 3 {
					t.Errorf("exit code %d", code)
				}
			case trap.says == "" || err == nil || !strings.Contains(err.Error(), trap.says):
				t.Errorf("error %v, want one with %q", err, trap.says)
			}
		})
	}
}

func replace(t *testing.T, path, target string) {
	t.Helper()
	os.Remove(path)
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

// TestNothingLeaks: a working directory or a program below /proc/self/fd would be
// one of the host's, if any descriptor were left open (CVE-2024-21626).
func TestNothingLeaks(t *testing.T) {
	lab := conformance.NewLab(t)
	running := lab.Run(t, newLaunching(t), []string{"sleep", "60"})
	for fd := 3; fd < 24; fd++ {
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		c := lab.Prepare(t, newLaunching(t), []string{"sh", "-c", "ls -l; pwd"}, func(s *specs.Spec) { s.Process.Cwd = path })
		if err := c.Create(); err == nil {
			t.Errorf("created in %s", path)
		}
		p := running.Process("sh", "-c", "ls -l; pwd")
		p.Cwd = path
		if out, _, err := running.Exec(p, ""); err == nil {
			t.Errorf("executed in %s: %s", path, out)
		}
		if out, _, err := running.Exec(running.Process(path), ""); err == nil {
			t.Errorf("executed %s: %s", path, out)
		}
	}
	out, _, err := running.Exec(running.Process("ls", "-l", "/proc/self/fd"), "")
	if err != nil || strings.Count(out, "->") != 3 { // stdio; its own directory is closed again
		t.Errorf("open files: %s, error %v", out, err)
	}
}

// TestTargetsRace: a volume in which another container exchanges a directory for
// a symbolic link, all the time, while mounts are made below it (CVE-2021-30465).
func TestTargetsRace(t *testing.T) {
	lab := conformance.NewLab(t)
	volume, secret := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(volume, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	replace(t, filepath.Join(volume, "b"), "/../../../../../../"+secret)
	stop := make(chan struct{})
	var attacker sync.WaitGroup
	attacker.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, volume+"/a", unix.AT_FDCWD, volume+"/b", unix.RENAME_EXCHANGE)
			}
		}
	})
	defer attacker.Wait()
	defer close(stop)
	var made int
	for range 30 {
		c := lab.Prepare(t, newLaunching(t), []string{"sleep", "60"}, func(s *specs.Spec) {
			s.Root.Readonly = false
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/work", Type: "bind", Source: volume, Options: []string{"rbind"}},
				specs.Mount{Destination: "/work/a/below", Type: "tmpfs", Source: "below"})
		})
		if c.Create() == nil {
			made++
		}
		c.Delete()
	}
	t.Logf("%d of 30 were created", made)
	if entries, err := os.ReadDir(secret); err != nil || len(entries) > 0 {
		t.Errorf("outside of the container there is %v, error %v", entries, err)
	}
}

// TestNotForOthers: in a PID namespace that is shared, a process that is about to
// become a container's tells the others nothing.
func TestNotForOthers(t *testing.T) {
	lab := conformance.NewLab(t)
	rt := newLaunching(t)
	pod := lab.Run(t, rt, []string{"sleep", "60"})
	lab.Create(t, rt, []string{"sleep", "60"}, func(s *specs.Spec) {
		s.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", pod.Started.Pid)
	})
	for _, name := range []string{"fd", "cwd", "root", "exe", "mem", "environ"} {
		out, code, err := pod.Exec(pod.Process("sh", "-c", "for p in /proc/[0-9]*; do grep -q INIT $p/comm && ls -l $p/"+name+" && cat $p/"+name+"; done"), "")
		if err != nil {
			t.Fatal(err)
		}
		if code == 0 && !strings.Contains(out, "denied") {
			t.Errorf("%s of a process that waits: %q", name, out)
		}
	}
}
