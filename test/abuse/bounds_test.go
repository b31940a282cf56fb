package abuse

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
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

// memory returns what a process has in memory now and had at most, in MiB.
func memory(t *testing.T, pid int) (now, peak int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	figure := func(name string) int {
		m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+) kB$`).FindSubmatch(text)
		if m == nil {
			t.Fatalf("process %d has no %s", pid, name)
		}
		kib, err := strconv.Atoi(string(m[1]))
		must(t, err)
		return kib >> 10
	}
	return figure("VmRSS"), figure("VmHWM")
}

// checkMemory fails if a process of Sampan has ever had more than its limit, in
// MiB, and logs what they have had.
func checkMemory(t *testing.T, l *lab.Lab, daemon, keeper int) {
	t.Helper()
	for role, limit := range map[string]int{"daemon": daemon, "supervisor": keeper, "worker": keeper} {
		pids := []int{l.Pid()}
		if role != "daemon" {
			pids = l.Keepers(t, role)
		}
		for _, pid := range pids {
			now, peak := memory(t, pid)
			t.Logf("%s: %d MiB resident, %d at most", role, now, peak)
			if peak > limit && !l.Raced() {
				t.Errorf("%s: had %d MiB in memory, at most %d are right", role, peak, limit)
			}
		}
	}
}

// dial connects to the daemon anew.
func dial(t *testing.T, l *lab.Lab) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestManyClients has thousands of clients list containers at the same time, each
// over a connection of its own, while a pod is made: nobody starves.
func TestManyClients(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("listed")
	pod := l.RunPod(t, config)
	for i := range 10 {
		l.CreateContainer(t, pod, config, l.ContainerConfig(fmt.Sprint("c", i), image, "sleep", "1000"))
	}
	clients := amount(t, "SAMPAN_ABUSE_CLIENTS", 2000)
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for range clients {
		conn := dial(t, l)
		wg.Go(func() {
			<-begin
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			r, err := runtimeapi.NewRuntimeServiceClient(conn).ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			if err != nil || len(r.GetContainers()) < 10 {
				t.Errorf("list: %d containers, %v", len(r.GetContainers()), err)
			}
		})
	}
	close(begin)
	start := time.Now()
	meanwhile := l.PodConfig("meanwhile")
	other := l.RunPod(t, meanwhile)
	l.StartContainer(t, l.CreateContainer(t, other, meanwhile, l.ContainerConfig("c", image, "sleep", "1000")))
	up := time.Since(start)
	wg.Wait()
	t.Logf("%d clients answered in %v; a pod was up after %v", clients, time.Since(start).Round(time.Millisecond), up.Round(time.Millisecond))
	checkMemory(t, l, 120+clients/10, 60)
}

// TestManyExecs runs many commands in a container at the same time. Each gets its
// output and its exit code.
func TestManyExecs(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("busy")
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sleep", "1000"))
	l.StartContainer(t, id)
	execs := amount(t, "SAMPAN_ABUSE_EXECS", 200)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range execs {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			r, err := l.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", fmt.Sprintf("echo %d; sleep 2; exit %d", i, i%100)}})
			if err != nil || string(r.GetStdout()) != fmt.Sprintln(i) || int(r.GetExitCode()) != i%100 {
				t.Errorf("exec %d: %v, %v", i, r, err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d execs at the same time in %v", execs, time.Since(start).Round(time.Millisecond))
	checkMemory(t, l, 150, 150)
}

// TestHugeOutput has a container write a line that never ends, and an exec more
// than an answer may hold.
func TestHugeOutput(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	config := l.PodConfig("talkative")
	pod := l.RunPod(t, config)
	size := amount(t, "SAMPAN_ABUSE_LINE_MIB", 256)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("c", image, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; echo; echo end", size<<20)))
	l.StartContainer(t, id)
	if exit := l.AwaitExit(t, id, 2*time.Minute); exit.GetExitCode() != 0 {
		t.Errorf("exit: %v", exit)
	}
	checkLine(t, filepath.Join(config.GetLogDirectory(), "c.log"), size<<20)

	id = l.CreateContainer(t, pod, config, l.ContainerConfig("other", image, "sleep", "1000"))
	l.StartContainer(t, id)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
		r, err := l.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "head -c 40000000 /dev/zero; exit 7"}})
		cancel()
		must(t, err)
		if n := len(r.GetStdout()); n < 15<<20 || n > 16<<20 || r.GetExitCode() != 7 {
			t.Errorf("exec: %d bytes, exit code %d", n, r.GetExitCode())
		}
	}
	checkMemory(t, l, 200, 60)
}

// checkLine checks that a log has one line of the length, in parts, and the line
// "end".
func checkLine(t *testing.T, path string, length int) {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	var got, full int
	for row := range bytes.Lines(text) {
		parts := bytes.SplitN(bytes.TrimSuffix(row, []byte("\n")), []byte(" "), 4)
		if len(parts) != 4 {
			t.Fatalf("a log line has %d parts: %.100q", len(parts), row)
		}
		got += len(parts[3])
		if string(parts[2]) == "F" {
			full++
		}
	}
	if got != length+len("end") || full != 2 {
		t.Errorf("the log has %d bytes in %d lines, want %d in 2", got, full, length+len("end"))
	}
}

// TestSecrets checks that nothing tells credentials: neither the daemon's log, nor
// its files, nor an answer; that its socket and files are root's alone; and that a
// stream's URL is good once and cannot be guessed.
func TestSecrets(t *testing.T) {
	l := lab.New(t, lab.Options{})
	const password = "hunter2-of-the-registry"
	handler, err := images.Handler(os.Getenv(lab.Images))
	must(t, err)
	var authorized sync.Map
	private := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, given, _ := r.BasicAuth(); user != "me" || given != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		authorized.Store("yes", true)
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(private.Close)
	must(t, images.WriteHosts(l.Hosts, private.URL, "private.example"))
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	for _, given := range []string{password + "-not", password} {
		_, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{
			Image: &runtimeapi.ImageSpec{Image: "private.example/sampan/variants:oci-gzip"},
			Auth:  &runtimeapi.AuthConfig{Username: "me", Password: given},
		})
		if err != nil && strings.Contains(err.Error(), given) {
			t.Errorf("an error tells the password: %v", err)
		}
		if (err == nil) != (given == password) {
			t.Errorf("pull: %v", err)
		}
	}
	image := l.Pull(t, "busybox")
	config := l.PodConfig("secretive")
	pod := l.RunPod(t, config)
	c := l.ContainerConfig("c", image, "sleep", "1000")
	c.Envs = []*runtimeapi.KeyValue{{Key: "TOKEN", Value: []byte("s3cret-of-the-container")}}
	id := l.CreateContainer(t, pod, config, c)
	l.StartContainer(t, id)
	l.ExecSync(t, id, "true")

	daemonLog, err := os.ReadFile(filepath.Join(l.Dir, "daemon.log"))
	must(t, err)
	for what, text := range map[string][]byte{"the daemon's log": daemonLog, "ROOT and STATE": contents(t, l.Root, l.State)} {
		if bytes.Contains(text, []byte(password)) {
			t.Errorf("%s: has the registry's password", what)
		}
		if what == "the daemon's log" && bytes.Contains(text, []byte("s3cret")) {
			t.Errorf("%s: has a container's environment", what)
		}
	}
	for _, private := range []string{l.Socket, l.Root, l.State} {
		info, err := os.Stat(private)
		must(t, err)
		if mode := info.Mode().Perm(); mode&0o077 != 0 && private == l.Socket || mode&0o022 != 0 {
			t.Errorf("%s: has mode %o", private, mode)
		}
	}
	checkStreamURL(t, l, id)
}

func contents(t *testing.T, dirs ...string) []byte {
	t.Helper()
	var all []byte
	for _, dir := range dirs {
		must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			switch {
			case err != nil || strings.Contains(path, "/layers/") || strings.Contains(path, "/rootfs") || strings.Contains(path, "/ns/"):
				return nil // gone meanwhile, or an image's
			case !d.Type().IsRegular():
				return nil
			}
			data, err := os.ReadFile(path)
			all = append(all, data...)
			return err
		}))
	}
	return all
}

// checkStreamURL uses the URL of an exec twice, and one that was not issued.
func checkStreamURL(t *testing.T, l *lab.Lab, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	seen := map[string]bool{}
	var last string
	for range 20 {
		r, err := l.Runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
		must(t, err)
		last = r.GetUrl()
		if token := last[strings.LastIndex(last, "/")+1:]; len(token) < 20 || seen[token] {
			t.Errorf("token %q is short or not new", token)
		} else {
			seen[token] = true
		}
	}
	fetch := func(url string) int {
		r, err := http.Get(url)
		must(t, err)
		defer r.Body.Close()
		_, err = io.Copy(io.Discard, r.Body)
		must(t, err)
		return r.StatusCode
	}
	first := fetch(last) // not an upgrade, yet it uses the token up
	if second := fetch(last); second != http.StatusNotFound || first == http.StatusOK {
		t.Errorf("the URL of an exec: %d, and again: %d", first, second)
	}
	if guessed := fetch(last[:strings.LastIndex(last, "/")+1] + strings.Repeat("A", 26)); guessed != http.StatusNotFound {
		t.Errorf("a guessed URL: %d", guessed)
	}
	if host, _, err := net.SplitHostPort(strings.Split(last, "/")[2]); err != nil || host != "127.0.0.1" {
		t.Errorf("streams are served on %s", last)
	}
	if _, err := l.Runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "none", Cmd: []string{"true"}, Stdout: true}); status.Code(err) != codes.NotFound {
		t.Errorf("exec in no container: %v", err)
	}
}
