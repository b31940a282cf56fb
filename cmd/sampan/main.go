// Command sampan is a container runtime for Kubernetes: the daemon that serves
// the Container Runtime Interface, and a small client for people. One file per
// verb; serve.go wires the daemon's parts together.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newCommand().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "sampan:", err)
		os.Exit(1)
	}
}

// newCommand returns the whole tree of verbs.
func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "sampan",
		Short:         "A container runtime for Kubernetes",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newServeCommand())
	return root
}
