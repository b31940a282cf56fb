//go:build !cgo || !seccomp

package builtin

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer/configs"
)

// compileSeccomp is not there without libseccomp: libcontainer then says so.
func compileSeccomp(*configs.Seccomp) (uint, []byte, error) {
	return 0, nil, fmt.Errorf("seccomp: built without: %w", errdefs.ErrNotImplemented)
}
