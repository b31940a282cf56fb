package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// newServeCommand is the daemon. It is not wired yet.
func newServeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return errors.New("serve: not built yet") },
	}
}
