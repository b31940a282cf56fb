package fault

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestUnwillingContainers has containers that do not do as they are told.
func TestUnwillingContainers(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("unwilling")
	pod := l.RunPod(t, config)
	name := names("c")
	start := func(edit func(*runtimeapi.ContainerConfig), script string) string {
		t.Helper()
		c := l.ContainerConfig(name(), image, "sh", "-c", script)
		if edit != nil {
			edit(c)
		}
		id := l.CreateContainer(t, pod, config, c)
		l.StartContainer(t, id)
		return id
	}

	t.Run("ignores SIGTERM", func(t *testing.T) {
		id := start(nil, `trap "" TERM; echo deaf; while :; do sleep 0.1; done`)
		awaitLog(t, l, id, "deaf")
		begin := time.Now()
		_, err := l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
		must(t, err)
		if took := time.Since(begin); took < time.Second || took > 20*time.Second {
			t.Errorf("stopped after %v, want a second", took)
		}
		if code := l.Status(t, id).GetExitCode(); code != 137 {
			t.Errorf("exit code %d, want 137", code)
		}
	})

	t.Run("forks without end", func(t *testing.T) {
		// Bounded, for the host's sake; each beginning while the others are killed.
		id := start(func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
		}, `trap "" TERM; f() { [ $1 -gt 6 ] || { f $(($1+1)) & f $(($1+1)) & }; while :; do sleep 0.01 & wait; done; }; f 0`)
		time.Sleep(500 * time.Millisecond)
		checkOthers(t, l, image, "beside-forks")
		_, err := l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
		must(t, err)
	})

	t.Run("exits at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 40 {
			c := l.ContainerConfig(name(), image, "sh", "-c", fmt.Sprintf("echo line %d; exit %d", i, i))
			wg.Go(func() {
				id := l.CreateContainer(t, pod, config, c)
				l.StartContainer(t, id)
				status := l.AwaitExit(t, id, 20*time.Second)
				log, err := os.ReadFile(status.GetLogPath())
				if int(status.GetExitCode()) != i || err != nil || !strings.HasSuffix(string(log), fmt.Sprintf(" F line %d\n", i)) {
					t.Errorf("container %d: exit code %d, log %q, %v", i, status.GetExitCode(), log, err)
				}
			})
		}
		wg.Wait()
	})

	t.Run("leaves children with its output", func(t *testing.T) {
		id := start(nil, `setsid sh -c 'trap "" TERM HUP; sleep 1000' & echo gone`)
		if status := l.AwaitExit(t, id, 20*time.Second); status.GetExitCode() != 0 {
			t.Errorf("exit code %d", status.GetExitCode())
		}
	})

	t.Run("exec leaves children with its output", func(t *testing.T) {
		id := start(nil, `sleep 1000`)
		begin := time.Now()
		r, err := l.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", `(setsid sh -c 'trap "" TERM HUP; sleep 1000' &) ; echo out; exit 3`}, Timeout: 5})
		if err != nil && !strings.Contains(err.Error(), "DeadlineExceeded") {
			t.Errorf("exec: %v", err)
		}
		if err == nil && (r.GetExitCode() != 3 || string(r.GetStdout()) != "out\n") {
			t.Errorf("exec: %v", r)
		}
		if took := time.Since(begin); took > 30*time.Second {
			t.Errorf("took %v", took)
		}
	})

	t.Run("exec outlives its timeout", func(t *testing.T) {
		id := start(nil, `sleep 1000`)
		_, err := l.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", `trap "" TERM INT HUP; sleep 777 & sleep 777`}, Timeout: 1})
		checkCode(t, "exec", err, codes.DeadlineExceeded)
		if out := l.ExecSync(t, id, "sh", "-c", "ps | grep -c '[s]leep 777'"); strings.TrimSpace(string(out.GetStdout())) != "0" {
			t.Errorf("%s processes of it are left", strings.TrimSpace(string(out.GetStdout())))
		}
	})

	t.Run("log is removed under it", func(t *testing.T) {
		id := start(nil, `while :; do echo line; sleep 0.05; done`)
		path := filepath.Join(config.GetLogDirectory(), l.Status(t, id).GetMetadata().GetName()+".log")
		time.Sleep(200 * time.Millisecond)
		must(t, os.Remove(path))
		_, err := l.Runtime.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
		must(t, err)
		time.Sleep(300 * time.Millisecond)
		if text, err := os.ReadFile(path); err != nil || len(text) == 0 {
			t.Errorf("the new log: %d bytes, %v", len(text), err)
		}
	})
	l.RemovePod(t, pod)
}

// awaitLog waits until a container has written a line that has the text.
func awaitLog(t *testing.T, l *lab.Lab, id, text string) {
	t.Helper()
	path := l.Status(t, id).GetLogPath()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if log, err := os.ReadFile(path); err == nil && strings.Contains(string(log), text) {
			return
		}
	}
	t.Fatalf("container %s: its log does not say %q", id, text)
}
