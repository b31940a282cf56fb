package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

// checkError compares an error with the codes it may have and the texts it must
// have: what is wrong, and where.
func checkError(t *testing.T, err error, want []codes.Code, texts ...string) {
	t.Helper()
	if err == nil {
		t.Error("no error")
		return
	}
	s := status.Convert(err)
	if !slices.Contains(want, s.Code()) {
		t.Errorf("code %v, want %v: %s", s.Code(), want, s.Message())
	}
	for _, text := range texts {
		if !strings.Contains(s.Message(), text) {
			t.Errorf("error does not tell %q: %s", text, s.Message())
		}
	}
	if len(s.Message()) > 1000 || strings.ContainsAny(s.Message(), "\n\r") {
		t.Errorf("error is no line that a person reads: %q", s.Message())
	}
}

// TestBadRequests sends requests that cannot be served, and looks for what they
// leave behind.
func TestBadRequests(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	podConfig := l.PodConfig("holder")
	podConfig.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 18081}}
	pod := l.RunPod(t, podConfig)
	// The pod's cgroup comes with its first container, and stays with the pod.
	l.CreateContainer(t, pod, podConfig, l.ContainerConfig("first", image))
	clean := l.Mark(t)

	// Names of their own, lest a request join what an earlier one should not have made.
	made := 0
	bad := func() string { made++; return fmt.Sprint("bad-", made) }
	runPod := func(handler string, edit func(*runtimeapi.PodSandboxConfig)) func(context.Context) error {
		config := l.PodConfig(bad())
		if edit != nil {
			edit(config)
		}
		return func(ctx context.Context) error {
			_, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
			return err
		}
	}
	create := func(edit func(*runtimeapi.ContainerConfig)) func(context.Context) error {
		config := l.ContainerConfig(bad(), image, "sh")
		edit(config)
		return func(ctx context.Context) error {
			_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
			return err
		}
	}
	pull := func(ref string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
			return err
		}
	}
	namespaces := func(c *runtimeapi.ContainerConfig) *runtimeapi.NamespaceOption {
		return c.Linux.SecurityContext.NamespaceOptions
	}
	mount := func(host, container string) func(context.Context) error {
		return create(func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: host, ContainerPath: container}}
		})
	}
	file := filepath.Join(l.Dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	invalid := []codes.Code{codes.InvalidArgument}
	missing := []codes.Code{codes.NotFound}

	for _, tt := range []struct {
		name  string
		call  func(context.Context) error
		codes []codes.Code
		texts []string
	}{
		{"unknown handler", runPod("no-such", nil), []codes.Code{codes.InvalidArgument, codes.NotFound}, []string{"no-such"}},
		{"host port twice", runPod("", func(c *runtimeapi.PodSandboxConfig) { c.PortMappings = podConfig.PortMappings }),
			[]codes.Code{codes.AlreadyExists, codes.FailedPrecondition}, []string{"18081", "holder"}},
		{"no such network mode", runPod("", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_CONTAINER
		}), invalid, []string{"network"}},
		{"pod pid namespace of a target", runPod("", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		}), invalid, []string{"pid"}},
		{"number that is no mode", runPod("", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = 77
		}), invalid, []string{"ipc", "77"}},
		{"sysctl of the host", runPod("", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"kernel.panic": "1"}
		}), invalid, []string{"kernel.panic"}},
		{"no name", runPod("", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }), invalid, []string{"name"}},

		{"image not pulled", create(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "docker.io/library/absent:1" }), missing, []string{"docker.io/library/absent:1"}},
		{"mount of nothing", mount("/proc/no/such/source", "/mnt"), invalid, []string{"/proc/no/such/source"}},
		{"mount of a relative path", mount("some/where", "/mnt"), invalid, []string{"some/where"}},
		{"mount without a place", mount("/etc", ""), invalid, []string{"container_path"}},
		{"namespace of no target", create(func(c *runtimeapi.ContainerConfig) {
			namespaces(c).Pid = runtimeapi.NamespaceMode_TARGET
		}), invalid, []string{"target"}},
		{"namespace of an absent target", create(func(c *runtimeapi.ContainerConfig) {
			namespaces(c).Pid, namespaces(c).TargetId = runtimeapi.NamespaceMode_TARGET, strings.Repeat("ab", 32)
		}), []codes.Code{codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition}, []string{strings.Repeat("ab", 32)}},
		{"network namespace of a container", create(func(c *runtimeapi.ContainerConfig) {
			namespaces(c).Network = runtimeapi.NamespaceMode_CONTAINER
		}), invalid, []string{"network"}},
		{"container in an absent pod", func(ctx context.Context) error {
			_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
				PodSandboxId: strings.Repeat("cd", 32), Config: l.ContainerConfig(bad(), image, "sh"), SandboxConfig: podConfig})
			return err
		}, missing, []string{strings.Repeat("cd", 32)}},
		{"start of what is absent", func(ctx context.Context) error {
			_, err := l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: strings.Repeat("ef", 32)})
			return err
		}, missing, []string{strings.Repeat("ef", 32)}},

		{"image that no registry has", pull("docker.io/library/absent:1"), missing, []string{"docker.io/library/absent:1", strings.TrimPrefix(l.Registry, "http://")}},
		{"tag that the repository lacks", pull("docker.io/library/nginx:no-such-tag"), missing, []string{"no-such-tag"}},
		{"reference that is none", pull("Not A Reference!"), invalid, []string{"Not A Reference!"}},
		{"digest that is none", pull("docker.io/library/nginx@sha256:1234"), invalid, []string{"sha256:1234"}},
		{"pull for an unknown handler", func(ctx context.Context) error {
			_, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox", RuntimeHandler: "no-such"}})
			return err
		}, invalid, []string{"no-such", "builtin"}},
		{"no reference", pull(""), invalid, []string{"image"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
			defer cancel()
			checkError(t, tt.call(ctx), tt.codes, tt.texts...)
			l.CheckSince(t, clean)
			if t.Failed() {
				clean = l.Mark(t) // so that the next case speaks for itself
			}
		})
	}

	t.Run("command that is absent", func(t *testing.T) {
		// Create may find it out, or Start; the container then tells why.
		ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
		defer cancel()
		config := l.ContainerConfig("absent", image)
		config.Command = []string{"/no/such/command"}
		r, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
		if err == nil {
			_, err = l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.GetContainerId()})
			if s := l.Status(t, r.GetContainerId()); s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() == 0 {
				t.Errorf("container that could not start: %v, exit code %d", s.GetState(), s.GetExitCode())
			}
			if _, err := l.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: r.GetContainerId()}); err != nil {
				t.Error(err)
			}
		}
		checkError(t, err, []codes.Code{codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.Unknown}, "/no/such/command")
		l.CheckSince(t, clean)
	})
}

