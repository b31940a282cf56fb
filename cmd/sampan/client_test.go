package main

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func mustContain(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is missing in:\n%s", part, text)
		}
	}
}

// ownNamespace is a Kubernetes namespace of this test's own, so that its log
// directories meet nobody else's; they are removed when it ends.
func ownNamespace(t *testing.T) string {
	t.Helper()
	if err := os.MkdirAll(logRoot, 0o755); err != nil {
		t.Skipf("cannot make %s, where `sampan run` keeps logs: %v", logRoot, err)
	}
	namespace := "sampan-test-" + newUID()
	t.Cleanup(func() {
		for _, dir := range logDirectories(t, namespace) {
			os.RemoveAll(dir)
		}
		os.Remove(logRoot) // if it is empty nobody else needs it
	})
	return namespace
}

func logDirectories(t *testing.T, namespace string) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(logRoot, namespace+"_*"))
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func TestRunListRemove(t *testing.T) {
	f, endpoint := startFake(t)
	namespace := ownNamespace(t)
	out, errOut, code := sampan(t, "", "run", "--endpoint", endpoint, "--namespace", namespace, "-p", "8080:80", "-e", "A=b=c",
		"--handler", "runc", "docker.io/library/web_server:1.2", "--", "/serve", "-x")
	if code != 0 {
		t.Fatal(errOut)
	}
	mustContain(t, out, "pod web-server is up", "address: 10.88.0.2")
	if want := []string{"ListPodSandbox", "ImageStatus", "PullImage", "RunPodSandbox", "CreateContainer", "StartContainer", "PodSandboxStatus"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
	if f.lastPod.GetRuntimeHandler() != "runc" || f.lastPod.GetConfig().GetPortMappings()[0].GetHostPort() != 8080 {
		t.Errorf("pod request %v", f.lastPod)
	}
	config := f.lastCreate.GetConfig()
	if !slices.Equal(config.GetCommand(), []string{"/serve", "-x"}) || string(config.GetEnvs()[0].GetValue()) != "b=c" {
		t.Errorf("container request %v", config)
	}
	if len(logDirectories(t, namespace)) != 1 {
		t.Error("no log directory was made")
	}

	_, errOut, code = sampan(t, "", "run", "--endpoint", endpoint, "--namespace", namespace, "web-server")
	if code != 1 {
		t.Error("a second pod of the same name came up")
	}
	mustContain(t, errOut, "there is one already", "sampan pod rm")

	out, _, _ = sampan(t, "", "pod", "ls", "--endpoint", endpoint)
	mustContain(t, out, "POD", "web-server", "ready", "10.88.0.2", "web-server:running")
	out, _, _ = sampan(t, "", "pod", "ls", "--endpoint", endpoint, "-o", "json")
	mustContain(t, out, `"SANDBOX_READY"`)
	out, _, _ = sampan(t, "", "pod", "ls", "--endpoint", endpoint, "-q")
	if strings.TrimSpace(out) != f.pods[0].GetId() {
		t.Errorf("ids %q", out)
	}

	if _, errOut, code = sampan(t, "", "pod", "rm", "--endpoint", endpoint, "web-server"); code != 0 {
		t.Fatal(errOut)
	}
	if len(f.pods) != 0 || len(logDirectories(t, namespace)) != 0 {
		t.Error("the pod or its log directory is still there")
	}
}

func TestRunLeavesNothingWhenItFails(t *testing.T) {
	for _, call := range []string{"PullImage", "RunPodSandbox", "CreateContainer", "StartContainer", "PodSandboxStatus"} {
		t.Run(call, func(t *testing.T) {
			f, endpoint := startFake(t)
			namespace := ownNamespace(t)
			f.fail[call] = status.Error(codes.ResourceExhausted, "disk full")
			_, errOut, code := sampan(t, "", "run", "--endpoint", endpoint, "--namespace", namespace, "a/b:c")
			if code != 1 {
				t.Error("it succeeded")
			}
			mustContain(t, errOut, "disk full (ResourceExhausted)")
			if len(f.pods) != 0 || len(logDirectories(t, namespace)) != 0 {
				t.Error("something was left behind")
			}
		})
	}
}

func TestRemoveLeavesLogsOfOthersAlone(t *testing.T) {
	f, endpoint := startFake(t)
	namespace := ownNamespace(t)
	m := &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: namespace, Uid: "u"}
	if err := os.MkdirAll(logDirectory(m), 0o755); err != nil {
		t.Fatal(err)
	}
	f.pods = []*runtimeapi.PodSandbox{{Id: f.id(), Metadata: m}}
	if _, errOut, code := sampan(t, "", "pod", "rm", "--endpoint", endpoint, "--all"); code != 0 {
		t.Fatal(errOut)
	}
	if len(f.pods) != 0 || len(logDirectories(t, namespace)) != 1 {
		t.Errorf("pods %v, logs %v", f.pods, logDirectories(t, namespace))
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, runMark), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// Its directory is logRoot/x_/../../../..OUTSIDE/_u/..
	evil := &runtimeapi.PodSandbox{Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "x", Name: "/../../../.." + outside + "/", Uid: "/.."}}
	if dir, ok := ownLogDirectory(evil); ok {
		t.Errorf("would remove %s", dir)
	} else if dir != outside {
		t.Errorf("the test's pod has the directory %s, not %s", dir, outside)
	}
}

