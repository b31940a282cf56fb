package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// kubelet is a client that does what the kubelet does when the runtime dies under
// it: it asks again, in the same words, until it has an answer.
type kubelet struct {
	l       *lab.Lab
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient

	names   atomic.Int64 // of pods, so far
	calls   atomic.Int64 // that were answered
	retries atomic.Int64
	// blackouts counts the kills that left no process of Sampan at all. What ends
	// in one of these moments ends unseen.
	blackouts atomic.Int64
	armed     atomic.Int64 // those that may still come in this run
	unseen    atomic.Int64 // containers that did
}

func newKubelet(t testing.TB, l *lab.Lab) *kubelet {
	t.Helper()
	soon := backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}
	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: time.Second}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &kubelet{l: l, runtime: runtimeapi.NewRuntimeServiceClient(conn), images: runtimeapi.NewImageServiceClient(conn)}
}

const (
	// patience bounds how long one thing is asked for again.
	patience = 40 * time.Second
	pause    = 20 * time.Millisecond
)

// call asks until there is an answer. An error that does not say that the runtime
// was away is an answer.
func call[Q, A any](k *kubelet, ask func(context.Context, Q, ...grpc.CallOption) (A, error), q Q) (A, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		a, err := ask(ctx, q)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			k.calls.Add(1)
			return a, err
		}
		k.retries.Add(1)
		time.Sleep(pause)
	}
}

func (k *kubelet) runPod(config *runtimeapi.PodSandboxConfig) (string, error) {
	r, err := call(k, k.runtime.RunPodSandbox, &runtimeapi.RunPodSandboxRequest{Config: config})
	return r.GetPodSandboxId(), err
}

