package builtin_test

import (
	"log/slog"
	"os"
	"testing"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/builtin"
	"sampan.dev/sampan/internal/ociruntime/conformance"
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

func TestConformance(t *testing.T) { conformance.Run(t, newRuntime) }
