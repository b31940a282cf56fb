package crash

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// previous names the variable that has the path of an earlier build.
const previous = "SAMPAN_TEST_PREVIOUS"

// buildPrevious builds it, unless somebody has.
func buildPrevious(ctx context.Context, cache string) error {
	if os.Getenv(previous) != "" {
		return nil
	}
	var says bytes.Buffer
	cmd := exec.CommandContext(ctx, "../../scripts/build-previous", filepath.Join(cache, "previous"))
	cmd.Stderr = &says
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("build an earlier sampan: %w\n%s", err, says.String())
	}
	return os.Setenv(previous, strings.TrimSpace(string(out)))
}

// TestUpgrade replaces the daemon under pods that run by that of another build,
// and back. Containers go on, with every line in their logs; their exits come
// through whoever was there; each build can do everything with the other's pods.
func TestUpgrade(t *testing.T) {
	lab.Require(t)
	for _, isolation := range []string{"node", "pod"} {
		t.Run(isolation, func(t *testing.T) {
			later := os.Getenv(lab.Binary)
			t.Setenv(lab.Binary, os.Getenv(previous))
			l := lab.New(t, lab.Options{Config: fmt.Sprintf("[keeper]\nisolation = %q\n", isolation)})
			u := &upgrade{l: l, k: newKubelet(t, l), earlier: l.Binary, later: later, signals: t.TempDir()}
			u.run(t)
		})
	}
}

// upgrade is a node whose sampan comes and goes.
type upgrade struct {
	l              *lab.Lab
	k              *kubelet
	earlier, later string // paths of sampan
	signals        string // directory: a file in it ends the container of that name
	residents      []*resident
	waiting        []*waiter
}

// waiter is a container that waits for a file, and exits with a code.
type waiter struct {
	name, pod, id string
	podConfig     *runtimeapi.PodSandboxConfig
	code          int32
	addresses     string
	createdAt     int64
	startedAt     int64
}

func (u *upgrade) run(t *testing.T) {
	u.l.Pull(t, "docker.io/sampan/lines")
	u.l.Pull(t, "busybox")
	u.residents = startResidents(t, u.k)
	u.populate(t, "earlier")
	u.look(t)

	u.l.Stop(t)
	u.tell(t, "earlier-unseen")
	u.awaitRecord(t, "earlier-unseen") // it ends while there is no daemon
	u.start(t, u.later)
	u.look(t)
	u.end(t, "earlier-unseen")
	u.populate(t, "later")
	u.start(t, u.later, "earlier-created")
	u.end(t, "earlier-first")

	u.l.Kill(t)
	u.start(t, u.earlier)
	u.look(t)
	u.start(t, u.earlier, "later-created")
	u.end(t, "later-first")
	u.end(t, "earlier-created")

	u.l.Stop(t)
	u.start(t, u.later)
	u.killKeepers(t) // whoever comes has what the others have written
	u.look(t)
	for _, w := range slices.Clone(u.waiting) {
		u.end(t, w.name)
	}
	u.look(t)
}

// populate runs containers that end when they are told to, each in a pod of its
// own; one of them is only created.
func (u *upgrade) populate(t *testing.T, who string) {
	t.Helper()
	for i, what := range []string{"first", "unseen", "last", "shared", "created"} {
		w := &waiter{name: who + "-" + what, code: int32(20 + i)}
		w.podConfig = u.l.PodConfig(w.name)
		config := u.l.ContainerConfig("waiter", "busybox", "sh", "-c",
			fmt.Sprintf("until [ -e /signals/%s ]; do sleep 0.1; done; exit %d", w.name, w.code))
		config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/signals", HostPath: u.signals}}
		if what == "shared" {
			w.podConfig.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		}
		w.pod = u.l.RunPod(t, w.podConfig)
		w.id = u.l.CreateContainer(t, w.pod, w.podConfig, config)
		if what != "created" {
			u.l.StartContainer(t, w.id)
		}
		st := u.l.Status(t, w.id)
		w.createdAt, w.startedAt, w.addresses = st.GetCreatedAt(), st.GetStartedAt(), u.podAddresses(t, w.pod)
		u.waiting = append(u.waiting, w)
	}
}