func (k *kubelet) removePod(id string) error {
	if _, err := call(k, k.runtime.StopPodSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := call(k, k.runtime.RemovePodSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

func (k *kubelet) pull(ref string) (string, error) {
	r, err := call(k, k.images.PullImage, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return r.GetImageRef(), err
}

func (k *kubelet) removeImage(ref string) error {
	_, err := call(k, k.images.RemoveImage, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

// run creates and starts a container. A start whose answer was lost may have been
// one: then it cannot be started again. If it has ended since and nobody was there to
// see when it began, that is for whoever looks at its end.
func (k *kubelet) run(pod string, podConfig *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig) (string, error) {
	c, err := call(k, k.runtime.CreateContainer, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config, SandboxConfig: podConfig})
	if err != nil {
		return "", err
	}
	id := c.GetContainerId()
	before := k.retries.Load()
	_, err = call(k, k.runtime.StartContainer, &runtimeapi.StartContainerRequest{ContainerId: id})
	if status.Code(err) == codes.FailedPrecondition && k.retries.Load() > before {
		if st, serr := k.status(id); serr == nil && (st.GetStartedAt() != 0 || st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED) {
			err = nil
		}
	}
	return id, err
}

func (k *kubelet) status(id string) (*runtimeapi.ContainerStatus, error) {
	r, err := call(k, k.runtime.ContainerStatus, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	return r.GetStatus(), err
}

// exec runs a command that may be run again.
func (k *kubelet) exec(id, want string, command ...string) error {
	r, err := call(k, k.runtime.ExecSync, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: 30})
	if err != nil {
		return fmt.Errorf("exec %s: %w", command, err)
	}
	if string(r.GetStdout()) != want || r.GetExitCode() != 0 {
		return fmt.Errorf("exec %s: %q, %q, code %d; want %q", command, r.GetStdout(), r.GetStderr(), r.GetExitCode(), want)
	}
	return nil
}

func (k *kubelet) awaitExit(id string) (*runtimeapi.ContainerStatus, error) {
	for end := time.Now().Add(patience); ; time.Sleep(pause) {
		st, err := k.status(id)
		if err != nil || st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
			return st, err
		}
		if time.Now().After(end) {
			return st, fmt.Errorf("container %s: %v after %v, want exited", id, st.GetState(), patience)
		}
	}
}

// blackedOut tells whether there was a blackout since there were as many as n.
func (k *kubelet) blackedOut(n int64) bool { return k.armed.Load() > 0 || k.blackouts.Load() > n }

// name returns one that no pod had yet.
func (k *kubelet) name(of string) string { return fmt.Sprintf("%s-%d", of, k.names.Add(1)) }

// writer is a container that writes numbered lines and exits with a code.
type writer struct {
	lines int
	code  int32
	every time.Duration
	both  bool // writes to stderr too

	terminal bool // has one, which a blackout closes: it dies of that
}

// How a writer ends whose terminal is closed, by whichever it hears of first.
const (
	hungUp      = 128 + int32(unix.SIGHUP)
	cannotWrite = 1
)

func (w writer) config(l *lab.Lab) *runtimeapi.ContainerConfig {
	args := []string{fmt.Sprint("-n=", w.lines), fmt.Sprint("-exit=", w.code), fmt.Sprint("-every=", w.every)}
	if w.both {
		args = append(args, "-both")
	}
	config := l.ContainerConfig("writer", "docker.io/sampan/lines", args...)
	config.Tty, config.Stdin = w.terminal, w.terminal
	return config
}

// check waits for the writer's end and finds every line once and the code. Only
// if no process of Sampan was there at some moment of its life, its end may have
// fallen into it: then the lines are a beginning of all, and the code is the right
// one or the message says why it is not.
func (w writer) check(k *kubelet, id, log string, blackouts int64) error {
	st, err := k.awaitExit(id)
	if err != nil {
		return err
	}
	dark := k.blackedOut(blackouts)
	unseen := dark && st.GetExitCode() == 255 && strings.Contains(st.GetMessage(), "no keeper ran") ||
		dark && w.terminal && slices.Contains([]int32{hungUp, cannotWrite}, st.GetExitCode())
	if st.GetExitCode() != w.code && !unseen {
		return fmt.Errorf("%s: exit code %d (%s: %s), want %d", log, st.GetExitCode(), st.GetReason(), st.GetMessage(), w.code)
	}
	read := w.reader()
	if err := read.follow(log); err != nil {
		return err
	}
	first, last := read.ends()
	complete := last == w.lines && first == w.lines-read.step+1
	if !complete && !dark {
		return fmt.Errorf("%s: ends with the lines %v of %d", log, read.of, w.lines)
	}
	if unseen || !complete {
		k.unseen.Add(1)
	}
	return nil
}

func (w writer) reader() *reader {
	if w.both {
		return &reader{step: 2, of: map[string]int{}, part: map[string]string{}}
	}
	return &reader{step: 1, of: map[string]int{}, part: map[string]string{}}
}

// reader checks a CRI log of numbered lines as it grows: each once and in order,
// within each stream.
type reader struct {
	step   int // between the numbers of lines of one stream
	offset int64
	of     map[string]int    // the last line's number, by stream
	part   map[string]string // a line's beginning, by stream
}

// ends returns the lowest and the highest number of the streams' last lines.
func (r *reader) ends() (first, last int) {
	for _, n := range r.of {
		if first == 0 || n < first {
			first = n
		}
		last = max(last, n)
	}
	return first, last
}

// follow reads what is new.
func (r *reader) follow(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	text := make([]byte, max(0, info.Size()-r.offset))
	if _, err := f.ReadAt(text, r.offset); err != nil {
		return err
	}
	for row := range strings.Lines(string(text)) {
		if !strings.HasSuffix(row, "\n") {
			break // being written
		}
		if err := r.row(strings.TrimSuffix(row, "\n")); err != nil {
			return fmt.Errorf("%s, at byte %d: %w", filepath.Base(path), r.offset, err)
		}
		r.offset += int64(len(row))
	}
	return nil
}

func (r *reader) row(row string) error {
	f := strings.SplitN(row, " ", 4)
	if len(f) != 4 || f[2] != "F" && f[2] != "P" {
		return fmt.Errorf("not a line of a CRI log: %q", row)
	}
	stream := f[1]
	r.part[stream] += f[3]
	if f[2] == "P" {
		return nil
	}
	var n int
	line := r.part[stream]
	if _, err := fmt.Sscanf(line, "line %d", &n); err != nil {
		return fmt.Errorf("%q is no line", line)
	}
	r.part[stream] = ""
	if last := r.of[stream]; last == 0 && n <= r.step || n == last+r.step {
		r.of[stream] = n
		return nil
	}
	return fmt.Errorf("line %d follows line %d on %s", n, r.of[stream], stream)
}
