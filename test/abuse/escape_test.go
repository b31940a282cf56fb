package abuse

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// handlers are the runtimes that each escape is tried with.
var handlers = []string{"builtin", "runc"}

const runcHandler = "[handlers.runc]\npath = \"/usr/sbin/runc\"\n"

// escapee is a pod in which escapes are tried.
type escapee struct {
	*lab.Lab
	image  string
	config *runtimeapi.PodSandboxConfig
	pod    string
	made   int
}

// TestEscapes tries, with each handler, what containers have escaped through in
// other runtimes.
func TestEscapes(t *testing.T) {
	l := lab.New(t, lab.Options{Config: runcHandler})
	image := l.Pull(t, "busybox")
	for _, handler := range handlers {
		for name, escape := range map[string]func(*testing.T, *escapee){
			"program":         writeToProgram,
			"leaks":           findLeaks,
			"image's links":   followImageLinks,
			"racing links":    followRacingLinks,
			"dev of the user": replaceDev,
			"mounts on proc":  mountOverProc,
			"kernel helpers":  callKernelHelpers,
		} {
			t.Run(handler+"/"+name, func(t *testing.T) {
				e := &escapee{Lab: l, image: image, config: l.PodConfig(fmt.Sprintf("%s-%s", handler, strings.NewReplacer(" ", "-", "'", "").Replace(name)))}
				ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
				defer cancel()
				r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: e.config, RuntimeHandler: handler})
				must(t, err)
				e.pod = r.GetPodSandboxId()
				defer l.RemovePod(t, e.pod)
				escape(t, e)
			})
		}
	}
}

// try creates and starts a container, and returns its id, or the error of the
// first step that is refused.
func (e *escapee) try(t *testing.T, edit func(*runtimeapi.ContainerConfig)) (string, error) {
	t.Helper()
	e.made++
	config := e.ContainerConfig(fmt.Sprint("c", e.made), e.image, "sleep", "1000")
	edit(config)
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	r, err := e.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: e.pod, Config: config, SandboxConfig: e.config})
	if err != nil {
		return "", err
	}
	_, err = e.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.GetContainerId()})
	return r.GetContainerId(), err
}

// script runs a shell script as a container of its own until it ends, and returns
// what it printed.
func (e *escapee) script(t *testing.T, script string, edit func(*runtimeapi.ContainerConfig)) string {
	t.Helper()
	id, err := e.try(t, func(c *runtimeapi.ContainerConfig) {
		c.Command, c.Args = []string{"sh", "-c", script}, nil
		if edit != nil {
			edit(c)
		}
	})
	if err != nil {
		return "refused: " + err.Error()
	}
	e.AwaitExit(t, id, 30*time.Second)
	out, err := os.ReadFile(filepath.Join(e.config.GetLogDirectory(), fmt.Sprintf("c%d.log", e.made)))
	must(t, err)
	return string(out)
}

// hostDir is a directory of the host with a file that nobody in a container may
// see or change, unless it is mounted there.
func (e *escapee) hostDir(t *testing.T) (dir string, untouched func()) {
	t.Helper()
	dir = t.TempDir()
	secret := filepath.Join(dir, "secret")
	must(t, os.WriteFile(secret, []byte("of the host"), 0o644))
	return dir, func() {
		t.Helper()
		entries, err := os.ReadDir(dir)
		must(t, err)
		text, err := os.ReadFile(secret)
		must(t, err)
		if len(entries) != 1 || string(text) != "of the host" {
			t.Errorf("the host's directory has been changed: %v, secret %q", entries, text)
		}
	}
}

// What runs in the host's name while a container is made or entered cannot be
// written to through /proc/PID/exe (CVE-2019-5736).
func writeToProgram(t *testing.T, e *escapee) {
	programs := hostPrograms(t, e)
	before := digests(t, programs)
	// Opens whatever others execute, as often as it can, and writes to it
	// when nobody executes it any more.
	id, err := e.try(t, func(c *runtimeapi.ContainerConfig) {
		c.Command, c.Args = []string{"sh", "-c", `
				cp /bin/sh /bin/attacker
				while :; do
					for exe in /proc/[0-9]*/exe; do
						( exec 3<$exe && for i in 1 2 3 4 5; do echo x >/proc/self/fd/3; done ) 2>/dev/null
					done
				done`}, nil
	})
	must(t, err)
	for range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
		// The program that is executed is the attacker's choice, also the runtime's own.
		_, _ = e.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/proc/self/exe", "init"}, Timeout: 2})
		// It may fail: the attacker writes to its own programs as well.
		_, _ = e.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 10})
		cancel()
	}
	other, err := e.try(t, func(*runtimeapi.ContainerConfig) {})
	must(t, err)
	if out := e.ExecSync(t, other, "echo", "well"); string(out.GetStdout()) != "well\n" {
		t.Errorf("exec in another container, after the attack: %v", out)
	}
	if after := digests(t, programs); after != before {
		t.Errorf("a program of the host was changed:\n%s\nwas\n%s", after, before)
	}
}

