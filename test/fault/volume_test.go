package fault

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// A volume whose stat hangs holds up the creation of its own container and nothing
// else; the client's retry joins it; its pod can be stopped; and when the volume
// lets go, the pod can be removed. (containerd#4604, CRI-O#8906)
func TestVolumeHangsStat(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	volume := newHungFS(t, fuseGetattr, fuseLookup, fuseStatfs)
	config := l.PodConfig("hung")
	pod := l.RunPod(t, config)
	c := l.ContainerConfig("c", image, "sleep", "1000")
	c.Mounts = []*runtimeapi.Mount{{HostPath: volume.dir, ContainerPath: "/data"}}
	for range 2 {
		_, err := create(brief(t), l, pod, config, c)
		checkCode(t, "create", err, codes.DeadlineExceeded)
		checkOthers(t, l, image, "beside")
	}
	_, err := l.Runtime.StopPodSandbox(brief(t), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
	must(t, err)
	// The daemon that comes next finds the same volume.
	l.Kill(t)
	l.Start(t)
	checkOthers(t, l, image, "beside-2")
	volume.release(t)
	l.RemovePod(t, pod)
}

// A container whose process waits for a volume that hangs cannot be killed: its
// stop says so in time, others go on, and it goes when the volume lets go.
func TestVolumeHangsRead(t *testing.T) {
	for name, op := range map[string]uint32{"open": fuseOpen, "read": fuseRead} {
		t.Run(name, func(t *testing.T) {
			l := lab.New(t, lab.Options{})
			image := l.Pull(t, "busybox")
			volume := newHungFS(t, op)
			config := l.PodConfig("hung")
			pod := l.RunPod(t, config)
			c := l.ContainerConfig("c", image, "cat", "/data/file")
			c.Mounts = []*runtimeapi.Mount{{HostPath: volume.dir, ContainerPath: "/data"}}
			id := l.CreateContainer(t, pod, config, c)
			l.StartContainer(t, id)
			time.Sleep(200 * time.Millisecond)
			stops := map[string]func(context.Context) error{
				"stop": func(ctx context.Context) error {
					_, err := l.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
					return err
				},
				"stop pod": func(ctx context.Context) error {
					_, err := l.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
					return err
				},
				"remove pod": func(ctx context.Context) error {
					_, err := l.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
					return err
				},
			}
			for what, stop := range stops {
				start := time.Now()
				checkCode(t, what, stop(brief(t)), codes.DeadlineExceeded)
				if took := time.Since(start); took > 15*time.Second {
					t.Errorf("%s: took %v", what, took)
				}
				checkOthers(t, l, image, "beside")
			}
			volume.release(t)
			l.RemovePod(t, pod)
		})
	}
}

// A log on a volume that hangs holds up its own container only.
func TestLogOnHungVolume(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	volume := newHungFS(t, fuseGetattr, fuseLookup)
	config := l.PodConfig("hung")
	config.LogDirectory = volume.dir
	ctx := brief(t)
	// Whether the pod or its container meets the volume first is Sampan's affair.
	r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err == nil {
		_, err = create(ctx, l, r.GetPodSandboxId(), config, l.ContainerConfig("c", image, "echo", "x"))
	}
	checkCode(t, "pod with a log directory that hangs", err, codes.DeadlineExceeded)
	select {
	case <-ctx.Done(): // here the deadline may pass a moment later than there
	case <-time.After(brevity / 2):
		t.Error("it was refused, not waited for")
	}
	checkOthers(t, l, image, "beside")
	volume.release(t)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		pods, err := l.Runtime.ListPodSandbox(brief(t), &runtimeapi.ListPodSandboxRequest{})
		must(t, err)
		if len(pods.GetItems()) == 0 {
			break
		}
		for _, p := range pods.GetItems() {
			l.RemovePod(t, p.GetId())
		}
		if time.Now().After(end) {
			t.Fatal("the pod does not go")
		}
	}
}
