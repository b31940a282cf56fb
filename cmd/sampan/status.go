package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell whether the daemon is ready; exit code 1 if it is not",
		Args:  cobra.NoArgs,
	}
	return daemon{timeout: 10 * time.Second}.verb(cmd, showStatus)
}

func showStatus(ctx context.Context, c *client, cmd *cobra.Command, _ []string) error {
	version, err := c.runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return err
	}
	answer, err := c.runtime.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "%s %s, CRI %s\n", version.GetRuntimeName(), version.GetRuntimeVersion(), version.GetRuntimeApiVersion())
	ready := true
	for _, condition := range answer.GetStatus().GetConditions() {
		word := "yes"
		if !condition.GetStatus() {
			word = "no"
			// The kubelet waits for these two; others only inform.
			if t := condition.GetType(); t == runtimeapi.RuntimeReady || t == runtimeapi.NetworkReady {
				ready = false
			}
		}
		fmt.Fprintf(w, "%s: %s%s\n", condition.GetType(), word, reason(condition))
	}
	var handlers []string
	for _, h := range answer.GetRuntimeHandlers() {
		if h.GetName() != "" {
			handlers = append(handlers, h.GetName())
		}
	}
	if len(handlers) > 0 {
		fmt.Fprintf(w, "handlers: %s\n", strings.Join(handlers, ", "))
	}
	if !ready {
		return exitError(1)
	}
	return nil
}

func reason(c *runtimeapi.RuntimeCondition) string {
	var parts []string
	for _, s := range []string{c.GetReason(), c.GetMessage()} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return " (" + strings.Join(parts, ": ") + ")"
}