func hostPrograms(t *testing.T, e *escapee) []string {
	t.Helper()
	programs, err := filepath.Glob(e.Root + "/bin/*")
	must(t, err)
	if len(programs) == 0 {
		t.Fatal("the daemon has unpacked no program")
	}
	return append(programs, "/usr/sbin/runc", os.Getenv(lab.Binary))
}

func digests(t *testing.T, files []string) string {
	t.Helper()
	var b strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		must(t, err)
		fmt.Fprintf(&b, "%x %s\n", sha256.Sum256(data), f)
	}
	return b.String()
}

// A process has no file open but its three, and its working directory is inside
// the container, whatever the configuration says (CVE-2024-21626).
func findLeaks(t *testing.T, e *escapee) {
	// The fourth is what ls reads.
	out := e.script(t, "ls /proc/self/fd | wc -l; cat /proc/self/mountinfo", nil)
	if !strings.Contains(out, "stdout F 4\n") {
		t.Errorf("open files of a container:\n%s", out)
	}
	if strings.Contains(out, e.Root+"/bin") || strings.Contains(out, "/keeper-") {
		t.Errorf("mounts of a container tell of the keeper:\n%s", out)
	}
	id, err := e.try(t, func(*runtimeapi.ContainerConfig) {})
	must(t, err)
	if out := e.ExecSync(t, id, "sh", "-c", "ls /proc/self/fd | wc -l"); string(out.GetStdout()) != "4\n" {
		t.Errorf("open files of an exec: %s", out.GetStdout())
	}
	for fd := 3; fd < 40; fd++ {
		cwd := fmt.Sprintf("/proc/self/fd/%d", fd)
		out := e.script(t, "pwd; ls /proc/self/cwd/ | head -3; cat ../../../../../../../../etc/hostname", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = cwd })
		if !strings.HasPrefix(out, "refused: ") {
			t.Errorf("working directory %s was accepted:\n%s", cwd, out)
		}
	}
}

// An image decides where its symbolic links lead, not where the host's files are
// (CVE-2019-16884, CVE-2021-30465 and their like): nothing is mounted, made, read
// or written outside of the root file system.
func followImageLinks(t *testing.T, e *escapee) {
	dir, untouched := e.hostDir(t)
	e.image = loadHostile(t, e.Lab, e.config.GetMetadata().GetName(), []tar.Header{
		link("out", dir), link("up", "../../../../../../../.."+dir), link("etc/passwd", dir+"/secret"),
		link("loop", "loop"), link("procs", "/proc"),
	}, func(c *v1.Config) { c.WorkingDir = "/out/made" })
	volume := t.TempDir()
	mount := func(path string) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) {
			c.WorkingDir = "/"
			c.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: path}}
		}
	}
	const look = "cat /proc/1/mountinfo >/dev/null; ls -d /out /up; ls /out/ /up/"
	for name, edit := range map[string]func(*runtimeapi.ContainerConfig){
		"working directory":       nil,
		"mount below a link":      mount("/out/made"),
		"mount below a link up":   mount("/up/made"),
		"mount over a link":       mount("/up"),
		"mount through a loop":    mount("/loop/made"),
		"mount over proc's files": mount("/procs/self/attr"),
		"user of the host": func(c *runtimeapi.ContainerConfig) {
			c.WorkingDir = "/"
			c.Linux.SecurityContext.RunAsUsername = "of the host"
		},
	} {
		out := e.script(t, look, edit)
		if strings.Contains(out, "secret") {
			t.Errorf("%s: a container sees the host's directory:\n%s", name, out)
		}
		if strings.HasPrefix(name, "user") && !strings.HasPrefix(out, "refused: ") {
			t.Errorf("%s: accepted:\n%s", name, out)
		}
		untouched()
	}
}

// A volume that one container changes while another is made does not lead its
// mounts to the host (CVE-2021-30465, CVE-2023-27561).
func followRacingLinks(t *testing.T, e *escapee) {
	dir, untouched := e.hostDir(t)
	volume := t.TempDir()
	must(t, os.Mkdir(filepath.Join(volume, "sub"), 0o755))
	_, err := e.try(t, func(c *runtimeapi.ContainerConfig) {
		c.Command, c.Args = []string{"sh", "-c", `cd /v; ln -s "` + strings.Repeat("../", 12) + dir + `" evil; while :; do mv sub keep; mv evil sub; mv sub evil; mv keep sub; done`}, nil
		c.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/v"}}
	})
	must(t, err)
	refused := 0
	const tries = 25
	for range tries {
		id, err := e.try(t, func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/v"}, {HostPath: t.TempDir(), ContainerPath: "/v/sub/made/deep"}}
		})
		if err != nil {
			refused++
			continue
		}
		if out := e.ExecSync(t, id, "cat", "/v/sub/secret"); out.GetExitCode() == 0 {
			t.Errorf("a container reads the host's file: %s", out.GetStdout())
		}
		untouched()
	}
	untouched()
	t.Logf("%d of %d containers were refused", refused, tries)
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), " "+dir) {
		t.Errorf("the host has got a mount (%v):\n%s", err, mounts)
	}
}

