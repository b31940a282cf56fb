// Sampan-keeper is the parent of containers: it creates them, moves their output
// into logs, reaps them and notes how they ended. The daemon starts it, and needs
// it to outlive the daemon.
//
// It is also what every container's first process is before it becomes the
// user's, so what is linked into it is paid for at each start of a container.
package main

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/program"
	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/builtin"
	"sampan.dev/sampan/internal/ociruntime/cli"
)

// idleTimeout is how long a keeper stays that nobody needs.
const idleTimeout = 5 * time.Second

func main() {
	builtin.Init() // returns only if this is no container's process
	os.Exit(program.Main(os.Args[1:], program.Config{Runtime: runtimeOf, IdleTimeout: idleTimeout}))
}

// runtimeOf returns the OCI runtime that a handler names.
func runtimeOf(h keeper.Handler, log *slog.Logger) (ociruntime.Runtime, error) {
	switch h.Kind {
	case keeper.Builtin:
		return builtin.New(builtin.Config{Logger: log}), nil
	case keeper.CLI:
		return cli.New(cli.Config{Path: h.Path, Logger: log}), nil
	default:
		return nil, fmt.Errorf("handler of kind %q: %w", h.Kind, errdefs.ErrInvalidArgument)
	}
}
