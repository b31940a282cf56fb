package kubelet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cri "k8s.io/cri-client/pkg"
)

// A kubelet that waits for a daemon tells what is wrong.
func TestDeadSocket(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone.sock")
	l, err := net.Listen("unix", gone)
	must(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for name, path := range map[string]string{"nobody listens": gone, "no file": gone + "x"} {
		_, err := cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + path).WithConnectionTimeout(2 * time.Second).Build(t.Context())
		if err == nil || codeOf(err) != codes.Unavailable && codeOf(err) != codes.DeadlineExceeded {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A client of an API that is not served hears so, and no other error.
func TestUnknownVersion(t *testing.T) {
	connect(t, false)
	conn, err := grpc.NewClient("unix://"+os.Getenv("SAMPAN_SOCKET"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	for _, method := range []string{"/runtime.v2.RuntimeService/Version", "/runtime.v1.RuntimeService/NoSuchMethod", "/runtime.v1alpha2.RuntimeService/GetContainerEvents"} {
		err := conn.Invoke(t.Context(), method, &runtimeapi.VersionRequest{}, &runtimeapi.VersionResponse{})
		if codeOf(err) != codes.Unimplemented {
			t.Errorf("%s: %v", method, err)
		}
	}
	// A server without the kubelet's version fails the connection with that code.
	socket := filepath.Join(t.TempDir(), "other.sock")
	l, err := net.Listen("unix", socket)
	must(t, err)
	other := grpc.NewServer()
	go other.Serve(l)
	defer other.Stop()
	_, err = cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + socket).WithConnectionTimeout(5 * time.Second).Build(t.Context())
	if codeOf(err) != codes.Unimplemented {
		t.Errorf("another API: %v", err)
	}
}

// A daemon that does not answer at all is DeadlineExceeded, and nothing is wrong
// once it does.
func TestStoppedDaemon(t *testing.T) {
	n := connect(t, false)
	pid, err := strconv.Atoi(os.Getenv("SAMPAN_PID"))
	must(t, err)
	defer syscall.Kill(pid, syscall.SIGCONT)
	stop(t, pid)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := n.runtime.Version(ctx, ""); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("version: %v", err)
	}
	_, err = cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + os.Getenv("SAMPAN_SOCKET")).WithConnectionTimeout(time.Second).Build(t.Context())
	if codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("connect: %v", err)
	}
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	if _, err := n.runtime.Version(t.Context(), ""); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// stop stops a process and waits until each of its threads has: one that runs
// goes on for a moment after the signal was sent.
func stop(t *testing.T, pid int) {
	t.Helper()
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		must(t, err)
		if !slices.ContainsFunc(threads, func(path string) bool {
			text, err := os.ReadFile(path)
			return err == nil && !bytes.Contains(text, []byte(") T "))
		}) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d has not stopped", pid)
		}
	}
}

// A request that the kubelet gives up waiting for is DeadlineExceeded to it, and
// the daemon goes on answering others.
func TestSlowAnswer(t *testing.T) {
	n := connect(t, false)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := n.runtime.GetContainerEvents(ctx, make(chan *runtimeapi.ContainerEventResponse), nil); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("waiting for events: %v", err)
	}
	if _, err := n.runtime.Version(ctx, ""); codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("no time left: %v", err)
	}
	if _, err := n.runtime.Version(t.Context(), ""); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// What one client can do wrong is told to it, with the code it knows.
func TestRefusals(t *testing.T) {
	n, ctx := connect(t, false), t.Context()
	pod := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "lab", Uid: "u"}}
	_, err := n.runtime.RunPodSandbox(ctx, pod, "no-such-handler")
	if codeOf(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "builtin") {
		t.Errorf("unknown handler: %v", err)
	}
	if _, err := n.runtime.CreateContainer(ctx, "nope", &runtimeapi.ContainerConfig{}, pod); codeOf(err) != codes.NotFound {
		t.Errorf("unknown pod: %v", err)
	}
	if err := n.runtime.StartContainer(ctx, "nope"); codeOf(err) != codes.NotFound {
		t.Errorf("unknown container: %v", err)
	}
	if err := n.runtime.StopContainer(ctx, "nope", 1); err != nil {
		t.Errorf("stop of what is not there: %v", err)
	}
}

func codeOf(err error) codes.Code {
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Code()
	}
	return status.Code(err)
}
