package builtin_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/apparmor"
	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// look tells what a process sees of its container.
const look = `
	echo "== status"; grep -E '^(Name|Umask|Tgid|PPid|TracerPid|Uid|Gid|Groups|NSpid|NSsid|NSpgid|Cap.*|NoNewPrivs|Seccomp.*|Sig(Ign|Blk)|Cpus_allowed_list|Mems_allowed_list):' /proc/self/status
	echo "== environment"; tr '\0' '\n' </proc/self/environ
	echo "== limits"; cat /proc/self/limits
	echo "== mounts"; cut -d' ' -f4- /proc/self/mountinfo | grep -v /sys/fs/cgroup/; grep /sys/fs/cgroup/ /proc/self/mountinfo | cut -d' ' -f4- | sort
	echo "== cgroup"; cat /proc/self/cgroup; cat /proc/self/oom_score_adj
	echo "== profile"; cat /proc/self/attr/apparmor/current || cat /proc/self/attr/current
	echo "== devices"; ls -ln /dev /dev/pts /dev/console 2>&1
	echo "== files"; ls -l /proc/self/fd | wc -l; pwd; hostname; tty; cat /proc/self/comm /proc/self/coredump_filter
	echo "== namespaces"; for n in mnt pid net ipc uts cgroup; do [ /proc/1/ns/$n -ef /proc/self/ns/$n ] && echo "$n of init"; done
	echo "== paths"; ls -ld / /work /tmp /proc/keys /proc/sys /sys /deep 2>&1; cat /proc/keys | wc -c; echo x >/proc/sys/kernel/hostname
	echo "== done"
`

// variants are specs that differ in what a start has to do.
var variants = map[string]func(t *testing.T, s *specs.Spec){
	"plain": func(*testing.T, *specs.Spec) {},
	"user": func(_ *testing.T, s *specs.Spec) {
		umask := uint32(0o27)
		s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 70000}, Umask: &umask}
		s.Process.Cwd = "/tmp/made/for/it"
		s.Process.Env = append(s.Process.Env, "A=1", "B=2", "A=3", "HOME=")
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}}
		score := 500
		s.Process.OOMScoreAdj = &score
	},
	"capabilities": func(_ *testing.T, s *specs.Spec) {
		s.Process.NoNewPrivileges = false
		s.Process.User.UID = 7
		s.Process.Capabilities = &specs.LinuxCapabilities{
			Bounding: []string{"CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL", "CAP_OF_TOMORROW"}, Permitted: []string{"CAP_CHOWN", "CAP_NET_RAW"},
			Effective: []string{"CAP_CHOWN"}, Inheritable: []string{"CAP_NET_RAW"}, Ambient: []string{"CAP_NET_RAW"},
		}
	},
	"no capabilities given": func(_ *testing.T, s *specs.Spec) { s.Process.Capabilities = nil },
	"system mounts": func(_ *testing.T, s *specs.Spec) {
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			specs.Mount{Destination: "/tmp/ro", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "size=1m", "noatime"}},
			specs.Mount{Destination: "/tmp/strict", Type: "tmpfs", Source: "x", Options: []string{"strictatime", "nodiratime", "nosymfollow"}},
		)
		s.Root.Readonly = false
		s.Linux.MaskedPaths = []string{"/proc/keys", "/proc/acpi", "/proc/scsi", "/sys/firmware", "/proc/keys", "/no/such", "/proc/timer_list"}
		s.Linux.ReadonlyPaths = []string{"/proc/sys", "/proc/irq", "/proc/bus", "/no/such"}
		s.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1", "kernel.domainname": "example.org"}
		s.Domainname = "example.org"
	},
	"volumes": func(t *testing.T, s *specs.Spec) {
		dir := t.TempDir()
		for _, d := range []string{"plain", "below/mount", "odd"} {
			os.MkdirAll(filepath.Join(dir, d), 0o755)
		}
		os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644)
		os.Symlink("plain", filepath.Join(dir, "link"))
		for target, options := range map[string]uintptr{"below/mount": 0, "odd": unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME} {
			target := filepath.Join(dir, target)
			if err := unix.Mount("tmpfs", target, "tmpfs", options, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
		}
		bind := func(source, destination string, options ...string) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: destination, Type: "bind", Source: filepath.Join(dir, source), Options: append([]string{"rbind"}, options...)})
		}
		bind("plain", "/work", "rprivate", "rw")
		bind("below", "/deep/er", "rprivate", "ro")
		bind("below", "/deep/est", "rslave", "rro")
		bind("below", "/deep/flat", "bind", "ro", "nosuid", "nodev", "noexec")
		bind("odd", "/deep/odd", "rprivate", "rw")
		bind("odd", "/deep/kept")
		bind("odd", "/deep/atime", "relatime", "exec")
		bind("file", "/deep/file", "rprivate", "ro")
		bind("link", "/deep/link", "rshared")
		bind("file", "/proc/uptime", "ro")
		s.Root.Readonly = false
		s.Linux.RootfsPropagation = "rslave"
	},
	"cgroups": func(_ *testing.T, s *specs.Spec) {
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "rw"}})
	},
	"cgroup namespace": func(t *testing.T, s *specs.Spec) {
		if host.CgroupMode() != host.CgroupV2 {
			t.Skip("probe: in cgroup v1 libcontainer makes them")
		}
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}})
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	},
	"devices": func(_ *testing.T, s *specs.Spec) {
		mode, id := os.FileMode(0o640), uint32(12)
		s.Linux.Devices = []specs.LinuxDevice{
			{Path: "/dev/own/zero", Type: "c", Major: 1, Minor: 5, FileMode: &mode, UID: &id, GID: &id},
			{Path: "/dev/pipe", Type: "p"},
			{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
			{Path: "/dev/disk", Type: "b", Major: 259, Minor: 1000},
		}
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	},
	"host namespaces": func(_ *testing.T, s *specs.Spec) {
		s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
		s.Hostname = ""
		s.Linux.ReadonlyPaths = []string{"/proc/sys"}
	},
	"AppArmor": func(t *testing.T, s *specs.Spec) {
		s.Process.ApparmorProfile = loadedProfile(t)
	},
	"AppArmor without no_new_privs": func(t *testing.T, s *specs.Spec) {
		s.Process.ApparmorProfile, s.Process.NoNewPrivileges = loadedProfile(t), false
		s.Process.User.UID = 7
	},
	"seccomp": func(_ *testing.T, s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64},
			Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat", "no_such_call"}, Action: specs.ActErrno}},
		}
	},
}

