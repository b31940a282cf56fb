package builtin_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/builtin"
	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// creatorEnv holds the container that the test binary creates, if it is set,
// instead of running tests. Somebody will kill it while it does.
const creatorEnv = "SAMPAN_TEST_CREATE"

type creation struct {
	Container ociruntime.Container
	Bundle    string
}

func create(encoded string) {
	var c creation
	if err := json.Unmarshal([]byte(encoded), &c); err != nil {
		panic(err)
	}
	rt := builtin.New(builtin.Config{Logger: slog.New(slog.DiscardHandler)})
	if _, err := rt.Create(context.Background(), c.Container, ociruntime.CreateRequest{Bundle: c.Bundle}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("created")
	select {} // until killed
}

// TestCreatorKilled kills the process that creates a container at every moment
// of it, and lets another delete what there is.
func TestCreatorKilled(t *testing.T) {
	lab := conformance.NewLab(t)
	rt := newRuntime(t)
	var complete int
	for delay := time.Duration(0); delay < 60*time.Millisecond; delay += 1500 * time.Microsecond {
		c := lab.Prepare(t, rt, []string{"sleep", "60"})
		encoded, err := json.Marshal(creation{Container: c.Container, Bundle: c.Bundle})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), creatorEnv+"="+string(encoded))
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(delay)
		cmd.Process.Kill()
		cmd.Wait()
		if _, err := rt.State(t.Context(), c.Container); err == nil {
			complete++
		}
		c.Delete()
		c.AssertGone()
		awaitNoChildren(t)
	}
	t.Logf("%d creations were complete when their process was killed", complete)
}

// awaitNoChildren reaps what was left to us, the subreaper, and fails the test if
// any of it does not end by itself.
func awaitNoChildren(t *testing.T) {
	t.Helper()
	for range 500 {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err == unix.ECHILD {
			return
		}
		if pid == 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	t.Error("a process is left 5 s after Delete")
}
