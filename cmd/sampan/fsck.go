package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"sampan.dev/sampan/internal/config"
	"sampan.dev/sampan/internal/embedded"
	"sampan.dev/sampan/internal/fsck"
	"sampan.dev/sampan/internal/image"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/network/builtin"
	"sampan.dev/sampan/internal/pod"
)

// What `sampan fsck` exits with.
const (
	fsckProblems = 1
	fsckFailed   = 2
)

func newFsckCommand() *cobra.Command {
	var file, root, state string
	var repair, content bool
	cmd := &cobra.Command{
		Use:   "fsck [--repair]",
		Short: "Check records, layers, mounts, namespaces and keepers against each other",
		Long: `Check all that Sampan has on this host: that records can be read and agree with
each other and with the processes, mounts, namespaces, links, cgroups and layers
there are, and that nothing is left of what is gone. It says of each thing that
is wrong what it is and what to do.

While the daemon runs, what comes and goes is no problem: the check is made
twice, and only what is there both times counts. Repairs need the daemon to be
stopped; pods go on meanwhile. A damaged layer is fetched again, alone, when the
daemon is back.

Exit code: 0 if all is well, 1 if there are problems, 2 if it cannot be checked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file)
			if err == nil {
				c.Root, c.State = cmp.Or(root, c.Root), cmp.Or(state, c.State)
				err = c.Validate()
			}
			if err != nil {
				return cannotCheck(cmd, err)
			}
			return runFsck(cmd, checks{c, content}, repair)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file of the daemon")
	cmd.Flags().StringVar(&root, "root", "", "the daemon's root")
	cmd.Flags().StringVar(&state, "state", "", "the daemon's state")
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what can be repaired")
	cmd.Flags().BoolVar(&content, "content", false, "read every file of every layer, too")
	return cmd
}

func cannotCheck(cmd *cobra.Command, err error) error {
	fmt.Fprintln(cmd.ErrOrStderr(), "sampan: fsck:", err)
	return exitError(fsckFailed)
}

// fsckPause is the time between the two checks while a daemon works: long enough
// for what takes it a moment.
const fsckPause = 2 * time.Second

func runFsck(cmd *cobra.Command, c checks, repair bool) error {
	if _, err := os.Stat(c.cfg.Root); err != nil {
		return cannotCheck(cmd, err)
	}
	unlock, err := lockRoot(c.cfg.Root)
	offline := err == nil
	if offline {
		defer unlock()
	} else if repair {
		return cannotCheck(cmd, errors.New("the daemon runs: stop it for repairs, pods go on meanwhile"))
	}
	problems, err := c.all(cmd.Context())
	if err == nil && !offline && len(problems) > 0 {
		time.Sleep(fsckPause)
		var now []fsck.Problem
		now, err = c.all(cmd.Context())
		problems = fsck.Lasting(problems, now)
	}
	if err != nil {
		return cannotCheck(cmd, err)
	}
	if repair {
		problems = repairAll(cmd.OutOrStdout(), problems)
	}
	fsck.Print(cmd.OutOrStdout(), problems)
	if len(problems) > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "sampan: fsck: %d problems\n", len(problems))
		return exitError(fsckProblems)
	}
	return nil
}

// repairAll returns the problems that are left.
func repairAll(w io.Writer, problems []fsck.Problem) []fsck.Problem {
	return slices.DeleteFunc(problems, func(p fsck.Problem) bool {
		if p.Repair == nil {
			return false
		}
		if err := p.Repair(); err != nil {
			fmt.Fprintf(w, "%s: repair: %v\n", p.Object, err)
			return false
		}
		fmt.Fprintf(w, "%s: %s: repaired\n", p.Object, p.What)
		return true
	})
}

// checks puts the packages' checks together.
type checks struct {
	cfg     config.Config
	content bool
}

func (c checks) all(ctx context.Context) ([]fsck.Problem, error) {
	layers, sound, err := c.layers(ctx)
	if err != nil {
		return nil, err
	}
	images, err := image.Check(filepath.Join(c.cfg.Root, "images"), sound)
	if err != nil {
		return nil, err
	}
	pods, err := c.pods()
	if err != nil {
		return nil, err
	}
	known := func(id string) bool { return pods.Pods[id] || pods.Containers[id] }
	keepers, err := keeper.Check(keeperDir(c.cfg, ""), keeperCgroup(c.cfg.State, "*"), known)
	if err != nil {
		return nil, err
	}
	links, err := builtin.Check(builtin.Config{Dir: filepath.Join(c.cfg.Root, "network", "builtin"), State: filepath.Join(c.cfg.State, "network")}, func(id string) bool { return pods.Pods[id] })
	return slices.Concat(layers, images, pods.Problems, keepers, links), err
}

// layers says of findings what to do.
func (c checks) layers(ctx context.Context) ([]fsck.Problem, map[digest.Digest]bool, error) {
	root := filepath.Join(c.cfg.Root, "layers")
	found, sound, err := layer.Check(ctx, root, c.content)
	var problems []fsck.Problem
	for _, f := range found {
		p := fsck.Problem{Object: "layer " + cmp.Or(f.DiffID.String(), f.Name), What: f.What}
		switch {
		case f.Sweep:
			p.Remedy = "the daemon's next start removes it"
		case f.Lost:
			p.Remedy = "sampan fsck --repair has it fetched again when the daemon is back"
			p.Repair = func() error { return layer.Drop(root, f) }
		default:
			p.Remedy = "a newer sampan wrote it: use that one"
		}
		problems = append(problems, p)
	}
	return problems, sound, err
}

func (c checks) pods() (pod.Checked, error) {
	program, err := embedded.Keeper()
	if err != nil {
		return pod.Checked{}, err
	}
	traces, err := keeper.Traces(keeperDir(c.cfg, ""))
	if err != nil {
		return pod.Checked{}, err
	}
	return pod.Check(pod.CheckConfig{
		Root: c.cfg.Root, State: c.cfg.State, NetNS: "/run/netns",
		KeeperFor: keeperNames(c.cfg, program.Digest), DefaultHandler: c.cfg.DefaultHandler,
		KeeperDir: func(name string) string { return keeperDir(c.cfg, name) },
		Running: func(name string) bool {
			return slices.ContainsFunc(traces, func(t keeper.Trace) bool { return t.Name == name && t.Alive })
		},
	})
}
