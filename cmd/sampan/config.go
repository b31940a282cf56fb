package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"sampan.dev/sampan/internal/config"
)

func newConfigCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Print or check a configuration file", Args: cobra.NoArgs}
	cmd.AddCommand(
		&cobra.Command{
			Use:   "default",
			Short: "Print every key with its default and what it means",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := fmt.Fprint(cmd.OutOrStdout(), config.DefaultTOML())
				return err
			},
		},
		&cobra.Command{
			Use:   "check [FILE]",
			Short: "Check a configuration file, by default " + config.DefaultPath,
			Args:  cobra.MaximumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				path := config.DefaultPath
				if len(args) > 0 {
					path = args[0]
				}
				c, err := config.Load(path)
				if err != nil {
					return err
				}
				for name, handler := range c.Handlers {
					// Not an error: the rest of the node works without it.
					if _, err := os.Stat(handler.Path); errors.Is(err, fs.ErrNotExist) {
						fmt.Fprintf(cmd.ErrOrStderr(), "warning: handlers.%s.path: %s does not exist\n", name, handler.Path)
					}
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is valid\n", path)
				return err
			},
		},
	)
	return cmd
}
