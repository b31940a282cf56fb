package fault

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestDamagedRecords damages every record there is of a pod, a container and an
// image, one after the other, while the daemon is down. It starts all the same,
// whatever else there was is still there, and what the record was of can be
// removed.
func TestDamagedRecords(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	bystander := l.PodConfig("bystander")
	other := l.RunPod(t, bystander)
	steady := l.CreateContainer(t, other, bystander, l.ContainerConfig("steady", image, "sleep", "1000"))
	l.StartContainer(t, steady)
	name := names("damaged-")

	kinds := map[string]bool{}
	for tries := 0; ; tries++ {
		if tries > 60 {
			t.Fatal("it does not end")
		}
		config := l.PodConfig(name())
		pod := l.RunPod(t, config)
		c := l.ContainerConfig("c", image, "sleep", "1000")
		id := l.CreateContainer(t, pod, config, c)
		l.StartContainer(t, id)
		var victim, kind string
		for _, r := range records(t, l) {
			if of := owner.FindStringSubmatch(r.path); of != nil && of[1] != pod && of[1] != id {
				continue // the bystander's, or of a pod that has been removed and goes yet
			}
			if !kinds[r.kind] {
				victim, kind = r.path, r.kind
				kinds[kind] = true
				break
			}
		}
		if victim == "" {
			l.RemovePod(t, pod)
			break
		}
		t.Run(kind, func(t *testing.T) {
			l.Kill(t)
			damage(t, victim, tries)
			l.Start(t)
			awaitRunning(t, l, steady)
			if strings.HasSuffix(victim, filepath.Join("containers", id, "config")) {
				findUnreadable(t, l, pod, id)
			}
			if strings.HasPrefix(victim, filepath.Join(l.State, "keepers")) {
				killWorker(t, l) // the next one reads it
				awaitRunning(t, l, steady)
				findLost(t, l, victim, id)
			}
			ctx := brief(t)
			pods, err := l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			must(t, err)
			for _, p := range pods.GetItems() {
				if p.GetId() != other {
					l.RemovePod(t, p.GetId())
				}
			}
			if containers, err := l.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err != nil || len(containers.GetContainers()) != 1 {
				t.Errorf("containers afterwards: %v, %v", containers, err)
			}
			if again := l.Pull(t, "busybox"); again != image {
				t.Errorf("pulled again, the image is %s, was %s", again, image)
			}
			checkOthers(t, l, image, name())
		})
	}
	t.Logf("%d kinds of record damaged", len(kinds))
	if len(kinds) < 6 {
		t.Errorf("only %v", kinds)
	}
}

// owner finds the pod or container in the path of a record that is one's.
var owner = regexp.MustCompile(`/(?:pods|containers)/([^/]+)/?`)

// findUnreadable finds a container whose record is damaged: it runs, and can be seen,
// stopped and removed; its pod is as it was.
func findUnreadable(t *testing.T, l *lab.Lab, pod, id string) {
	t.Helper()
	awaitRunning(t, l, id)
	st := l.Status(t, id)
	if st.GetReason() != "Unreadable" || !strings.Contains(st.GetMessage(), "record is damaged") {
		t.Errorf("container whose record is damaged: %s: %q; want the reason", st.GetReason(), st.GetMessage())
	}
	if out := l.ExecSync(t, id, "echo", "hello"); string(out.GetStdout()) != "hello\n" {
		t.Errorf("exec in it: %q, %q", out.GetStdout(), out.GetStderr())
	}
	if out, code := l.Fsck(); code != 1 || !strings.Contains(out, id[:13]) {
		t.Errorf("fsck: %d\n%s", code, out)
	}
	r, err := l.Runtime.ListContainers(brief(t), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod}})
	if err != nil || len(r.GetContainers()) != 1 {
		t.Errorf("containers of its pod: %v, %v", r.GetContainers(), err)
	}
	_, err = l.Runtime.StopContainer(brief(t), &runtimeapi.StopContainerRequest{ContainerId: id})
	must(t, err)
	if st := l.AwaitExit(t, id, lab.Wait); st.GetExitCode() != 137 {
		t.Errorf("stopped, it has code %d (%s), want 137", st.GetExitCode(), st.GetMessage())
	}
	_, err = l.Runtime.RemoveContainer(brief(t), &runtimeapi.RemoveContainerRequest{ContainerId: id})
	must(t, err)
	p, err := l.Runtime.PodSandboxStatus(brief(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || p.GetStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("its pod: %v, %v; want ready", p.GetStatus(), err)
	}
}

func killWorker(t *testing.T, l *lab.Lab) {
	t.Helper()
	before := l.Keepers(t, "worker")
	must(t, unix.Kill(before[0], unix.SIGKILL))
	for end := time.Now().Add(lab.Wait); ; time.Sleep(20 * time.Millisecond) {
		now := l.Keepers(t, "worker")
		if len(now) == 1 && now[0] != before[0] {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("keeper: its worker was killed, now they are %v", now)
		}
	}
}

