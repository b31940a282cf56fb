package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"sampan.dev/sampan/test/lab"
)

// PayloadDir is where a guest has the payload.
const PayloadDir = "/payload"

// beside is what the tests of some packages need beside what all have.
var beside = map[string][]string{
	"./internal/host": {"bin/init"},
	"./test/e2e":      {".cache/tools/runc", ".cache/tools/kubelet.test", ".cache/tools/v1alpha2.test"},
	"./test/crash":    {"bin/faultpoints/sampan", "internal"}, // it looks for the fault points in the source
}

// Payload makes a disk with what tests need in a guest: the built daemon, the
// test images and tools, and the compiled tests of packages ("./test/node"), each
// with its test data in a directory as in the source tree, so that they find each
// other. The images and tools must be in root's .cache already.
func Payload(ctx context.Context, root, path string, packages ...string) error {
	tree, err := os.MkdirTemp(filepath.Dir(path), "payload-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	if err := os.Chmod(tree, 0o755); err != nil {
		return err
	}
	files := []string{"go.mod", "bin/sampan", "packaging", ".cache/tools/crictl", ".cache/tools/ginkgo", ".cache/tools/critest.test"}
	files = append(files, strings.TrimPrefix(os.Getenv(lab.Images), root+"/"))
	for _, p := range packages {
		files = append(files, beside[p]...)
	}
	if packages, err := filepath.Glob(filepath.Join(root, "bin", "*.deb")); err == nil {
		for _, p := range packages {
			files = append(files, "bin/"+filepath.Base(p))
		}
	}
	for _, name := range files {
		if err := copyTree(filepath.Join(root, name), filepath.Join(tree, name)); err != nil {
			return err
		}
	}
	for _, p := range packages {
		if err := compileTests(ctx, root, tree, p); err != nil {
			return err
		}
	}
	return makeDisk(ctx, path, "1G", tree)
}

// ImagesDir is where a guest has the test images of the payload.
func ImagesDir() string {
	return filepath.Join(PayloadDir, ".cache", "images", filepath.Base(os.Getenv(lab.Images)))
}

// Tests is the compiled tests of a package in a guest, and the directory that
// they run in.
func Tests(pkg string) (program, dir string) {
	dir = filepath.Join(PayloadDir, pkg)
	return filepath.Join(dir, filepath.Base(pkg)+".test"), dir
}

func compileTests(ctx context.Context, root, tree, pkg string) error {
	dir := filepath.Join(tree, pkg)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-tags=seccomp", "-ldflags=-s -w", "-o", filepath.Join(dir, filepath.Base(pkg)+".test"), pkg)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the tests of %s: %w\n%s", pkg, err, out)
	}
	data := filepath.Join(root, pkg, "testdata")
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return copyTree(data, filepath.Join(dir, "testdata"))
}

// copyTree copies a file, or a directory with all below it, by hard links where
// that can be.
func copyTree(from, to string) error {
	return filepath.Walk(from, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		switch {
		case info.IsDir():
			return os.MkdirAll(target, 0o755)
		case os.MkdirAll(filepath.Dir(target), 0o755) == nil && os.Link(path, target) == nil:
			return nil
		}
		return copyFile(path, target, info.Mode().Perm())
	})
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
