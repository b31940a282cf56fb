package e2e

import (
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

// TestImageForms pulls one image in every form that a registry holds images in,
// by tag and by digest, and runs what it pulled.
func TestImageForms(t *testing.T) {
	l := lab.New(t, lab.Options{})
	for _, form := range []string{"docker", "docker-list", "oci-gzip", "oci-zstd", "oci-plain", "oci-index", "oci-nested"} {
		t.Run(form, func(t *testing.T) {
			ref := "quay.io/sampan/variants:" + form
			id := l.Pull(t, ref)
			status := imageStatus(t, l, ref)
			if status.GetId() != id || len(status.GetRepoTags()) != 1 || status.GetRepoTags()[0] != ref {
				t.Fatalf("image %s: id %s, tags %v, want id %s", ref, status.GetId(), status.GetRepoTags(), id)
			}
			checkRuns(t, l, id)
			digests := status.GetRepoDigests()
			l.RemoveImage(t, ref)
			if len(digests) != 1 {
				t.Fatalf("image %s: digests %v, want one", ref, digests)
			}
			if again := l.Pull(t, digests[0]); again != id {
				t.Errorf("image %s: id %s, want %s as by the tag", digests[0], again, id)
			}
			l.RemoveImage(t, digests[0])
			l.CheckClean(t)
		})
	}
}

// TestImageLoad brings images in without a registry.
func TestImageLoad(t *testing.T) {
	l := lab.New(t, lab.Options{})
	const ref = "example.test/shop/box:1"
	set := os.Getenv(lab.Images)
	docker := func(w io.Writer) (digest.Digest, error) {
		return images.WriteDocker(w, set, "sampan/variants:oci-plain", ref)
	}
	for _, tt := range []struct {
		name  string
		write func(io.Writer) (digest.Digest, error)
		args  []string
	}{
		{"docker", docker, nil},
		{"docker.gz", func(w io.Writer) (digest.Digest, error) {
			z := gzip.NewWriter(w)
			id, err := docker(z)
			return id, errors.Join(err, z.Close())
		}, nil},
		{"layout", func(w io.Writer) (digest.Digest, error) {
			return images.WriteLayout(w, set, "sampan/variants:oci-zstd")
		}, []string{"--name", ref}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(l.Tmp(), tt.name))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			want, err := tt.write(f)
			if err != nil {
				t.Fatal(err)
			}
			args := append([]string{"image", "load", "--endpoint", "unix://" + l.Socket}, tt.args...)
			out, err := exec.Command(os.Getenv(lab.Binary), append(args, f.Name())...).CombinedOutput()
			if err != nil {
				t.Fatalf("sampan image load: %v\n%s", err, out)
			}
			if status := imageStatus(t, l, ref); status.GetId() != want.String() {
				t.Fatalf("image %s: id %q, want %s", ref, status.GetId(), want)
			}
			checkRuns(t, l, ref)
			l.RemoveImage(t, ref)
			l.CheckClean(t)
		})
	}
}

func imageStatus(t *testing.T, l *lab.Lab, ref string) *runtimeapi.Image {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	r, err := l.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetImage()
}

// checkRuns runs the image's own shell.
func checkRuns(t *testing.T, l *lab.Lab, image string) {
	t.Helper()
	config := l.PodConfig("box")
	pod := l.RunPod(t, config)
	defer l.RemovePod(t, pod)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("box", image, "sh", "-c", "test -x /bin/busybox && exit 42"))
	l.StartContainer(t, id)
	if code := l.AwaitExit(t, id, lab.Wait).GetExitCode(); code != 42 {
		t.Errorf("image %s: its shell exits with %d, want 42", image, code)
	}
}