// findLost finds a container that runs and that its keeper may not know much of. It is
// never told to have ended, and can be stopped.
func findLost(t *testing.T, l *lab.Lab, record, id string) {
	t.Helper()
	want := runtimeapi.ContainerState_CONTAINER_RUNNING
	switch filepath.Base(record) {
	case "request", "process":
		want = runtimeapi.ContainerState_CONTAINER_UNKNOWN
	case "first", "undo", "entry": // the runtime's; whatever it makes of it
		return
	}
	var st *runtimeapi.ContainerStatus
	for end := time.Now().Add(lab.Wait); ; time.Sleep(50 * time.Millisecond) {
		st = l.Status(t, id)
		if st.GetState() == want && (want == runtimeapi.ContainerState_CONTAINER_RUNNING || strings.Contains(st.GetMessage(), "keeper")) {
			break
		}
		if st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED || time.Now().After(end) {
			t.Fatalf("container with a damaged keeper's record: %v, %d (%q); want %v", st.GetState(), st.GetExitCode(), st.GetMessage(), want)
		}
	}
	_, err := l.Runtime.StopContainer(brief(t), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
	must(t, err)
	if st := l.AwaitExit(t, id, lab.Wait); st.GetExitCode() == 0 {
		t.Errorf("stopped, it has code %d (%s)", st.GetExitCode(), st.GetMessage())
	}
}

// TestNewerRecords lets every record there is seem to be a newer sampan's, one after
// the other. The daemon refuses to start and says which it is; nothing is changed
// and what runs goes on, so that the newer one, or this one with the record as it
// was, has all of it.
func TestNewerRecords(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	_, err := l.Runtime.UpdateRuntimeConfig(brief(t), &runtimeapi.UpdateRuntimeConfigRequest{
		RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.89.0.0/16"}}})
	must(t, err)
	config := l.PodConfig("newer")
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sleep", "1000"))
	l.StartContainer(t, id)
	limits := &runtimeapi.LinuxContainerResources{CpuShares: 512}
	_, err = l.Runtime.UpdateContainerResources(brief(t), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: limits})
	must(t, err)
	_, err = l.Runtime.UpdatePodSandboxResources(brief(t), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: limits})
	must(t, err)
	ended := l.CreateContainer(t, pod, config, l.ContainerConfig("ended", image, "sh", "-c", "exit 3"))
	l.StartContainer(t, ended)
	l.AwaitExit(t, ended, lab.Wait)
	other := l.PodConfig("other")
	stopped := l.RunPod(t, other)
	_, err = l.Runtime.StopPodSandbox(brief(t), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped})
	must(t, err)
	before := l.Status(t, id)
	awaitNoRecord(t, filepath.Join(l.State, "network/pods", stopped))

	kinds := map[string]bool{}
	for _, r := range records(t, l) {
		if kinds[r.kind] || strings.HasPrefix(r.path, filepath.Join(l.State, "keepers")) {
			continue // keepers read theirs
		}
		kinds[r.kind] = true
		t.Run(r.kind, func(t *testing.T) {
			l.Kill(t)
			_, rest, _ := strings.Cut(r.text, " v1 ")
			must(t, os.WriteFile(r.path, []byte("sampan "+r.kind+" v9 "+rest), 0o600))
			were := records(t, l)
			says := l.StartFails(t)
			if !strings.Contains(says, r.path) || !strings.Contains(says, "v9 of "+r.kind) {
				t.Errorf("the daemon ends without naming %s and its version:\n%s", r.path, says)
			}
			if left := records(t, l); !slices.Equal(left, were) {
				t.Errorf("records afterwards:\n%v\nwere:\n%v", left, were)
			}
			if out, code := l.Fsck(); code != 1 || !strings.Contains(out, "v9 of "+r.kind) {
				t.Errorf("fsck does not tell of it: %d\n%s", code, out)
			}
			must(t, os.WriteFile(r.path, []byte(r.text), 0o600))
			l.Start(t)
			awaitRunning(t, l, id)
			if st := l.Status(t, id); st.GetStartedAt() != before.GetStartedAt() {
				t.Errorf("the container was started at %d, now at %d", before.GetStartedAt(), st.GetStartedAt())
			}
			if code := l.Status(t, ended).GetExitCode(); code != 3 {
				t.Errorf("the one that ended has the code %d, want 3", code)
			}
		})
	}
	t.Logf("%d kinds of record: %v", len(kinds), slices.Sorted(maps.Keys(kinds)))
	if len(kinds) < 12 {
		t.Errorf("only %v", kinds)
	}
}

// damage spoils a file, in one of several ways.
func damage(t *testing.T, path string, how int) {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	text, err := os.ReadFile(path)
	must(t, err)
	switch how % 4 {
	case 0:
		text = nil
	case 1:
		text = text[:len(text)/2]
	case 2:
		text[len(text)/2] ^= 1
	case 3:
		text = []byte(strings.Repeat("\x00", len(text)))
	}
	t.Logf("%s: damage %d", path, how%4)
	must(t, os.WriteFile(path, text, info.Mode().Perm()))
}

// record is a file that begins as records do.
type record struct{ path, kind, text string }

// records are those in ROOT and STATE, in order.
func records(t *testing.T, l *lab.Lab) []record {
	t.Helper()
	var found []record
	for _, dir := range []string{l.Root, l.State} {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return nil // gone meanwhile
			case d.IsDir() && (d.Name() == "tree" || d.Name() == "rootfs" || d.Name() == "ns" || d.Name() == "bundle"):
				return fs.SkipDir
			case d.Type().IsRegular():
				text, err := os.ReadFile(path)
				if fields := strings.Fields(string(text)); err == nil && len(fields) > 1 && fields[0] == "sampan" {
					found = append(found, record{path, fields[1], string(text)})
				}
			}
			return nil
		}))
	}
	return found
}

// awaitNoRecord waits until there is no record at path.
func awaitNoRecord(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(lab.Wait); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still there", path)
		}
	}
}

func awaitRunning(t *testing.T, l *lab.Lab, id string) {
	t.Helper()
	var last string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		r, err := l.Runtime.ContainerStatus(brief(t), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err == nil && r.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			return
		}
		last = fmt.Sprint(r.GetStatus().GetState(), err)
	}
	t.Fatalf("container %s is not running: %s", id, last)
}
