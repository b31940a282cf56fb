package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/test/images"
)

// Cache is where packages, images and tools are kept between runs.
func Cache() (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, ".cache"), nil
}

// Tool is the path of one of the programs that Prepare built: crictl, ginkgo,
// critest.test, runc, or a client's tests in test/clients.
func Tool(name string) (string, error) {
	dir, err := Cache()
	return filepath.Join(dir, "tools", name), err
}

// Prepare builds the images and tools unless they are cached, and whatever more
// there is. One process does it at a time.
func Prepare(ctx context.Context, more ...func(context.Context, string) error) error {
	dir, err := Cache()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "tools"), 0o755); err != nil {
		return err
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	set, err := images.Build(ctx, dir)
	if err != nil {
		return err
	}
	if err := os.Setenv(Images, set); err != nil {
		return err
	}
	for _, build := range more {
		if err := build(ctx, dir); err != nil {
			return err
		}
	}
	return buildTools(ctx, dir, set)
}

func buildTools(ctx context.Context, cache, set string) error {
	root, err := repository()
	if err != nil {
		return err
	}
	goWith := func(cgo, dir string, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOFLAGS=")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out)), nil
	}
	goTool := func(dir string, args ...string) (string, error) { return goWith("0", dir, args...) }
	tools := filepath.Join(root, "test", "tools")
	if _, err := goTool(tools, "mod", "download", "sigs.k8s.io/cri-tools"); err != nil {
		return err
	}
	module, err := goTool(tools, "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/cri-tools")
	if err != nil {
		return err
	}
	critest, err := copyCritest(module, filepath.Join(cache, "cri-tools"), set)
	if err != nil {
		return err
	}
	// Debian's runc may be older than what some tests need. This one is as old as
	// the library in the built-in handler.
	if module, err = goTool(root, "list", "-m", "-f", "{{.Dir}}", "github.com/opencontainers/runc"); err != nil {
		return err
	}
	if _, err := goWith("1", module, "build", "-tags", "seccomp", "-o", filepath.Join(cache, "tools", "runc"), "."); err != nil {
		return err
	}
	version := "-ldflags=-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0"
	out := func(name string) string { return filepath.Join(cache, "tools", name) }
	for _, build := range []struct {
		dir  string
		args []string
	}{
		{tools, []string{"build", version, "-o", out("crictl"), "sigs.k8s.io/cri-tools/cmd/crictl"}},
		{tools, []string{"build", "-o", out("ginkgo"), "github.com/onsi/ginkgo/v2/ginkgo"}},
		{critest, []string{"test", "-c", "-vet=off", version, "-o", out("critest.test"), "./cmd/critest"}},
		{filepath.Join(root, "test", "clients", "v1alpha2"), []string{"test", "-c", "-o", out("v1alpha2.test"), "."}},
		{filepath.Join(root, "test", "clients", "kubelet"), []string{"test", "-c", "-o", out("kubelet.test"), "."}},
	} {
		if _, err := goTool(build.dir, build.args...); err != nil {
			return err
		}
	}
	return nil
}

// copyCritest copies the source of cri-tools with one change: the digest of the
// one image that critest names by its digest, a constant, becomes that of our
// image of that name. Nobody but its makers can build theirs.
func copyCritest(module, dir, set string) (string, error) {
	digest, err := images.Digest(set, "k8s-staging-cri-tools/test-image-digest:latest")
	if err != nil {
		return "", err
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.CopyFS(dir, os.DirFS(module)); err != nil {
		return "", err
	}
	const original = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"
	source := filepath.Join(dir, "pkg", "validate", "consts.go")
	text, err := os.ReadFile(source)
	if err != nil {
		return "", err
	}
	if !strings.Contains(string(text), original) {
		return "", fmt.Errorf("%s: does not have the digest %s", source, original)
	}
	return dir, os.WriteFile(source, []byte(strings.ReplaceAll(string(text), original, digest.String())), 0o644)
}
