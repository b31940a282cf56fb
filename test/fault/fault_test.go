// Package fault gives a daemon a host that does not do its part: volumes that
// hang, disks that are full or read-only, records that are damaged, runtimes that
// crash, containers that do not want to go. Whatever fails, fails alone, with an
// error that tells why; and when the fault is gone, everything can be removed.
package fault

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// brevity is how long a client waits for what is not going to happen.
const brevity = 2 * time.Second

func brief(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), brevity)
	t.Cleanup(cancel)
	return ctx
}

// checkCode compares an error's code.
func checkCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// checkOthers makes a pod beside the one with the fault, takes it through its
// life, and lists: none of it may wait.
func checkOthers(t *testing.T, l *lab.Lab, image, name string) {
	t.Helper()
	start := time.Now()
	config := l.PodConfig(name)
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sleep", "1000"))
	l.StartContainer(t, id)
	if out := l.ExecSync(t, id, "echo", "well"); string(out.GetStdout()) != "well\n" {
		t.Errorf("exec beside the fault: %v", out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := l.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	must(t, err)
	_, err = l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	_, err = l.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	must(t, err)
	l.RemovePod(t, pod)
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("a pod beside the fault took %v", took)
	}
}

// create creates a container without insisting.
func create(ctx context.Context, l *lab.Lab, pod string, podConfig *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig) (string, error) {
	r, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
	return r.GetContainerId(), err
}

// names makes names that no other request of the test has.
func names(prefix string) func() string {
	n := 0
	return func() string { n++; return fmt.Sprint(prefix, n) }
}
