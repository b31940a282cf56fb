package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestHandlerFeatures: what a handler's program says it can do is what Status
// says, and what is not refused; an upgrade of the program counts at once.
func TestHandlerFeatures(t *testing.T) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("%v: install runc", err)
	}
	program := filepath.Join(t.TempDir(), "runtime")
	install := func(script string) {
		t.Helper()
		if err := os.WriteFile(program+".new", []byte("#!/bin/sh\n"+script+"exec "+runc+" \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".new", program); err != nil {
			t.Fatal(err)
		}
	}
	install("case $1 in features) echo unknown command >&2; exit 1;; esac\n")
	l := lab.New(t, lab.Options{Config: fmt.Sprintf("[handlers.other]\npath = %q\n", program)})
	image := l.Pull(t, "busybox")

	recursive := func() bool {
		t.Helper()
		r, err := l.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for _, h := range r.GetRuntimeHandlers() {
			names[h.GetName()] = h.GetFeatures().GetRecursiveReadOnlyMounts()
		}
		if builtin, ok := names["builtin"]; !ok || names[""] != builtin || len(names) != 3 {
			t.Fatalf("handlers: %v", names)
		}
		if !names["other"] && !strings.Contains(r.GetInfo()["handlers"], "unknown command") {
			t.Errorf("info does not tell why it cannot: %s", r.GetInfo()["handlers"])
		}
		return names["other"]
	}
	pod := l.PodConfig("features")
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	made, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod, RuntimeHandler: "other"})
	if err != nil {
		t.Fatal(err)
	}
	config := l.ContainerConfig("reader", image, "sleep", "600")
	config.Mounts = []*runtimeapi.Mount{{HostPath: l.Logs(), ContainerPath: "/m", Readonly: true, RecursiveReadOnly: true}}
	create := &runtimeapi.CreateContainerRequest{PodSandboxId: made.GetPodSandboxId(), Config: config, SandboxConfig: pod}

	if recursive() {
		t.Error("a program that says nothing is said to make mounts recursively read-only")
	}
	_, err = l.Runtime.CreateContainer(ctx, create)
	checkError(t, err, []codes.Code{codes.FailedPrecondition}, "RROUnsupported", "mounts[0].recursive_read_only")

	install("")
	if _, err = l.Runtime.CreateContainer(ctx, create); err != nil {
		t.Errorf("after the upgrade: %v", err)
	}
	for end := time.Now().Add(10 * time.Second); !recursive(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("Status does not tell of the upgrade")
		}
	}
	l.RemovePod(t, made.GetPodSandboxId())
}
