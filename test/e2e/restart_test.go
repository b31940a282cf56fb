package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestRestart stops the daemon with pods running, twice. They run on, and
// nothing about them changes.
func TestRestart(t *testing.T) {
	l := lab.New(t, lab.Options{})
	podConfig := l.PodConfig("web")
	podConfig.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 18082}}
	podConfig.Annotations = map[string]string{"example.test/note": "line one\nline two"}
	pod := l.RunPod(t, podConfig)
	id := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("nginx", l.Pull(t, "nginx")))
	l.StartContainer(t, id)
	waiting := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("waiting", "nginx", "true"))

	before, podBefore := l.Status(t, id), podStatus(t, l, pod)
	page := "http://" + podBefore.GetNetwork().GetIp()
	for range 2 {
		l.Stop(t)
		if !strings.Contains(get(t, page), "Welcome to nginx!") {
			t.Errorf("GET %s while there is no daemon: not nginx's page", page)
		}
		l.Start(t)
		if after := l.Status(t, id); !proto.Equal(after, before) {
			t.Errorf("container after a restart:\n%v\nbefore:\n%v", after, before)
		}
		if after := podStatus(t, l, pod); !proto.Equal(after, podBefore) {
			t.Errorf("pod after a restart:\n%v\nbefore:\n%v", after, podBefore)
		}
		if out := l.ExecSync(t, id, "hostname"); string(out.GetStdout()) != "web\n" {
			t.Errorf("exec after a restart: %q, %q", out.GetStdout(), out.GetStderr())
		}
		if again := l.RunPod(t, podConfig); again != pod {
			t.Errorf("the same pod, run again after a restart: %s, want %s", again, pod)
		}
	}
	l.StartContainer(t, waiting) // created before the restarts
	if code := l.AwaitExit(t, waiting, lab.Wait).GetExitCode(); code != 0 {
		t.Errorf("container created before the restarts: exit code %d", code)
	}
	get(t, "http://127.0.0.1:18082")
	l.RemovePod(t, pod)
	l.RemoveImage(t, "nginx")
	l.CheckClean(t)
}

func podStatus(t *testing.T, l *lab.Lab, pod string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	r, err := l.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetStatus()
}

// TestReset kills the daemon with a pod running and lets `sampan reset` clear
// the host. The lab then finds nothing.
func TestReset(t *testing.T) {
	l := lab.New(t, lab.Options{})
	podConfig := l.PodConfig("web")
	pod := l.RunPod(t, podConfig)
	id := l.CreateContainer(t, pod, podConfig, l.ContainerConfig("nginx", l.Pull(t, "nginx")))
	l.StartContainer(t, id)
	l.Kill(t)
}

// TestCNI switches from the built-in network to CNI plugins while the daemon
// runs: pods get their addresses from what is in force when they start, and
// leave through what they came by.
func TestCNI(t *testing.T) {
	lab.Require(t)
	const plugins = "/usr/lib/cni"
	if _, err := exec.LookPath(plugins + "/bridge"); err != nil {
		t.Fatalf("%v: install containernetworking-plugins", err)
	}
	conf := t.TempDir()
	l := lab.New(t, lab.Options{Config: "[network]\nmode = \"auto\"\nsubnet = \"" + lab.Subnet + "\"\ncni_conf_dir = \"" + conf + "\"\ncni_bin_dirs = [\"" + plugins + "\"]\n"})
	// The plugins leave their bridge and chains for the next pod.
	l.Foreign = regexp.MustCompile(`^link lab0$|^nft table ip6? (nat|filter|mangle|raw)`)
	image := l.Pull(t, "nginx")
	run := func(name string, hostPort int32) (pod, ip string) {
		t.Helper()
		config := l.PodConfig(name)
		config.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: hostPort}}
		pod = l.RunPod(t, config)
		l.StartContainer(t, l.CreateContainer(t, pod, config, l.ContainerConfig("nginx", image)))
		return pod, podStatus(t, l, pod).GetNetwork().GetIp()
	}
	first, ip := run("builtin", 18083)
	if !strings.HasPrefix(ip, "10.88.") {
		t.Errorf("pod before there is a CNI configuration: address %s, want 10.88.…", ip)
	}
	writeCNI(t, conf)
	var second string
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		second, ip = run("plugins", 18084)
		if strings.HasPrefix(ip, "10.99.") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("pod after there is a CNI configuration: address %s, want 10.99.…", ip)
		}
		l.RemovePod(t, second)
	}
	for _, url := range []string{"http://" + ip, "http://127.0.0.1:18084", "http://127.0.0.1:18083"} {
		if !strings.Contains(get(t, url), "Welcome to nginx!") {
			t.Errorf("GET %s: not nginx's page", url)
		}
	}
	// The daemon that removes them is another than the one that made them.
	l.Kill(t)
	l.Start(t)
	l.RemovePod(t, first)
	l.RemovePod(t, second)
	if left, err := filepath.Glob(filepath.Join(conf, "ipam", "lab", "[0-9]*")); err != nil || len(left) > 0 {
		t.Errorf("addresses that the plugins were never told to free: %v %v", left, err)
	}
}

func writeCNI(t *testing.T, dir string) {
	t.Helper()
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "lab", "plugins": [
	{"type": "bridge", "bridge": "lab0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
	 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.99.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
	{"type": "portmap", "capabilities": {"portMappings": true}}]}`, filepath.Join(dir, "ipam"))
	temporary := filepath.Join(dir, "10-lab.conflist.new")
	if err := os.WriteFile(temporary, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(dir, "10-lab.conflist")); err != nil {
		t.Fatal(err)
	}
}
