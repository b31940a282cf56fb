// Command sampan is a container runtime for Kubernetes: the daemon that serves
// the Container Runtime Interface, and a small client for people. One file per
// verb; serve.go wires the daemon's parts together.
//
// The client's verbs talk to the daemon's socket as any CRI client would, and
// work with any other CRI runtime too (--endpoint).
package main

import (
	"context"
	"errors"
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
	os.Exit(report(err))
}

// report tells why a command failed and returns the exit code.
func report(err error) int {
	if err == nil {
		return 0
	}
	var exit exitError
	if errors.As(err, &exit) {
		return int(exit)
	}
	fmt.Fprintln(os.Stderr, "sampan:", err)
	return 1
}

// exitError is the exit code of a command that ran in a container, or of one
// that has said all there is to say.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// newCommand returns the whole tree of verbs.
func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "sampan",
		Short:         "A container runtime for Kubernetes",
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddGroup(
		&cobra.Group{ID: "pods", Title: "Pods and images:"},
		&cobra.Group{ID: "daemon", Title: "The daemon:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("pods", newRunCommand(), newPodCommand(), newLogsCommand(), newExecCommand(), newImageCommand())
	add("daemon", newServeCommand(), newStatusCommand(), newConfigCommand(), newBenchCommand(), newResetCommand(), newFsckCommand(), newVersionCommand(), newManCommand())
	return root
}
