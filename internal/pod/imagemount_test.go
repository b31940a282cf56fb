package pod

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// imageVolume is a container with an image as its second mount.
func imageVolume(t *testing.T, image, sub string) *runtimeapi.ContainerConfig {
	config := containerNamed("c")
	config.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/host", HostPath: t.TempDir()},
		{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: image}, ImageSubPath: sub},
	}
	return config
}

func TestImageVolume(t *testing.T) {
	l := newLab(t)
	s := l.start()
	ctx, id := t.Context(), must[string](t)
	p := id(s.Run(ctx, podNamed("a"), ""))
	c := id(s.CreateContainer(ctx, p, imageVolume(t, "data", "")))
	target := filepath.Join(l.dir, "state/containers", c, "images/1")
	if !l.layers.mounted[target] {
		t.Errorf("mounted: %v, want %s", l.layers.mounted, target)
	}
	if got := l.images.holders[c]; !slices.Equal(got, []string{"sha256:1", "sha256:data"}) {
		t.Errorf("it keeps the images %v", got)
	}

	s.Close()
	clear(l.images.holders) // they live in the daemon's memory
	s = l.start()
	if got := l.images.holders[c]; !slices.Equal(got, []string{"sha256:1", "sha256:data"}) {
		t.Errorf("after a restart it keeps the images %v", got)
	}
	want := map[int]MountImage{1: {"sha256:data"}}
	if st, err := s.GetContainer(c); err != nil || len(st.MountImages) != 1 || st.MountImages[1] != want[1] {
		t.Errorf("status: %v, %v, want %v", st.MountImages, err, want)
	}
	if err := s.Remove(ctx, p); err != nil {
		t.Fatal(err)
	}
	l.checkEmpty(s)
}

func TestImageVolumeFails(t *testing.T) {
	for _, tt := range []struct {
		name, image, sub string
		class            error
		says             string
	}{
		{"no such image", "absent", "", errdefs.ErrNotFound, "mounts[1].image:"},
		{"no such path", "data", "a/b", errdefs.ErrInvalidArgument, `mounts[1].image_sub_path: "a/b" does not exist`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			s := l.start()
			p := must[string](t)(s.Run(t.Context(), podNamed("a"), ""))
			_, err := s.CreateContainer(t.Context(), p, imageVolume(t, tt.image, tt.sub))
			if !errors.Is(err, crierrors.ErrImageVolumeMountFailed) || !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("create: %v, want %v and %v, saying %s", err, crierrors.ErrImageVolumeMountFailed, tt.class, tt.says)
			}
			if err := s.Remove(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			l.checkEmpty(s)
		})
	}
}

func TestPathInImage(t *testing.T) {
	root := t.TempDir()
	err := errors.Join(
		os.MkdirAll(filepath.Join(root, "dir/deep"), 0o755),
		os.WriteFile(filepath.Join(root, "dir/file"), nil, 0o644),
		os.Symlink("/etc", filepath.Join(root, "absolute")),
		os.Symlink("../../../../etc/passwd", filepath.Join(root, "dir/up")),
		os.Symlink("dir/deep", filepath.Join(root, "link")),
		os.Symlink("loop", filepath.Join(root, "loop")),
		os.Symlink("/dir/deep", filepath.Join(root, "rooted")),
	)
	if err != nil {
		t.Fatal(err)
	}
	for sub, want := range map[string]string{
		"": "", ".": "", "dir/": "dir", "dir/file": "dir/file", "link": "dir/deep", "rooted": "dir/deep",
		"link/../file": "dir/file",
	} {
		if got, err := pathInImage(root, sub); err != nil || got != filepath.Join(root, want) {
			t.Errorf("%q is %s, %v, want %q", sub, got, err, want)
		}
	}
	for _, sub := range []string{"absolute", "dir/up", "loop", "none", "dir/file/x"} {
		if got, err := pathInImage(root, sub); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is %s, %v, want an error", sub, got, err)
		}
	}
}