// loadedProfile is a profile of AppArmor that the kernel has.
func loadedProfile(t *testing.T) string {
	if !host.HasAppArmor() {
		t.Skip("probe: no AppArmor in this kernel")
	}
	a := apparmor.New(apparmor.HostConfig(true, slog.New(slog.NewTextHandler(t.Output(), nil))))
	if _, err := a.Profile(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	return apparmor.DefaultProfile
}

// Names that are different each time.
var (
	own    = regexp.MustCompile(`(?m)c\d+-\d+|conformance-\d+|minor \d+|^(Tgid|NSpid|NSsid|NSpgid|PPid):.*$`)
	times  = regexp.MustCompile(`[A-Z][a-z]{2} [ \d]\d [ \d:]{5}`)
	labels = regexp.MustCompile(`(shared|master|propagate_from):\d+`)
	dirs   = regexp.MustCompile(`/00\d/`)
)

func normal(out string) string {
	for _, r := range []*regexp.Regexp{own, times, labels, dirs} {
		out = r.ReplaceAllStringFunc(out, func(s string) string {
			if name, _, ok := strings.Cut(s, ":"); ok && r == labels {
				return name
			}
			return "~"
		})
	}
	return strings.ReplaceAll(out, "\r\n", "\n")
}

// TestParity: a container is the same whoever has started it, and so is what is
// executed in it.
func TestParity(t *testing.T) {
	lab := conformance.NewLab(t)
	for name, edit := range variants {
		t.Run(name, func(t *testing.T) {
			prepared := func(s *specs.Spec) { edit(t, s) }
			var first, further [2]string
			for i, factory := range []conformance.Factory{newLibcontainer, newLaunching} {
				c := lab.Run(t, factory(t), []string{"sh", "-c", look + "sleep 60"}, prepared)
				c.Expect("== done")
				first[i] = normal(c.Output())
				spec := lab.Spec(c.ID, "sh", "-c", look)
				prepared(spec)
				out, code, err := c.Exec(spec.Process, "")
				if err != nil || code != 0 {
					t.Fatalf("exec: %q, exit code %d, error %v", out, code, err)
				}
				further[i] = normal(out)
				if profile := spec.Process.ApparmorProfile; profile != "" {
					for _, seen := range []string{first[i], further[i]} {
						if !strings.Contains(seen, profile+" (enforce)\n") {
							t.Errorf("it is not confined by %s:\n%s", profile, seen)
						}
					}
				}
				c.Delete()
			}
			if diff := cmp.Diff(strings.Split(first[0], "\n"), strings.Split(first[1], "\n")); diff != "" {
				t.Errorf("the first process, libcontainer's (-) and launched (+):\n%s", diff)
			}
			if diff := cmp.Diff(strings.Split(further[0], "\n"), strings.Split(further[1], "\n")); diff != "" {
				t.Errorf("a further process, libcontainer's (-) and launched (+):\n%s", diff)
			}
		})
	}
}

// lockedAtStart is the limit before anything has changed it.
var lockedAtStart = func() (l unix.Rlimit) {
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		panic(err)
	}
	return l
}()

