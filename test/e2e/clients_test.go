package e2e

import (
	"os/exec"
	"strconv"
	"testing"

	"sampan.dev/sampan/test/lab"
)

// TestV1alpha2 runs a pod's whole life with a client of Kubernetes 1.18.
func TestV1alpha2(t *testing.T) {
	runClient(t, lab.New(t, lab.Options{}), "v1alpha2.test")
}

// TestKubeletClient drives every RPC with the kubelet's own client library.
func TestKubeletClient(t *testing.T) {
	runClient(t, lab.New(t, lab.Options{}), "kubelet.test")
}

// runClient runs the tests of a client that is a module of its own.
func runClient(t *testing.T, l *lab.Lab, name string) {
	t.Helper()
	path, err := lab.Tool(name)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, "-test.v", "-test.timeout=5m")
	cmd.Env = append(l.Env(), "SAMPAN_SOCKET="+l.Socket, "SAMPAN_PID="+strconv.Itoa(l.Pid()), "SAMPAN_IMAGE=busybox")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("%s: %v", name, err)
	}
}
