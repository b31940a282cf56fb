package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newExecCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec POD[/CONTAINER] [flags] -- COMMAND ARG...",
		Short: "Run a command in a container and print what it says",
		Long: `Run a command in a container, wait for its end, and print what it has written.
The exit code is the command's. It gets no input and no terminal.`,
		Args: cobra.MinimumNArgs(2),
	}
	return daemon{timeout: time.Minute}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		container, err := c.findContainer(ctx, args[0])
		if err != nil {
			return err
		}
		request := &runtimeapi.ExecSyncRequest{ContainerId: container.GetId(), Cmd: args[1:]}
		if deadline, ok := ctx.Deadline(); ok {
			// So that the command is killed, not only left alone.
			request.Timeout = int64(math.Ceil(time.Until(deadline).Seconds()))
		}
		answer, err := c.runtime.ExecSync(ctx, request)
		if err != nil {
			return fmt.Errorf("exec in %s: %w", args[0], err)
		}
		cmd.OutOrStdout().Write(answer.GetStdout())
		cmd.ErrOrStderr().Write(answer.GetStderr())
		if code := answer.GetExitCode(); code != 0 {
			return exitError(code)
		}
		return nil
	})
}