// podAddresses are those of a pod, which must be ready.
func (u *upgrade) podAddresses(t *testing.T, pod string) string {
	t.Helper()
	if err := u.k.ready(pod); err != nil {
		t.Fatal(err)
	}
	r, err := call(u.k, u.k.runtime.PodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetStatus().GetNetwork().String()
}

// start runs the daemon of a build or, with names, containers that wait for it.
func (u *upgrade) start(t *testing.T, binary string, names ...string) {
	t.Helper()
	if len(names) == 0 {
		u.l.Binary = binary
		u.l.Start(t)
	}
	for _, name := range names {
		w := u.named(name)
		u.l.StartContainer(t, w.id)
		w.startedAt = u.l.Status(t, w.id).GetStartedAt()
	}
}

func (u *upgrade) named(name string) *waiter {
	return u.waiting[slices.IndexFunc(u.waiting, func(w *waiter) bool { return w.name == name })]
}

// look finds everything as it was.
func (u *upgrade) look(t *testing.T) {
	t.Helper()
	for _, r := range u.residents {
		if err := r.check(u.k); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range u.waiting {
		if got := u.podAddresses(t, w.pod); got != w.addresses {
			t.Errorf("%s: network %s, was %s", w.name, got, w.addresses)
		}
		st := u.l.Status(t, w.id)
		if st.GetCreatedAt() != w.createdAt || st.GetStartedAt() != w.startedAt {
			t.Errorf("%s: created at %d, started at %d; was %d, %d", w.name, st.GetCreatedAt(), st.GetStartedAt(), w.createdAt, w.startedAt)
		}
		if st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			if err := u.k.exec(w.id, w.name+"\n", "hostname"); err != nil {
				t.Errorf("%s: %v", w.name, err)
			}
			if err := u.k.change(w.pod, w.id); err != nil {
				t.Errorf("%s: %v", w.name, err)
			}
		}
		if again := u.l.RunPod(t, w.podConfig); again != w.pod {
			t.Errorf("%s: run again, its pod is %s, was %s", w.name, again, w.pod)
		}
	}
	if out, code := fsck(u.l); code != 0 {
		t.Errorf("sampan fsck: %d\n%s", code, out)
	}
}

// tell lets a waiter end.
func (u *upgrade) tell(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(u.signals, name), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// awaitRecord waits until a keeper has written down how a waiter ended.
func (u *upgrade) awaitRecord(t *testing.T, name string) {
	t.Helper()
	record := filepath.Join(u.l.Root, "containers", u.named(name).id, "exit")
	for end := time.Now().Add(lab.Wait); ; time.Sleep(pause) {
		if _, err := os.Stat(record); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatalf("%s does not end: %v", name, err)
		}
	}
}

// end lets a waiter end, unless it has, finds its code, and removes its pod.
func (u *upgrade) end(t *testing.T, name string) {
	t.Helper()
	w := u.named(name)
	u.tell(t, name)
	if u.l.Status(t, w.id).GetStartedAt() != 0 {
		if st := u.l.AwaitExit(t, w.id, lab.Wait); st.GetExitCode() != w.code {
			t.Errorf("%s: exit code %d (%s), want %d", name, st.GetExitCode(), st.GetMessage(), w.code)
		}
	}
	u.l.RemovePod(t, w.pod)
	u.waiting = slices.DeleteFunc(u.waiting, func(other *waiter) bool { return other == w })
}

// killKeepers ends all of them at once; the daemon holds what is needed.
func (u *upgrade) killKeepers(t *testing.T) {
	t.Helper()
	for _, pid := range append(u.l.Keepers(t, "supervisor"), u.l.Keepers(t, "worker")...) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			t.Fatal(err)
		}
	}
}
