package cli_test

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/cli"
	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// legacyEnv makes the test binary hide the v2 part of a hybrid cgroup layout
// from itself; it runs in a mount namespace of its own then. It does so before
// the tests, by executing itself once more, since packages look at the layout
// when they are initialised.
const legacyEnv = "SAMPAN_TEST_LEGACY_CGROUPS"

func TestMain(m *testing.M) {
	if os.Getenv(legacyEnv) == "hide" {
		err := hideUnified()
		if err == nil {
			os.Setenv(legacyEnv, "hidden")
			err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// hideUnified replaces /sys/fs/cgroup by a read-only directory that has all
// hierarchies but the unified one.
func hideUnified() error {
	const cgroups = "/sys/fs/cgroup"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	dir, err := os.MkdirTemp("", "cgroup")
	if err != nil {
		return err
	}
	defer os.Remove(dir) // in the namespace it has been moved away
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	hierarchies, err := os.ReadDir(cgroups)
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		target := filepath.Join(dir, h.Name())
		if !h.IsDir() || h.Name() == "unified" {
			continue
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(filepath.Join(cgroups, h.Name()), target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", h.Name(), err)
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("remount: %w", err)
	}
	if err := unix.Mount(dir, cgroups, "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move mount: %w", err)
	}
	return nil
}

func newRuntime(t testing.TB, path string) ociruntime.Runtime {
	return cli.New(cli.Config{Path: path, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
}

func TestConformance(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			if err != nil {
				t.Skipf("probe: %v", err)
			}
			if name == "crun" && os.Getenv(legacyEnv) == "" && host.CgroupMode() == host.CgroupHybrid && os.Geteuid() == 0 {
				// It refuses a hybrid layout whose v2 part has controllers.
				runWithLegacyCgroups(t)
				return
			}
			conformance.Run(t, func(t testing.TB) ociruntime.Runtime { return newRuntime(t, path) })
		})
	}
}

// runWithLegacyCgroups runs the calling test again, in a process for which there
// is no cgroup v2.
func runWithLegacyCgroups(t *testing.T) {
	args := []string{"-test.run=^TestConformance$/^crun$"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), legacyEnv+"=hide")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	t.Logf("with legacy cgroups:\n%s", out)
	if err != nil {
		t.Error(err)
	}
}

func TestMissingProgram(t *testing.T) {
	lab := conformance.NewLab(t)
	c := lab.Prepare(t, newRuntime(t, filepath.Join(t.TempDir(), "no-runtime")), []string{"true"})
	if err := c.Create(); !errdefs.IsUnavailable(err) {
		t.Errorf("error %v, want unavailable", err)
	}
}
