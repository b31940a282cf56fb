package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"path"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sampan.dev/sampan/internal/config"
	"sampan.dev/sampan/internal/host/apparmor"
	"sampan.dev/sampan/internal/network/builtin"
	"sampan.dev/sampan/internal/pod"
	"sampan.dev/sampan/internal/reset"
	"sampan.dev/sampan/internal/systemd"
)

func newResetCommand() *cobra.Command {
	var file, root, state string
	var yes bool
	cmd := &cobra.Command{
		Use:   "reset --yes",
		Short: "Remove everything a stopped daemon has left: pods, images, network, records",
		Long: `Remove everything a stopped daemon has left on this host: it ends all keepers
and containers and removes their mounts, namespaces, cgroups and network, all
images and all records. With CNI plugins, remove the pods first while the daemon
runs (sampan pod rm --all), for only then do the plugins hear of it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file)
			if err != nil {
				return err
			}
			c.Root, c.State = cmp.Or(root, c.Root), cmp.Or(state, c.State)
			if err := c.Validate(); err != nil {
				return err
			}
			if !yes {
				return fmt.Errorf("reset: would remove all pods and images, %s and %s; say --yes if you mean it", c.Root, c.State)
			}
			if conn, err := net.DialTimeout("unix", c.SocketPath(), time.Second); err == nil {
				conn.Close()
				return errors.New("reset: a daemon serves " + c.Listen + "; stop it first")
			}
			if err := stopUnits(cmd.Context(), c.State); err != nil {
				return err
			}
			return reset.All(cmd.Context(), reset.Target{
				Root: c.Root, State: c.State, RemoveNetwork: func() error { return builtin.Remove("", "") }, NetNS: "/run/netns",
				Cgroup: "sampan", Keepers: keeperCgroup(c.State, "*"),
				Marks: filepath.Join(logRoot, "*", runMark), UnloadProfile: apparmor.Unload, Plugins: filepath.Dir(c.NRI.SocketPath),
			})
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file of the daemon")
	cmd.Flags().StringVar(&root, "root", "", "the daemon's root")
	cmd.Flags().StringVar(&state, "state", "", "the daemon's state")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	return cmd
}

// stopUnits ends all units of systemd that the daemon has made. Those of pods are
// everybody's who uses this name.
func stopUnits(ctx context.Context, state string) error {
	if !systemd.Running() {
		return nil
	}
	var units systemd.Units
	defer units.Close()
	for _, pattern := range []string{pod.UnitPattern, keeperScope(state, "*")} {
		names, err := units.Named(ctx, pattern)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := units.Stop(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// keeperScope names the scope of a keeper, as keeperCgroup its cgroup.
func keeperScope(state, keeper string) string {
	return path.Base(keeperCgroup(state, keeper)) + ".scope"
}

// keeperCgroup names the cgroup of a keeper. Several daemons on one machine must
// not share one, so it depends on their STATE.
func keeperCgroup(state, keeper string) string {
	instance := fnv.New32a()
	instance.Write([]byte(state))
	return fmt.Sprintf("/sampan.keeper-%s-%08x", keeper, instance.Sum32())
}
