package e2e

import (
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// alive runs a command in a container. One that meets a keeper at its end says
// so and may be repeated, by whoever knows that it does no harm.
func alive(t *testing.T, l *lab.Lab, id string) {
	t.Helper()
	req := &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "alive"}}
	out, err := l.Runtime.ExecSync(t.Context(), req)
	for range 20 {
		if status.Code(err) != codes.Unavailable {
			break
		}
		time.Sleep(100 * time.Millisecond)
		out, err = l.Runtime.ExecSync(t.Context(), req)
	}
	if err != nil || string(out.GetStdout()) != "alive\n" {
		t.Errorf("exec: %q, %v", out.GetStdout(), err)
	}
}

// TestIsolation gives each pod a keeper of its own: killing one in both its
// processes is not seen by the other pod, and a keeper goes with its pod.
func TestIsolation(t *testing.T) {
	l := lab.New(t, lab.Options{Config: "[network]\nsubnet = \"" + lab.Subnet + "\"\n[keeper]\nisolation = \"pod\"\n"})
	image := l.Pull(t, "busybox")
	var pods, ids []string
	for _, name := range []string{"one", "two"} {
		config := l.PodConfig(name)
		pod := l.RunPod(t, config)
		id := l.CreateContainer(t, pod, config, l.ContainerConfig(name, image, "sleep", "1000"))
		l.StartContainer(t, id)
		pods, ids = append(pods, pod), append(ids, id)
	}
	workers, supervisors := l.Keepers(t, "worker"), l.Keepers(t, "supervisor")
	if len(workers) != 2 || len(supervisors) != 2 {
		t.Fatalf("workers %v, supervisors %v; want two of each", workers, supervisors)
	}
	for _, pid := range []int{supervisors[0], workers[0]} {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range ids {
		alive(t, l, id)
	}
	l.Stop(t)
	l.Start(t)
	for i, id := range ids {
		alive(t, l, id)
		l.RemovePod(t, pods[i])
	}
	l.RemoveImage(t, "busybox")
	l.CheckClean(t)
}