// A /dev of the user's own does not turn what hides the kernel's files into what
// opens others (CVE-2025-31133, CVE-2025-52565).
func replaceDev(t *testing.T, e *escapee) {
	dev := t.TempDir()
	for name, target := range map[string]string{"null": "/proc/sys/kernel/core_pattern", "console": "/proc/sysrq-trigger", "pts": "/proc", "ptmx": "/proc/sysrq-trigger", "shm": "/proc/sys"} {
		must(t, os.Symlink(target, filepath.Join(dev, name)))
	}
	for name, terminal := range map[string]bool{"plain": false, "with a terminal": true} {
		out := e.script(t, `for f in /proc/kcore /proc/keys /proc/timer_list /dev/console /proc/sys/kernel/core_pattern; do
					( echo x >$f ) 2>/dev/null && [ -s $f ] && echo "WROTE $f: $(head -c 20 $f)"
				done; mount | grep core_pattern`, func(c *runtimeapi.ContainerConfig) {
			c.Tty = terminal
			c.Mounts = []*runtimeapi.Mount{{HostPath: dev, ContainerPath: "/dev"}}
			c.Linux.SecurityContext.MaskedPaths = []string{"/proc/kcore", "/proc/keys", "/proc/timer_list"}
			c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys", "/proc/sysrq-trigger"}
		})
		t.Logf("%s: %.200s", name, out)
		if strings.Contains(out, "WROTE") || strings.Contains(out, "core_pattern") {
			t.Errorf("%s: %s", name, out)
		}
		for file, target := range map[string]string{"null": "/proc/sys/kernel/core_pattern", "console": "/proc/sysrq-trigger"} {
			if now, err := os.Readlink(filepath.Join(dev, file)); err != nil || now != target {
				t.Errorf("%s: the user's %s is %q now (%v)", name, file, now, err)
			}
		}
	}
}

// What a runtime writes into /proc goes there, although something of the user's
// is mounted over it (CVE-2019-16884, CVE-2025-52881).
func mountOverProc(t *testing.T, e *escapee) {
	fake := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(fake, "self", "attr"), 0o777))
	for _, path := range []string{"/proc", "/proc/self", "/proc/self/attr", "/proc/thread-self/attr", "/proc/sys", "/proc/sys/net", "/proc/../proc/self"} {
		out := e.script(t, "echo started", func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: fake, ContainerPath: path}}
		})
		if !strings.HasPrefix(out, "refused: ") {
			t.Errorf("a mount over %s was accepted:\n%s", path, out)
		}
	}
}

// A container without privileges cannot have the kernel run a program of its
// choice (CVE-2022-0492), change the kernel's settings or load modules.
func callKernelHelpers(t *testing.T, e *escapee) {
	before, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	must(t, err)
	out := e.script(t, `mkdir -p /c
			for t in "-t cgroup -o memory" "-t cgroup -o rdma" "-t cgroup2" "-t proc" "-t sysfs" "-t tmpfs"; do
				mount $t none /c 2>/dev/null && echo "MOUNTED $t"
				unshare -Urm sh -c "mount $t none /c && find /c -name release_agent -exec sh -c 'echo /evil >{} && echo AGENT' \;" 2>/dev/null
			done
			( echo "|/evil" >/proc/sys/kernel/core_pattern ) 2>/dev/null && echo PATTERN
			( echo b >/proc/sysrq-trigger ) 2>/dev/null && echo SYSRQ
			( echo 1 >/sys/fs/cgroup/memory/notify_on_release ) 2>/dev/null && echo NOTIFY
			( echo 0 >/sys/kernel/uevent_helper ) 2>/dev/null && echo HELPER
			mknod /disk b 254 0 2>/dev/null && ( head -c1 /disk ) 2>/dev/null && echo DISK
			[ -e /proc/1/root/proc/kcore ] && head -c1 /proc/kcore | grep -q . && echo KCORE
			echo done`, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		c.Linux.SecurityContext.MaskedPaths = []string{"/proc/kcore", "/proc/keys", "/sys/firmware"}
		c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys", "/proc/sysrq-trigger"}
	})
	if !strings.HasSuffix(out, "stdout F done\n") || strings.Count(out, "\n") != 1 {
		t.Errorf("a container without privileges can:\n%s", out)
	}
	after, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	must(t, err)
	if string(after) != string(before) {
		t.Errorf("core_pattern is %q now, was %q", after, before)
	}
}
