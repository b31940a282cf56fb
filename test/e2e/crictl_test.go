package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
)

// crictl is a shell session: a command that fails ends the test.
type crictl struct {
	*testing.T
	lab *lab.Lab
}

func (c crictl) run(args ...string) string {
	c.Helper()
	out, _, err := c.lab.Crictl(args...)
	if err != nil {
		c.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// logs returns a container's log of both streams.
func (c crictl) logs(id string) string {
	c.Helper()
	out, stderr, err := c.lab.Crictl("logs", id)
	if err != nil {
		c.Fatal(err)
	}
	return out + stderr
}

// parse runs a command that prints JSON.
func (c crictl) parse(into any, args ...string) {
	c.Helper()
	out := c.run(args...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		c.Fatalf("crictl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// fails runs a command that must fail with a text in its error.
func (c crictl) fails(text string, args ...string) {
	c.Helper()
	out, _, err := c.lab.Crictl(args...)
	if err == nil || !strings.Contains(err.Error(), text) {
		c.Errorf("crictl %s: %v (%s), want an error with %q", strings.Join(args, " "), err, out, text)
	}
}

func (c crictl) write(name string, v any) string {
	c.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		c.Fatal(err)
	}
	path := filepath.Join(c.lab.Dir, name)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		c.Fatal(err)
	}
	return path
}

type object = map[string]any

type inspection struct {
	Status struct {
		State     string
		Network   struct{ IP string }
		ExitCode  int
		Reason    string
		Image     struct{ Image string }
		ImageRef  string
		Resources struct {
			Linux struct {
				CPUShares          int64 `json:"cpuShares,string"`
				MemoryLimitInBytes string
			}
		}
	}
}

// TestCrictl does a working day's commands on a real web server.
func TestCrictl(t *testing.T) {
	l := lab.New(t, lab.Options{})
	c := crictl{t, l}

	var info struct {
		Status struct {
			Conditions []struct {
				Type   string
				Status bool
			}
		}
	}
	c.parse(&info, "info")
	for _, want := range []string{"RuntimeReady", "NetworkReady"} {
		if !slices.ContainsFunc(info.Status.Conditions, func(x struct {
			Type   string
			Status bool
		}) bool {
			return x.Type == want && x.Status
		}) {
			t.Errorf("info: %s is not true: %+v", want, info.Status.Conditions)
		}
	}

	c.images()

	ownPID := object{"namespace_options": object{"pid": 1}} // as kubelets have it
	podFile := c.write("pod.json", object{
		"metadata":      object{"name": "web", "namespace": "shop", "uid": "web-1"},
		"hostname":      "web",
		"log_directory": filepath.Join(l.Logs(), "web"),
		"labels":        object{"app": "web"},
		"port_mappings": []object{{"protocol": 0, "container_port": 80, "host_port": 18080}},
		"linux":         object{"security_context": ownPID},
	})
	containerFile := c.write("container.json", object{
		"metadata": object{"name": "nginx"},
		"image":    object{"image": "docker.io/library/nginx:latest"},
		"log_path": "nginx.log",
		"linux":    object{"resources": object{"memory_limit_in_bytes": 64 << 20}, "security_context": ownPID},
	})

	pod := c.run("runp", podFile)
	if again := pod; again != pod {
		t.Errorf("runp, a second time: %s, want the same pod %s", again, pod)
	}
	var inspectp inspection
	c.parse(&inspectp, "inspectp", pod)
	ip := inspectp.Status.Network.IP
	if inspectp.Status.State != "SANDBOX_READY" || !strings.HasPrefix(ip, "10.88.") {
		t.Fatalf("inspectp: state %s, address %q", inspectp.Status.State, ip)
	}
	if out := c.run("pods", "--label", "app=web", "-q"); out != pod {
		t.Errorf("pods with the label: %q, want %s", out, pod)
	}

	id := c.run("create", pod, containerFile, podFile)
	if out := c.run("ps", "-q"); out != "" {
		t.Errorf("ps, with nothing started: %q", out)
	}
	c.fails("", "exec", "-s", id, "true") // not running yet
	c.run("start", id)
	if out := c.run("ps", "-q"); out != id {
		t.Errorf("ps: %q, want %s", out, id)
	}

	follow := c.follow(id)
	for _, url := range []string{"http://" + ip, "http://127.0.0.1:18080"} {
		if page := get(t, url); !strings.Contains(page, "Welcome to nginx!") {
			t.Errorf("GET %s: %q", url, page)
		}
	}
	follow("GET / HTTP/1.1")
	if logs := c.logs(id); strings.Count(logs, "GET / HTTP/1.1") != 2 {
		t.Errorf("logs: want two requests in\n%s", logs)
	}

	if out := c.run("exec", "-s", id, "sh", "-c", "hostname; cat /proc/1/comm"); out != "web\nnginx" {
		t.Errorf("exec: %q", out)
	}
	c.fails("exited with 7", "exec", "-s", id, "sh", "-c", "exit 7")

	c.run("update", "--memory", fmt.Sprint(96<<20), "--cpu-share", "512", id)
	var inspect inspection
	c.parse(&inspect, "inspect", id)
	r := inspect.Status.Resources.Linux
	if inspect.Status.State != "CONTAINER_RUNNING" || r.MemoryLimitInBytes != fmt.Sprint(96<<20) {
		t.Errorf("inspect after update: state %s, resources %+v", inspect.Status.State, r)
	}
	// What the kernel says, in either cgroup version.
	limit := c.run("exec", "-s", id, "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true")
	if limit != fmt.Sprint(96<<20) {
		t.Errorf("memory limit after update: %s, want %d", limit, 96<<20)
	}

	c.run("stop", "--timeout", "20", id)
	c.parse(&inspect, "inspect", id)
	if inspect.Status.State != "CONTAINER_EXITED" || inspect.Status.ExitCode != 0 || inspect.Status.Reason != "Completed" {
		t.Errorf("inspect after stop: %+v, want exited, code 0, completed", inspect.Status)
	}
	if out := c.run("ps", "-a", "-q", "--state", "Exited"); out != id {
		t.Errorf("ps -a: %q, want %s", out, id)
	}
	if logs := c.logs(id); !strings.Contains(logs, "gracefully shutting down") {
		t.Errorf("logs after stop: nginx got no SIGQUIT:\n%s", logs)
	}
	c.run("rm", id)
	c.run("stopp", pod)
	c.parse(&inspectp, "inspectp", pod)
	if inspectp.Status.State != "SANDBOX_NOTREADY" {
		t.Errorf("inspectp after stopp: %s", inspectp.Status.State)
	}
	c.run("rmp", pod)
	if out := c.run("pods", "-q"); out != "" {
		t.Errorf("pods, with all removed: %q", out)
	}

	c.runOnce()
	c.run("rmi", "--all")
	if out := c.run("images", "-q"); out != "" {
		t.Errorf("images, with all removed: %q", out)
	}
	l.CheckClean(t)
}

// images pulls, lists, inspects and removes images.
func (c crictl) images() {
	c.Helper()
	c.run("pull", "nginx")
	c.run("pull", "quay.io/sampan/variants:oci-zstd")
	var list struct {
		Images []struct {
			ID          string
			RepoTags    []string
			RepoDigests []string
			Size        string
		}
	}
	c.parse(&list, "images", "-o", "json")
	if len(list.Images) != 2 {
		c.Fatalf("images: %+v, want two", list.Images)
	}
	for _, image := range list.Images {
		if len(image.RepoTags) != 1 || len(image.RepoDigests) != 1 || image.Size == "0" {
			c.Errorf("images: %+v, want a tag, a digest and a size", image)
		}
	}
	var image struct {
		Status struct{ ID string }
	}
	c.parse(&image, "inspecti", "nginx")
	if !slices.ContainsFunc(list.Images, func(i struct {
		ID          string
		RepoTags    []string
		RepoDigests []string
		Size        string
	}) bool {
		return i.ID == image.Status.ID && i.RepoTags[0] == "docker.io/library/nginx:latest"
	}) {
		c.Errorf("inspecti: id %s is not among %+v", image.Status.ID, list.Images)
	}
	var usage struct {
		Status struct {
			ImageFilesystems []struct {
				FsID      struct{ Mountpoint string }
				UsedBytes struct{ Value string }
			}
		}
	}
	c.parse(&usage, "imagefsinfo")
	if fs := usage.Status.ImageFilesystems; len(fs) != 1 || fs[0].UsedBytes.Value == "" || fs[0].FsID.Mountpoint == "" {
		c.Errorf("imagefsinfo: %+v", usage)
	}
	c.run("rmi", "quay.io/sampan/variants:oci-zstd")
	c.fails("no such image", "inspecti", "quay.io/sampan/variants:oci-zstd")
}

// runOnce is crictl's run: a pod and a container at once, with the pull.
func (c crictl) runOnce() {
	c.Helper()
	pod := c.write("once-pod.json", object{
		"metadata":      object{"name": "once", "namespace": "shop", "uid": "once-1"},
		"log_directory": filepath.Join(c.lab.Logs(), "once"),
	})
	container := c.write("once.json", object{
		"metadata": object{"name": "once"},
		"image":    object{"image": "busybox"},
		"command":  []string{"sh", "-c", "echo out; echo err >&2; exit 3"},
		"log_path": "once.log",
	})
	id := c.run("run", "--with-pull", container, pod)
	var s inspection
	for end := time.Now().Add(10 * time.Second); s.Status.State != "CONTAINER_EXITED" && time.Now().Before(end); {
		c.parse(&s, "inspect", id)
	}
	if s.Status.ExitCode != 3 || s.Status.Reason != "Error" {
		c.Errorf("run: %+v, want exit code 3, reason Error", s.Status)
	}
	if out := c.run("logs", "--stream", "stdout", id); out != "out" {
		c.Errorf("logs of stdout: %q", out)
	}
	c.run("rmp", "--force", c.run("pods", "--name", "once", "-q"))
}

// follow starts `crictl logs -f` and returns a function that waits for a text
// in what it prints, and ends it.
func (c crictl) follow(id string) func(text string) {
	c.Helper()
	file, err := os.Create(filepath.Join(c.lab.Dir, "follow"))
	if err != nil {
		c.Fatal(err)
	}
	cmd, err := c.lab.StartCrictl(file, "logs", "-f", id)
	if err != nil {
		c.Fatal(err)
	}
	return func(text string) {
		c.Helper()
		defer func() {
			cmd.Process.Kill() //nolint:errcheck // it may have ended
			cmd.Wait()         //nolint:errcheck // it was killed
			file.Close()
		}()
		var got []byte
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if got, err = os.ReadFile(file.Name()); err == nil && strings.Contains(string(got), text) {
				return
			}
		}
		c.Errorf("logs -f: no %q after 10 s in\n%s", text, got)
	}
}

// get fetches a page; a server that has just started is given some seconds.
func get(t *testing.T, url string) string {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		response, err := client.Get(url)
		if err == nil {
			page, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err == nil {
				return string(page)
			}
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}