// TestTooLittleMemory: a limit that not even a container's first steps fit in. When
// the kernel minds is its own affair.
func TestTooLittleMemory(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image, podConfig := l.Pull(t, "busybox"), l.PodConfig("small")
	pod := l.RunPod(t, podConfig)
	for i := range 10 {
		config := l.ContainerConfig(fmt.Sprint("small-", i), image, "sleep", "1000")
		config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1}
		r, err := l.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
		if err != nil {
			checkError(t, err, []codes.Code{codes.ResourceExhausted}, "memory", "limit")
			continue
		}
		// It may have ended already, and then was never started.
		_, err = l.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: r.GetContainerId()})
		if err != nil {
			checkError(t, err, []codes.Code{codes.FailedPrecondition}, config.Metadata.Name)
		}
		await(t, "the end of "+config.Metadata.Name, func() bool {
			return l.Status(t, r.GetContainerId()).GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
		})
		if st := l.Status(t, r.GetContainerId()); st.GetExitCode() != 137 || st.GetReason() != "OOMKilled" {
			t.Errorf("%s: %v", config.Metadata.Name, st)
		}
	}
	l.RemovePod(t, pod)
}

// TestBadRegistries pulls from registries that fail or lie.
func TestBadRegistries(t *testing.T) {
	l := lab.New(t, lab.Options{})
	good, err := images.Handler(os.Getenv(lab.Images))
	if err != nil {
		t.Fatal(err)
	}
	answer := func(code int, header, value, body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if header != "" {
				w.Header().Set(header, value)
			}
			w.WriteHeader(code)
			io.WriteString(w, body) //nolint:errcheck // the client may be gone
		})
	}
	const page = "<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>"
	down := []codes.Code{codes.Unavailable, codes.Unknown}
	for _, tt := range []struct {
		name    string
		handler http.Handler // nil: nobody listens
		codes   []codes.Code
		texts   []string
	}{
		{"unreachable", nil, down, []string{"refused"}},
		{"answers 401", answer(401, "", "", `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`), []codes.Code{codes.PermissionDenied}, []string{"401"}},
		{"asks for a password", answer(401, "WWW-Authenticate", `Basic realm="closed"`, ""), []codes.Code{codes.PermissionDenied}, []string{"401"}},
		{"answers 403", answer(403, "", "", ""), []codes.Code{codes.PermissionDenied}, []string{"403"}},
		{"answers 404", answer(404, "", "", `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`), []codes.Code{codes.NotFound}, nil},
		{"answers 429", answer(429, "Retry-After", "3600", ""), []codes.Code{codes.ResourceExhausted}, []string{"429"}},
		{"answers 500", answer(500, "", "", ""), down, []string{"500"}},
		{"answers HTML", answer(200, "Content-Type", "text/html", page), down, []string{"html"}},
		{"serves the wrong manifest", liar(good, manifests, flip), []codes.Code{codes.DataLoss}, []string{"sha256:"}},
		{"serves a wrong config", liar(good, configs, flip), []codes.Code{codes.DataLoss}, []string{"sha256:"}},
		{"serves a wrong layer", liar(good, layers, flip), []codes.Code{codes.DataLoss}, []string{"sha256:"}},
		{"serves half a layer", liar(good, layers, half), []codes.Code{codes.Unavailable, codes.DataLoss, codes.Unknown}, nil},
		{"serves too much", liar(good, layers, double), []codes.Code{codes.DataLoss}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := strings.ReplaceAll(tt.name, " ", "-") + ".test"
			var url string
			if tt.handler != nil {
				url = lab.Serve(t, tt.handler)
			} else {
				url = closedURL(t)
			}
			if err := images.WriteHosts(l.Hosts, url, host); err != nil {
				t.Fatal(err)
			}
			ref := host + "/sampan/variants:oci-index"
			ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
			defer cancel()
			_, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
			checkError(t, err, tt.codes, append(tt.texts, ref, strings.TrimPrefix(url, "http://"))...)
			l.CheckClean(t)
		})
	}
	// None of it is remembered against the same image from an honest registry.
	l.RemoveImage(t, l.Pull(t, "quay.io/sampan/variants:oci-index"))
}

func closedURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

// What a liar lies about, by the path and the size of the true answer.
func manifests(path string, _ int) bool  { return strings.Contains(path, "/manifests/sha256") }
func configs(path string, size int) bool { return strings.Contains(path, "/blobs/") && size < 1<<16 }
func layers(path string, size int) bool  { return strings.Contains(path, "/blobs/") && size >= 1<<16 }

// liar answers as h does, but some of it goes through lie.
func liar(h http.Handler, about func(string, int) bool, lie func(http.ResponseWriter, int, []byte)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		honest := httptest.NewRecorder()
		h.ServeHTTP(honest, r)
		for key, values := range honest.Header() {
			w.Header()[key] = values
		}
		body := honest.Body.Bytes()
		if r.Method == http.MethodGet && about(r.URL.Path, len(body)) {
			lie(w, honest.Code, body)
			return
		}
		w.WriteHeader(honest.Code)
		w.Write(body) //nolint:errcheck // the client may be gone
	})
}

// flip changes one byte in the middle.
func flip(w http.ResponseWriter, code int, body []byte) {
	body = bytes.Clone(body)
	body[len(body)/2] ^= 1
	send(w, code, len(body), body)
}

// half promises all and breaks off; who asks for the rest gets nothing.
func half(w http.ResponseWriter, code int, body []byte) {
	whole := len(body)
	if code == http.StatusPartialContent {
		body = nil
	}
	send(w, code, whole, body[:len(body)/2])
	panic(http.ErrAbortHandler)
}

// double sends the body and then as much again.
func double(w http.ResponseWriter, code int, body []byte) {
	send(w, code, 2*len(body), append(bytes.Clone(body), body...))
}

func send(w http.ResponseWriter, code, length int, body []byte) {
	w.Header().Set("Content-Length", fmt.Sprint(length))
	w.WriteHeader(code)
	w.Write(body)                         //nolint:errcheck // the client may have seen enough
	http.NewResponseController(w).Flush() //nolint:errcheck
}

// TestFullDisk lets the daemon's disk run full: a pull and a pod fail clearly,
// leave nothing, and succeed when there is room again.
func TestFullDisk(t *testing.T) {
	disk := lab.SmallDisk(t, "size=128m")
	l := lab.New(t, lab.Options{Root: filepath.Join(disk, "sampan")})
	full := []codes.Code{codes.ResourceExhausted}
	ctx, cancel := context.WithTimeout(t.Context(), 3*lab.Wait)
	defer cancel()

	t.Run("pull", func(t *testing.T) {
		free := lab.FillDisk(t, disk, 1<<20)
		_, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "nginx"}})
		checkError(t, err, full, "no space left on device", "nginx")
		l.CheckClean(t)
		free()
	})
	image := l.Pull(t, "nginx")
	t.Run("pod", func(t *testing.T) {
		clean := l.Mark(t)
		free := lab.FillDisk(t, disk, 0)
		_, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: l.PodConfig("full")})
		checkError(t, err, full, "no space left on device")
		l.CheckSince(t, clean)
		free()
		l.RemovePod(t, l.RunPod(t, l.PodConfig("full")))
	})
	t.Run("container", func(t *testing.T) {
		podConfig := l.PodConfig("full")
		pod := l.RunPod(t, podConfig)
		// The pod's cgroup comes with its first container, and stays with the pod.
		l.CreateContainer(t, pod, podConfig, l.ContainerConfig("first", image))
		clean := l.Mark(t)
		free := lab.FillDisk(t, disk, 0)
		config := l.ContainerConfig("full", image)
		_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
		checkError(t, err, full, "no space left on device")
		l.CheckSince(t, clean)
		free()
		l.StartContainer(t, l.CreateContainer(t, pod, podConfig, config))
		// To stop and remove must work on a full disk: it is how room is made.
		free = lab.FillDisk(t, disk, 0)
		l.RemovePod(t, pod)
		free()
	})
}