// TestLockedMemory: what a library does to this process' limit of locked memory
// shows in no container.
func TestLockedMemory(t *testing.T) {
	lab := conformance.NewLab(t)
	for name, factory := range map[string]conformance.Factory{"libcontainer": newLibcontainer, "launched": newLaunching} {
		t.Run(name, func(t *testing.T) {
			runtime := factory(t)
			var now unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &now); err != nil {
				t.Fatal(err)
			}
			// To raise it takes more than a test may have.
			if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 4096, Max: now.Max}); err != nil {
				t.Fatal(err)
			}
			defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &now)
			start := lockedAtStart
			shown := func(soft uint64) string {
				if soft == unix.RLIM_INFINITY {
					return "unlimited\n"
				}
				return fmt.Sprintf("%d\n", soft/1024)
			}
			given := []specs.POSIXRlimit{{Type: "RLIMIT_MEMLOCK", Soft: 8192, Hard: 8192}}
			c := lab.Run(t, runtime, []string{"sh", "-c", "ulimit -l; sleep 60"})
			defer c.Delete()
			c.Expect(shown(start.Cur))
			p := c.Process("sh", "-c", "ulimit -l")
			if out, _, err := c.Exec(p, ""); err != nil || out != shown(start.Cur) {
				t.Errorf("exec: %q, error %v; want %q", out, err, shown(start.Cur))
			}
			p.Rlimits = given
			if out, _, err := c.Exec(p, ""); err != nil || out != shown(8192) {
				t.Errorf("exec with a limit: %q, error %v; want %q", out, err, shown(8192))
			}
		})
	}
}

// TestState: libcontainer can go on with a container that it has not made.
func TestState(t *testing.T) {
	lab := conformance.NewLab(t)
	var states [2]map[string]any
	for i, factory := range []conformance.Factory{newLibcontainer, newLaunching} {
		c := lab.Create(t, factory(t), []string{"sleep", "60"}, func(s *specs.Spec) { variants["user"](t, s); variants["seccomp"](t, s) })
		data, err := os.ReadFile(filepath.Join(c.StateDir, c.ID, "state.json"))
		if err != nil {
			t.Fatal(err)
		}
		pid := fmt.Sprintf("%d", c.Started.Pid)
		if err := json.Unmarshal([]byte(normal(strings.ReplaceAll(string(data), pid, "PID"))), &states[i]); err != nil {
			if err := json.Unmarshal([]byte(normal(strings.ReplaceAll(string(data), pid, "1"))), &states[i]); err != nil {
				t.Fatal(err)
			}
		}
		for _, key := range []string{"created", "init_process_start"} {
			if states[i][key] == nil {
				t.Errorf("no %s", key)
			}
			delete(states[i], key)
		}
		loaded, err := libcontainer.Load(c.StateDir, c.ID)
		if err != nil {
			t.Fatal(err)
		}
		if status, err := loaded.Status(); err != nil || status != libcontainer.Created {
			t.Errorf("status %v, error %v; want created", status, err)
		}
		c.Start()
		if status, err := loaded.Status(); err != nil || status != libcontainer.Running {
			t.Errorf("status %v, error %v; want running", status, err)
		}
		c.Delete()
	}
	if diff := cmp.Diff(states[0], states[1]); diff != "" {
		t.Errorf("state.json, libcontainer's (-) and ours (+):\n%s", diff)
	}
}

// TestTakeOver: the two ways go together, as after a change of version.
func TestTakeOver(t *testing.T) {
	lab := conformance.NewLab(t)
	for _, order := range [][2]conformance.Factory{{newLaunching, newLibcontainer}, {newLibcontainer, newLaunching}} {
		c := lab.Create(t, order[0](t), []string{"sh", "-c", "echo started; sleep 60"})
		if err := order[1](t).Start(t.Context(), c.Container); err != nil {
			t.Fatal(err)
		}
		c.Expect("started\n")
		c.UseRuntime(order[1](t))
		out, code, err := c.Exec(c.Process("sh", "-c", "echo hello; exit 3"), "")
		if err != nil || code != 3 || out != "hello\n" {
			t.Errorf("exec: %q, exit code %d, error %v", out, code, err)
		}
		c.Delete()
	}
}
