package builtin_test

import (
	"log/slog"
	"os"
	"sync"
	"testing"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/builtin"
	"sampan.dev/sampan/internal/ociruntime/conformance"
	"sampan.dev/sampan/internal/ociruntime/launch"
)

func TestMain(m *testing.M) {
	builtin.Init()
	if encoded := os.Getenv(creatorEnv); encoded != "" {
		create(encoded)
	}
	os.Exit(m.Run())
}

func newRuntime(t testing.TB) ociruntime.Runtime {
	return builtin.New(builtin.Config{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
}

// newLaunching is newRuntime where it does not leave all to libcontainer; elsewhere
// the test is skipped.
func newLaunching(t testing.TB) ociruntime.Runtime {
	if err := launchable(); err != nil {
		t.Skipf("probe: %v", err)
	}
	return newRuntime(t)
}

var launchable = sync.OnceValue(func() error { _, err := launch.New(); return err })

// newLibcontainer returns the runtime as it is for what only libcontainer can do.
func newLibcontainer(t testing.TB) ociruntime.Runtime {
	return builtin.New(builtin.Config{Libcontainer: true, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
}

func TestConformance(t *testing.T) {
	t.Run("launch", func(t *testing.T) { conformance.Run(t, newLaunching) })
	t.Run("libcontainer", func(t *testing.T) { conformance.Run(t, newLibcontainer) })
}
