package fault

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestBadRuntimes has OCI runtimes that hang, crash, say nonsense or are gone.
// Each fails the pods that ask for it, with its words, and no other.
func TestBadRuntimes(t *testing.T) {
	dir := t.TempDir()
	config := ""
	for name, script := range map[string]string{
		"hangs":    "exec sleep 1000",
		"crashes":  "kill -SEGV $$",
		"nonsense": "echo 'no such thing as a container' >&2; exit 3",
		"lies":     "exit 0",
		"gone":     "",
	} {
		path := filepath.Join(dir, name)
		if script != "" {
			// Asked what it can do, it answers, lest it be refused at once.
			must(t, os.WriteFile(path, []byte("#!/bin/sh\ncase \"$*\" in *features*) echo '{}'; exit 0;; esac\n"+script+"\n"), 0o755))
		}
		config += fmt.Sprintf("[handlers.%s]\npath = %q\n", name, path)
	}
	l := lab.New(t, lab.Options{Config: config})
	image := l.Pull(t, "busybox")
	for name, want := range map[string]struct {
		code codes.Code
		text string
	}{
		"hangs":    {codes.DeadlineExceeded, ""},
		"crashes":  {codes.Unknown, "segmentation fault"},
		"nonsense": {codes.Unknown, "exit status 3"}, // what it says goes to the container's log
		"lies":     {codes.Unknown, "pid"},
		"gone":     {codes.Unavailable, filepath.Join(dir, "gone")},
	} {
		t.Run(name, func(t *testing.T) {
			podConfig := l.PodConfig("runtime-" + name)
			ctx := brief(t)
			r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig, RuntimeHandler: name})
			if err == nil {
				_, err = create(ctx, l, r.GetPodSandboxId(), podConfig, l.ContainerConfig("c", image, "sleep", "1000"))
			}
			if got := status.Convert(err); got.Code() != want.code || !strings.Contains(got.Message(), want.text) {
				t.Errorf("%v, want %v with %q", err, want.code, want.text)
			}
			checkOthers(t, l, image, "beside-"+name)
			if r.GetPodSandboxId() != "" {
				l.RemovePod(t, r.GetPodSandboxId())
			}
		})
	}
}
