package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestMissedExits: what exits while nobody listens, and while there is no daemon,
// is told to whoever listens next.
func TestMissedExits(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	pod := l.PodConfig("quick")
	podID := l.RunPod(t, pod)
	start := func(name, script string) string {
		id := l.CreateContainer(t, podID, pod, l.ContainerConfig(name, image, "sh", "-c", script))
		l.StartContainer(t, id)
		return id
	}
	early := start("early", "exit 3")
	l.AwaitExit(t, early, 10*time.Second)
	late := start("late", "sleep 1; exit 4")
	l.Kill(t)
	time.Sleep(2 * time.Second)
	l.Start(t)

	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	events, err := l.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int32{early: 3, late: 4}
	for len(want) > 0 {
		e, err := events.Recv()
		if err != nil {
			t.Fatalf("%d exits were not told: %v", len(want), err)
		}
		if e.ContainerEventType != runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
			continue
		}
		for _, st := range e.ContainersStatuses {
			if code, ok := want[e.ContainerId]; ok && st.Id == e.ContainerId && st.ExitCode != code {
				t.Errorf("%s: exit code %d, want %d", st.Metadata.Name, st.ExitCode, code)
			}
		}
		delete(want, e.ContainerId)
	}
	l.RemovePod(t, podID)
}

// TestStalledEvents has a client that asks for events and does not read them. Pods
// come and go all the same, and in the end the client knows what there is. A
// client that waits for events does not keep the daemon from ending.
func TestStalledEvents(t *testing.T) {
	l := lab.New(t, lab.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 2*lab.Wait)
	defer cancel()
	stalled, err := l.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stalled.Header(); err != nil {
		t.Fatal(err)
	}
	removed := make(map[string]bool)
	const pods = 300 // four events each: more than one queue
	for i := range pods {
		config := l.PodConfig(fmt.Sprint("p", i))
		config.Annotations = map[string]string{"much": strings.Repeat("x", 10_000)}
		config.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		config.Hostname = ""
		id := l.RunPod(t, config)
		l.RemovePod(t, id)
		removed[id] = true
	}
	kept := l.RunPod(t, l.PodConfig("kept"))
	for {
		e, err := stalled.Recv()
		if err != nil {
			t.Fatalf("%d deletions were not told: %v", len(removed), err)
		}
		if e.ContainerEventType == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			delete(removed, e.ContainerId)
		}
		if e.ContainerId == kept && e.ContainerEventType == runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT {
			break
		}
	}
	if len(removed) > 0 {
		t.Errorf("%d deletions were not told", len(removed))
	}
	start := time.Now()
	l.Stop(t)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("the daemon took %v to end", took)
	}
	if _, err := stalled.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("a client that waits hears %v", err)
	}
	l.Start(t)
}
