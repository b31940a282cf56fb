package e2e

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestImageVolume uses one image as a volume in containers of another, and what
// is removed or restarted meanwhile makes no difference.
func TestImageVolume(t *testing.T) {
	l := lab.New(t, lab.Options{})
	box := l.Pull(t, "busybox")
	const ref = "nginx"
	data := l.Pull(t, ref)

	pod := l.PodConfig("volumes")
	podID := l.RunPod(t, pod)
	volume := func(at, sub string, options ...string) *runtimeapi.Mount {
		return &runtimeapi.Mount{ContainerPath: at, Image: &runtimeapi.ImageSpec{Image: data}, ImageSubPath: sub, Readonly: true, MountOptions: options}
	}
	config := l.ContainerConfig("reader", box, "sleep", "600")
	config.Mounts = []*runtimeapi.Mount{
		volume("/all", ""), volume("/dir", "etc/nginx"), volume("/one/file", "etc/nginx/nginx.conf"), volume("/no-exec", "", "noexec"),
	}
	id := l.CreateContainer(t, podID, pod, config)
	l.StartContainer(t, id)

	mounts := l.Status(t, id).GetMounts()
	if len(mounts) != 4 {
		t.Fatalf("mounts in the status: %v", mounts)
	}
	for i, m := range mounts {
		want := config.Mounts[i]
		if m.GetImage().GetImage() != data || m.GetImageSubPath() != want.ImageSubPath || m.GetHostPath() != "" || m.GetImage().GetImageRef() != data {
			t.Errorf("mount %d in the status: %v, want image %s", i, m, data)
		}
	}

	// The volume stays although its image goes, and although the daemon does.
	l.RemoveImage(t, ref)
	l.Kill(t)
	l.Start(t)
	for script, want := range map[string]int32{
		"grep -q www-data /all/etc/nginx/nginx.conf":      0,
		"cmp /dir/nginx.conf /all/etc/nginx/nginx.conf":   0,
		"cmp /one/file /all/etc/nginx/nginx.conf":         0,
		"touch /all/new 2>/dev/null":                      1,
		"/all/bin/busybox true":                           0,
		"/no-exec/bin/busybox true 2>/dev/null":           126,
		"grep ' /all ' /proc/mounts | grep -q nosuid":     0,
		"grep ' /no-exec ' /proc/mounts | grep -q noexec": 0,
		"grep ' /all ' /proc/mounts | grep -q '[ ,]ro,'":  0,
		"ls /dir/etc 2>/dev/null":                         1,
		"mount -o remount,rw,bind /all /all 2> /dev/null": 1,
	} {
		if r := l.ExecSync(t, id, "sh", "-c", script); r.GetExitCode() != want {
			t.Errorf("%s: exit code %d, want %d\n%s%s", script, r.GetExitCode(), want, r.GetStdout(), r.GetStderr())
		}
	}
	l.RemovePod(t, podID)
	l.RemoveImage(t, box)
	l.CheckClean(t)
}

// TestImageVolumeRefused: each error says which mount it is and why, in the word
// of the CRI, and leaves nothing.
func TestImageVolumeRefused(t *testing.T) {
	l := lab.New(t, lab.Options{})
	box, data := l.Pull(t, "busybox"), l.Pull(t, "nginx")
	pod := l.PodConfig("volumes")
	podID := l.RunPod(t, pod)
	// A pod's cgroup comes with its first container, and stays.
	first := l.CreateContainer(t, podID, pod, l.ContainerConfig("first", box, "true"))
	if _, err := l.Runtime.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: first}); err != nil {
		t.Fatal(err)
	}
	before := l.Mark(t)
	for _, tt := range []struct{ name, path, image, sub, says string }{
		{"no such image", "/v", "nowhere.test/nothing:1", "", "ImageVolumeMountFailed: mounts[0].image: "},
		{"no such path", "/v", data, "etc/absent", `ImageVolumeMountFailed: mounts[0].image_sub_path: "etc/absent" does not exist`},
		{"a link out of the image", "/v", data, "var/log/nginx/access.log", "ImageVolumeMountFailed: mounts[0].image_sub_path: "},
		{"a path out of the image", "/v", data, "../../etc", "mounts[0].image_sub_path: "},
		{"where a mount has no place", "/dev", box, "etc", "mount devpts at /dev/pts: mkdirat: read-only file system"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := l.ContainerConfig("reader", box, "true")
			config.Mounts = []*runtimeapi.Mount{{ContainerPath: tt.path, Image: &runtimeapi.ImageSpec{Image: tt.image}, ImageSubPath: tt.sub}}
			ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
			defer cancel()
			_, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: config, SandboxConfig: pod})
			if err == nil || status.Code(err) == codes.Unknown || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("create: %v, want an error that says %s, of a kind that is known", err, tt.says)
			}
			l.CheckSince(t, before)
		})
	}
	l.RemovePod(t, podID)
}
