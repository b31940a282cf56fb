package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/checkpoint"
	"sampan.dev/sampan/internal/state"
)

// runningContainer runs a pod with one container.
func runningContainer(t *testing.T, s *Pods) (pod, container string) {
	t.Helper()
	id := must[string](t)
	pod = id(s.Run(t.Context(), podNamed("a"), ""))
	container = id(s.CreateContainer(t.Context(), pod, containerNamed("c")))
	if err := s.StartContainer(t.Context(), container); err != nil {
		t.Fatal(err)
	}
	return pod, container
}

// checkNoWork fails if anything is left of a checkpoint that was being made or read.
func (l *lab) checkNoWork(also string) {
	l.t.Helper()
	for _, dir := range []string{filepath.Join(l.dir, "root/checkpoints"), also} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			l.t.Errorf("%s: left %v, error %v", dir, left, err)
		}
	}
}

func TestCheckpointAndRestore(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p, c := runningContainer(t, s)
	archive := filepath.Join(t.TempDir(), "c.tar")
	if err := s.CheckpointContainer(t.Context(), c, archive, time.Minute); err != nil {
		t.Fatal(err)
	}
	l.checkNoWork(t.TempDir())
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	if err := checkpoint.Extract(t.Context(), f, dir); err != nil {
		t.Fatal(err)
	}
	var config checkpoint.Config
	if err := checkpoint.ReadJSON(dir, checkpoint.ConfigName, &config); err != nil || config.ID != c || config.RootfsImageRef != "busybox@sha256:2" {
		t.Errorf("%+v, error %v", config, err)
	}
	restored := containerNamed("again")
	restored.Image.Image = archive
	id, err := s.CreateContainer(t.Context(), p, restored)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.container(id); err != nil || got.Checkpoint != archive || got.ImageID != "sha256:1" {
		t.Errorf("restored from %q, image %q, error %v", got.Checkpoint, got.ImageID, err)
	}
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	l.checkNoWork(t.TempDir())
	l.checkEmpty(s)
}

func TestCheckpointTooLate(t *testing.T) {
	l := newLab(t)
	s := l.start()
	l.keeper.hangCheckpoint = true
	p, c := runningContainer(t, s)
	out := t.TempDir()
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.CheckpointContainer(late, c, filepath.Join(out, "c.tar"), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("container: %v", err)
	}
	l.checkNoWork(out)
	late, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.CheckpointPod(late, p, out, []string{c}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pod: %v", err)
	}
	l.checkNoWork(out)
	l.criuErr = errdefs.ErrNotImplemented
	if err := s.CheckpointPod(t.Context(), p, out, []string{c}, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("without CRIU: %v", err)
	}
	l.checkNoWork(out)
}

// TestCheckpointCutOff leaves what a daemon leaves that is killed.
func TestCheckpointCutOff(t *testing.T) {
	l := newLab(t)
	s := l.start()
	out := t.TempDir()
	partial, container := filepath.Join(out, "c.tar.partial-1"), filepath.Join(out, "container")
	work, err := s.workDir(partial, container)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(partial, []byte("half"), 0o600), os.MkdirAll(filepath.Join(container, "checkpoint"), 0o700),
		os.MkdirAll(filepath.Join(work, "container", "checkpoint"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	// And one that was cut off before there was a record.
	if err := os.Mkdir(filepath.Join(s.paths.checkpoints(), "early"), 0o700); err != nil {
		t.Fatal(err)
	}
	l.start()
	l.checkNoWork(out)
	if state.Exists(partial) {
		t.Error("the partial archive is left")
	}
}

func TestRestorePod(t *testing.T) {
	l := newLab(t)
	s := l.start()
	p, c := runningContainer(t, s)
	out := t.TempDir()
	if err := s.CheckpointPod(t.Context(), p, out, []string{c}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	restore := func(ctx context.Context, configs ...*runtimeapi.ContainerConfig) (string, map[string]string, error) {
		return s.RestorePod(ctx, out, podNamed("b"), "", nil, configs)
	}
	other := containerNamed("c")
	other.Args = []string{"something", "else"}
	for name, configs := range map[string][]*runtimeapi.ContainerConfig{
		"nothing":         nil,
		"another process": {other},
		"another name":    {containerNamed("d")},
		"one more":        {containerNamed("c"), containerNamed("d")},
	} {
		if _, _, err := restore(t.Context(), configs...); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		l.checkEmpty(s)
	}
	pod, containers, err := restore(t.Context(), containerNamed("c"))
	if err != nil || len(containers) != 1 {
		t.Fatalf("containers %v, error %v", containers, err)
	}
	if st, err := s.GetContainer(containers["c"]); err != nil || st.State != Created || st.PodID != pod {
		t.Errorf("%+v, error %v", st, err)
	}
	again, same, err := restore(t.Context(), containerNamed("c"))
	if err != nil || again != pod || same["c"] != containers["c"] {
		t.Errorf("again: %s %v, error %v; want %s %v", again, same, err, pod, containers)
	}
	if err := s.Remove(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	l.checkEmpty(s)
	l.layers.fail = errors.New("no")
	if _, _, err := restore(t.Context(), containerNamed("c")); err == nil {
		t.Error("a pod was restored without a root file system")
	}
	l.layers.fail = nil
	l.checkEmpty(s)
}
