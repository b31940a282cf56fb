// Package e2e tests the built daemon as its users meet it: through crictl, with
// processes killed under it, and with input that is wrong.
package e2e

import (
	"testing"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
