package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/bench"
	"sampan.dev/sampan/internal/config"
)

func newBenchCommand() *cobra.Command {
	o := bench.Options{}
	var endpoint, handler, output string
	var compare, asJSON bool
	var start, reports []string
	cmd := &cobra.Command{
		Use:   "bench [--compare TARGET TARGET...]",
		Short: "Measure any CRI runtime, or compare several",
		Long: "Measure a CRI runtime: the life of pods, memory, CPU, exec, logs, images. It makes pods in the\n" +
			"namespace sampan-bench and removes them again. Nothing else should use the machine meanwhile.\n\n" +
			"With --compare, each TARGET is a file of results (FILE.json), or an endpoint to measure now, as\n" +
			"[NAME=]ENDPOINT[#HANDLER]; several endpoints are measured in turn.\n\nCases:\n" + caseList(),
		Example: "  sampan bench --only pods,exec -n 20\n" +
			"  sampan bench --output before.json\n" +
			"  sampan bench --compare before.json after.json --report difference.svg\n" +
			"  sampan bench --compare sampan=/run/sampan/sampan.sock crun=/run/containerd/containerd.sock#crun",
		Args: func(_ *cobra.Command, args []string) error {
			if compare == (len(args) < 2) {
				return errors.New("--compare takes two targets or more, and without it there are no arguments")
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&endpoint, "endpoint", config.Default().Listen, "socket of the runtime")
	f.StringVar(&handler, "handler", "", "runtime handler of the pods (default: the runtime's)")
	f.BoolVar(&compare, "compare", false, "compare the targets that are named")
	f.StringSliceVar(&o.Only, "only", nil, "cases to run (default: all that need no option of their own)")
	f.StringVar(&o.Image, "image", "docker.io/library/busybox:latest", "image of the containers, with a busybox")
	f.StringSliceVar(&o.PullImages, "pull-image", nil, "image to pull, for the case pull")
	f.IntVarP(&o.N, "count", "n", 30, "how often each thing is done")
	f.IntSliceVarP(&o.Parallel, "parallel", "c", []int{1, 4, 16}, "pods at a time, for the case burst")
	f.DurationVar(&o.Pause, "pause", 300*time.Millisecond, "pause between pods, where there are pauses")
	f.IntSliceVar(&o.Containers, "containers", []int{100}, "how many there are, for the case lists")
	f.IntVar(&o.Pods, "pods", 50, "how many, for the case memory")
	f.IntSliceVar(&o.StartPods, "start-pods", []int{0, 50}, "how many there are, for the case start")
	f.StringArrayVar(&start, "start-command", nil, "`COMMAND` that starts the daemon, for the case start, which kills it; one for each target")
	f.IntVar(&o.Density, "density", 0, "how many pods, for the case density")
	f.StringVar(&o.LogDir, "log-dir", "/var/log/pods", "`DIR` for the containers' logs")
	f.BoolVar(&asJSON, "json", false, "print results as JSON")
	f.StringVarP(&output, "output", "o", "", "also write results to `FILE`, as JSON")
	f.StringArrayVar(&reports, "report", nil, "also write a report to `FILE`: a picture if it ends in .svg, tables if in .md")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, report := range reports {
			if ext := filepath.Ext(report); ext != ".svg" && ext != ".md" {
				return fmt.Errorf("--report %s: must end in .svg or .md", report)
			}
		}
		o.Progress = func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), text) }
		if !compare {
			args = []string{"=" + endpoint + "#" + handler}
		}
		results, err := measure(cmd, o, args, start)
		if err != nil {
			return err
		}
		return errors.Join(show(cmd, results, output, reports, asJSON), failures(results))
	}
	return cmd
}

func caseList() string {
	var b strings.Builder
	for _, c := range bench.Cases() {
		fmt.Fprintf(&b, "  %-12s %s\n", c[0], c[1])
	}
	return b.String()
}

// measure runs the benchmark on the targets that are endpoints, and reads the
// results of those that are files.
func measure(cmd *cobra.Command, o bench.Options, args, start []string) (*bench.Results, error) {
	var runs []*bench.Results
	for _, arg := range args {
		if strings.HasSuffix(arg, ".json") {
			r, err := bench.Load(arg)
			if err != nil {
				return nil, err
			}
			runs = append(runs, r)
			continue
		}
		t, err := parseTarget(arg)
		if err != nil {
			return nil, err
		}
		o.Targets = append(o.Targets, t)
	}
	if len(start) > len(o.Targets) {
		return nil, fmt.Errorf("--start-command: %d are given for %d targets", len(start), len(o.Targets))
	}
	for i, command := range start {
		o.Targets[i].Start = command
	}
	if len(o.Targets) > 0 {
		if err := runApart(); err != nil {
			return nil, err
		}
		r, err := bench.Run(cmd.Context(), o)
		if err != nil {
			return nil, err
		}
		runs = append(runs, r)
	}
	return bench.Merge(runs...), nil
}

// apart tells the program that it is the copy already.
const apart = "SAMPAN_BENCH_APART"

// runApart starts this command again from a copy of its program, in memory. It
// would share its pages with a daemon of the same program otherwise, which would
// seem to have fewer.
func runApart() error {
	if os.Getenv(apart) != "" {
		return nil
	}
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer program.Close()
	fd, err := unix.MemfdCreate("sampan-bench", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy the program: %w", err)
	}
	file := os.NewFile(uintptr(fd), "sampan-bench")
	defer file.Close()
	if _, err := io.Copy(file, program); err != nil {
		return fmt.Errorf("copy the program: %w", err)
	}
	err = unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), os.Args, append(os.Environ(), apart+"=1"))
	return fmt.Errorf("start a copy of the program: %w", err)
}

// parseTarget reads [NAME=]ENDPOINT[#HANDLER].
func parseTarget(arg string) (bench.Target, error) {
	name, rest, ok := strings.Cut(arg, "=")
	if !ok {
		name, rest = "", arg
	}
	endpoint, handler, _ := strings.Cut(rest, "#")
	if strings.HasPrefix(endpoint, "/") {
		endpoint = "unix://" + endpoint
	}
	if !strings.HasPrefix(endpoint, "unix:///") {
		return bench.Target{}, fmt.Errorf("target %q: must be a file of results that ends in .json, or a unix socket like %s", arg, config.Default().Listen)
	}
	if name == "" {
		if name = strings.TrimSuffix(filepath.Base(endpoint), ".sock"); handler != "" {
			name += "+" + handler
		}
	}
	return bench.Target{Name: name, Endpoint: endpoint, Handler: handler}, nil
}

// show prints results and writes the files that were asked for.
func show(cmd *cobra.Command, r *bench.Results, output string, reports []string, asJSON bool) error {
	if output != "" {
		if err := r.Save(output); err != nil {
			return err
		}
	}
	for _, report := range reports {
		if err := writeReport(r, report); err != nil {
			return err
		}
	}
	if asJSON {
		return r.JSON(cmd.OutOrStdout())
	}
	return r.Print(cmd.OutOrStdout())
}

func writeReport(r *bench.Results, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	write := r.Picture
	if filepath.Ext(path) == ".md" {
		write = r.Markdown
	}
	return errors.Join(write(f), f.Close())
}

// failures makes an exit code of cases that failed; they have been told.
func failures(r *bench.Results) error {
	if len(r.Failures) > 0 {
		return exitError(1)
	}
	return nil
}
