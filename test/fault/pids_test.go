package fault

import (
	"encoding/json"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// When everything of Sampan and of a container is dead and other processes have
// got their pids, these are nobody's to adopt, signal or kill.
func TestReusedPIDs(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("reused")
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sleep", "1000"))
	l.StartContainer(t, id)

	pids := append(l.Keepers(t, "supervisor"), l.Keepers(t, "worker")...)
	pids = append(pids, containerPid(t, l, id))
	l.Kill(t)
	for _, pid := range pids {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	var strangers []*exec.Cmd
	for _, pid := range pids {
		strangers = append(strangers, startAs(t, pid))
	}
	l.Start(t)
	status := l.AwaitExit(t, id, 20*time.Second)
	if status.GetReason() == "" || status.GetExitCode() == 0 {
		t.Errorf("a container that is dead shows as exit code %d, reason %q", status.GetExitCode(), status.GetReason())
	}
	_, err := l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
	must(t, err)
	l.RemovePod(t, pod)
	checkOthers(t, l, image, "afterwards")
	for _, s := range strangers {
		if err := unix.Kill(s.Process.Pid, 0); err != nil {
			t.Errorf("process %d, which only has an old pid, is gone: %v", s.Process.Pid, err)
		}
		must(t, s.Process.Kill())
		_ = s.Wait() // it was killed
	}
}

// containerPid is the pid of a container's first process.
func containerPid(t *testing.T, l *lab.Lab, id string) int {
	t.Helper()
	r, err := l.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	must(t, err)
	var info struct{ Pid int }
	must(t, json.Unmarshal([]byte(r.GetInfo()["info"]), &info))
	if info.Pid == 0 {
		t.Fatalf("no pid in %v", r.GetInfo())
	}
	return info.Pid
}

// startAs starts a process with the pid, which nobody has.
func startAs(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for range 200 {
		must(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0))
		cmd := exec.Command("sleep", "1000")
		must(t, cmd.Start())
		if cmd.Process.Pid == pid {
			return cmd
		}
		must(t, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no process got the pid %d", pid)
	return nil
}
