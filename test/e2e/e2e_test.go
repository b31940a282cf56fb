// Package e2e tests the built daemon as its users meet it: through crictl, with
// processes killed under it, and with input that is wrong.
package e2e

import (
	"os"
	"testing"

	"github.com/containerd/nri/pkg/api"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) {
	if os.Getenv(api.PluginNameEnvVar) != "" {
		os.Exit(runInstalled())
	}
	lab.Main(m)
}
