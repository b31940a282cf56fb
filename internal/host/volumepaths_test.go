package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// buildInit builds the program, which is in C. A host without a compiler has that of `make`.
func buildInit(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("cc"); err != nil {
		program, err := filepath.Abs("../../bin/init")
		if _, gone := os.Stat(program); err != nil || gone != nil {
			t.Skipf("probe: no C compiler, and no sampan-init: %v", errors.Join(err, gone))
		}
		return program
	}
	program := filepath.Join(t.TempDir(), "init")
	if out, err := exec.Command("cc", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, "../../cmd/sampan-init/init.c").CombinedOutput(); err != nil {
		t.Fatalf("build sampan-init: %v: %s", err, out)
	}
	return program
}

func TestVolumePaths(t *testing.T) {
	for name, o := range map[string]VolumePaths{"in process": {}, "program": {Program: buildInit(t)}} {
		t.Run(name, func(t *testing.T) {
			dir, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			deep := filepath.Join(dir, "a", "b", "c")
			for range 2 {
				if err := o.MakeDirs(t.Context(), deep); err != nil {
					t.Fatal(err)
				}
			}
			if info, err := os.Stat(deep); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("%v, %v", info, err)
			}
			if err := os.Symlink(filepath.Join("a", "b"), filepath.Join(dir, "link")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			real, err := o.Follow(t.Context(), dir+"/link/../b/c", dir+"/link/c", dir+"/none", dir)
			if want := []string{deep, deep}; !slices.Equal(real, want) || !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("followed to %q, %v; want %q and that the third is absent", real, err, want)
			}
			var path *fs.PathError
			if !errors.As(err, &path) {
				t.Errorf("%T names no path", err)
			}
			for _, bad := range []string{"file", "file/sub"} {
				if err := o.MakeDirs(t.Context(), filepath.Join(dir, bad)); err == nil {
					t.Errorf("made a directory of %q", bad)
				}
			}
		})
	}
}

// A program that hangs is left behind.
func TestVolumePathsHangs(t *testing.T) {
	program := filepath.Join(t.TempDir(), "hang")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nexec sleep 100\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := VolumePaths{program}.Follow(ctx, "/")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

func TestVolumePathsMapIDs(t *testing.T) {
	holder := requireUserNamespaces(t)
	for name, o := range map[string]VolumePaths{"in process": {}, "program": {Program: holder}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ids := []IDRange{{0, 200000, 1}}
			n := Namespaces{User: filepath.Join(dir, "user"), UIDs: ids, GIDs: ids, Holder: holder}
			if err := n.Create(); err != nil {
				t.Fatal(err)
			}
			defer n.Remove()
			if err := o.MapIDs(t.Context(), n.User, dir, "/"); err != nil {
				t.Error(err)
			}
			for path, want := range map[string]error{"/proc": unix.EINVAL, filepath.Join(dir, "none"): unix.ENOENT} {
				err := o.MapIDs(t.Context(), n.User, dir, path, dir)
				var at *fs.PathError
				if !errors.Is(err, want) || !errors.As(err, &at) || at.Path != path {
					t.Errorf("%s: %v", path, err)
				}
			}
		})
	}
}