func TestStatus(t *testing.T) {
	f, endpoint := startFake(t)
	f.conditions = []*runtimeapi.RuntimeCondition{{Type: "RuntimeReady", Status: true}, {Type: "NetworkReady", Status: true}, {Type: "Extra"}}
	out, errOut, code := sampan(t, "", "status", "--endpoint", endpoint)
	if code != 0 {
		t.Error(errOut)
	}
	mustContain(t, out, "fake 7, CRI v1", "RuntimeReady: yes", "Extra: no", "handlers: builtin, runc")
	f.conditions[1] = &runtimeapi.RuntimeCondition{Type: "NetworkReady", Reason: "NoConfig", Message: "no CNI configuration"}
	if out, _, code = sampan(t, "", "status", "--endpoint", endpoint); code != 1 {
		t.Errorf("exit code %d", code)
	}
	mustContain(t, out, "NetworkReady: no (NoConfig: no CNI configuration)")
}

func TestImages(t *testing.T) {
	f, endpoint := startFake(t)
	credentials := filepath.Join(t.TempDir(), "auth")
	if err := os.WriteFile(credentials, []byte("ann:pass:word\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errOut, code := sampan(t, "", "image", "pull", "--endpoint", endpoint, "--auth-file", credentials, "x:1")
	if code != 0 || out != "sha256:1\n" {
		t.Errorf("%d %q %q", code, out, errOut)
	}
	out, _, _ = sampan(t, "", "image", "ls", "--endpoint", endpoint)
	mustContain(t, out, "IMAGE", "x:1", "1.2MB", "cccccccccccc\n")
	if _, errOut, code = sampan(t, "", "image", "rm", "--endpoint", endpoint, "x:1"); code != 0 {
		t.Error(errOut)
	}
	_, errOut, code = sampan(t, "", "image", "rm", "--endpoint", endpoint, "x:1")
	if code != 1 {
		t.Error("removed an image that is not there")
	}
	mustContain(t, errOut, "image x:1: there is none")

	out, errOut, code = sampan(t, "archive", "image", "load", "--endpoint", endpoint, "--name", "n:1", "-")
	if code != 0 || out != "n:1 sha256:abc\n" || f.loaded != 7 {
		t.Errorf("%d %q %q, %d bytes", code, out, errOut, f.loaded)
	}
	if _, _, code = sampan(t, "", "image", "load", "--endpoint", endpoint, "--builtin", "file"); code != 1 {
		t.Error("took both FILE and --builtin")
	}
}

func TestExec(t *testing.T) {
	f, endpoint := startFake(t)
	m := &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}
	f.pods = []*runtimeapi.PodSandbox{{Id: f.id(), Metadata: m, State: runtimeapi.PodSandboxState_SANDBOX_READY}}
	f.containers = []*runtimeapi.Container{{Id: f.id(), PodSandboxId: f.pods[0].GetId(), Metadata: &runtimeapi.ContainerMetadata{Name: "c"}}}
	f.exec = &runtimeapi.ExecSyncResponse{Stdout: []byte("out"), Stderr: []byte("err"), ExitCode: 42}
	for _, name := range []string{"p", "p/c", "n/p", "n/p/c", short(f.containers[0].GetId())} {
		out, errOut, code := sampan(t, "", "exec", "--endpoint", endpoint, name, "--", "ls", "-l")
		if code != 42 || out != "out" || !strings.HasPrefix(errOut, "err") {
			t.Errorf("%s: %d %q %q", name, code, out, errOut)
		}
	}
	_, errOut, _ := sampan(t, "", "exec", "--endpoint", endpoint, "p/d", "--", "ls")
	mustContain(t, errOut, "container d: pod p has none of that name")
	_, errOut, _ = sampan(t, "", "exec", "--endpoint", endpoint, "q", "--", "ls")
	mustContain(t, errOut, "pod q: there is none")
}

func TestErrorsSpeakToPeople(t *testing.T) {
	f, endpoint := startFake(t)
	_, errOut, code := sampan(t, "", "status", "--endpoint", filepath.Join(t.TempDir(), "none.sock"))
	if code != 1 {
		t.Error("no error")
	}
	mustContain(t, errOut, "no daemon answers at", "sampan serve", "no such file")
	f.fail["ListPodSandbox"] = status.Error(codes.Unimplemented, "unknown method")
	_, errOut, _ = sampan(t, "", "pod", "stop", "--endpoint", endpoint, "x")
	mustContain(t, errOut, "cannot do this")
	_, errOut, _ = sampan(t, "", "pod", "ls", "--endpoint", "tcp://1.2.3.4:5")
	mustContain(t, errOut, "must be a unix socket")
	if strings.Contains(errOut, "rpc error") {
		t.Error(errOut)
	}
}

func TestConfigVerbs(t *testing.T) {
	out, _, code := sampan(t, "", "config", "default")
	if code != 0 {
		t.Fatal(code)
	}
	path := filepath.Join(t.TempDir(), "c.toml")
	text := out + "\n[handlers.gone]\npath = \"/no/such/runtime\"\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errOut, code := sampan(t, "", "config", "check", path)
	if code != 0 {
		t.Error(errOut)
	}
	mustContain(t, out, "is valid")
	mustContain(t, errOut, "/no/such/runtime does not exist")
	if err := os.WriteFile(path, []byte("[keeper]\nisolatoin = \"pod\""), 0o644); err != nil {
		t.Fatal(err)
	}
	_, errOut, code = sampan(t, "", "config", "check", path)
	if code != 1 {
		t.Error("accepted an unknown key")
	}
	mustContain(t, errOut, `"keeper.isolatoin"`, `"keeper.isolation"`)
}

func TestParsePublish(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"8080:80", "TCP  8080 80"},
		{"53:53/udp", "UDP  53 53"},
		{"1:2/SCTP", "SCTP  1 2"},
		{"127.0.0.1:8080:80", "TCP 127.0.0.1 8080 80"},
		{"[::1]:8080:80/tcp", "TCP ::1 8080 80"},
		{"80", ""}, {"0:80", ""}, {"80:0", ""}, {"x:80", ""}, {"70000:80", ""}, {"80:80/icmp", ""}, {"host:80:80", ""}, {"80:80/", ""}, {"", ""},
	} {
		m, err := parsePublish(test.in)
		got := ""
		if err == nil {
			got = strings.Join([]string{m.GetProtocol().String(), m.GetHostIp(), strconv.Itoa(int(m.GetHostPort())), strconv.Itoa(int(m.GetContainerPort()))}, " ")
		}
		if got != test.want {
			t.Errorf("%q: got %q, want %q (%v)", test.in, got, test.want, err)
		}
	}
}

func TestWords(t *testing.T) {
	for n, want := range map[uint64]string{0: "0B", 999: "999B", 1000: "1.0kB", 999_950: "1.0MB", 5_300_000_000: "5.3GB"} {
		if got := size(n); !strings.EqualFold(got, want) {
			t.Errorf("size %d: got %s, want %s", n, got, want)
		}
	}
	for image, want := range map[string]string{
		"nginx": "nginx", "localhost:5000/a/My_App:v1": "my-app", "x/y@sha256:00": "y", "redis:7@sha256:00": "redis",
	} {
		if got := nameOf(image); got != want {
			t.Errorf("%s: got %s, want %s", image, got, want)
		}
	}
}
