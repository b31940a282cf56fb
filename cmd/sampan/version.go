package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// release is set by the build.
var release = "0.1.0-dev"

// version is what the daemon answers and the command prints.
func version() string { return release }

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "sampan %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
