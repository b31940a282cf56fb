// Package bench measures container runtimes from outside: through the CRI, and
// by looking at their processes. It knows nothing of how any of them works, not
// even of Sampan, and what it does to one it does to all, in turn.
//
// A runtime's processes are the one that answers on its socket, the ancestors of
// its containers (shims, conmons, keepers), and the descendants of both, but for
// the containers' own. A pod's pause process is the runtime's.
package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Target is one runtime to measure.
type Target struct {
	Name     string `json:"name"`              // what results call it
	Endpoint string `json:"endpoint"`          // unix:///PATH
	Handler  string `json:"handler,omitempty"` // of its pods; "" is the runtime's default
	Start    string `json:"start,omitempty"`   // command that starts its daemon, for the case start
}

// Options say what to measure.
type Options struct {
	Targets    []Target
	Only       []string      // names of cases; none runs all that can be run
	Image      string        // of the containers; has a busybox
	PullImages []string      // for the case pull
	N          int           // how often each thing is done
	Parallel   []int         // pods at a time, for the case burst
	Pause      time.Duration // between pods, where there are pauses
	Containers []int         // how many there are, for the case lists
	Pods       int           // for the case memory
	StartPods  []int         // how many there are, for the case start
	Density    int           // how many, for the case density
	LogDir     string        // where containers' logs go; made if absent
	Progress   func(text string)
}

// A benchCase is one kind of measurement, made on all targets in turn.
type benchCase struct {
	name, what string
	run        func(*runner, context.Context)
	possible   func(Options) bool // nil: always
}

func cases() []benchCase {
	return []benchCase{
		{"pods", "a pod's life, step by step", (*runner).pods, nil},
		{"containers", "a container's life in a running pod", (*runner).containers, nil},
		{"burst", "pods up and down, several at a time, with CPU", (*runner).burst, nil},
		{"memory", "memory of the runtime's processes", (*runner).memory, nil},
		{"lists", "lists, status and statistics of many containers", (*runner).lists, nil},
		{"exec", "ExecSync", (*runner).exec, nil},
		{"streams", "exec, attach and port-forward", (*runner).streams, nil},
		{"logs", "containers' output", (*runner).logs, nil},
		{"pull", "pulling and removing images", (*runner).pull, func(o Options) bool { return len(o.PullImages) > 0 }},
		{"start", "the daemon's start", (*runner).start, func(o Options) bool {
			return slices.ContainsFunc(o.Targets, func(t Target) bool { return t.Start != "" })
		}},
		{"density", "many pods", (*runner).density, func(o Options) bool { return o.Density > 0 }},
	}
}

// Cases lists the names of the cases with what they measure.
func Cases() [][2]string {
	var list [][2]string
	for _, c := range cases() {
		list = append(list, [2]string{c.name, c.what})
	}
	return list
}

type runner struct {
	o       Options
	targets []*target
	results *Results
	current string           // the case under way
	failed  map[*target]bool // in this case
	serial  int              // makes names unique
}

// Run measures, and returns what it has seen. A case that fails on a target is a
// Failure in the results, and no error. All pods that were made are removed.
func Run(ctx context.Context, o Options) (*Results, error) {
	chosen, err := choose(o)
	if err != nil {
		return nil, err
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	r := &runner{o: o, results: newResults()}
	defer func() {
		for _, t := range r.targets {
			t.close()
		}
	}()
	for _, target := range o.Targets {
		t, err := r.open(ctx, target)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", target.Name, err)
		}
		r.targets = append(r.targets, t)
		r.results.Targets = append(r.results.Targets, TargetInfo{Target: target, Version: t.version})
	}
	for _, c := range chosen {
		if r.runCase(ctx, c); ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return r.results, nil
}

func choose(o Options) ([]benchCase, error) {
	all := cases()
	for _, name := range o.Only {
		if !slices.ContainsFunc(all, func(c benchCase) bool { return c.name == name }) {
			return nil, fmt.Errorf("case %q: there is none of that name", name)
		}
	}
	var chosen []benchCase
	for _, c := range all {
		named := slices.Contains(o.Only, c.name)
		can := c.possible == nil || c.possible(o)
		if named && !can {
			return nil, fmt.Errorf("case %q: needs an option that tells with what (see --help)", c.name)
		}
		if named || len(o.Only) == 0 && can {
			chosen = append(chosen, c)
		}
	}
	return chosen, nil
}

// runCase runs a case and removes its pods. A target where that does not succeed
// is left out from then on.
func (r *runner) runCase(ctx context.Context, c benchCase) {
	r.current, r.failed = c.name, map[*target]bool{}
	began, before := time.Now(), load()
	c.run(r, ctx)
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	r.targets = slices.DeleteFunc(r.targets, func(t *target) bool {
		err := t.removeAll(clean)
		if err != nil {
			r.fail(t, fmt.Errorf("remove its pods: %w", err))
			t.close()
		}
		return err != nil
	})
	r.results.Cases = append(r.results.Cases, CaseInfo{
		Name: c.name, Began: began.UTC(), Seconds: time.Since(began).Seconds(), LoadBefore: before, LoadAfter: load(),
	})
}

// each does something with every target, one after the other, that has not
// failed in this case.
func (r *runner) each(ctx context.Context, do func(*target) error) {
	for _, t := range r.targets {
		if r.failed[t] || ctx.Err() != nil {
			continue
		}
		if err := do(t); err != nil {
			r.fail(t, err)
		}
	}
}

// fail ends the case under way for a target.
func (r *runner) fail(t *target, err error) {
	r.failed[t] = true
	r.note(t, err)
}

// note records a failure that leaves the rest of the case to be done.
func (r *runner) note(t *target, err error) {
	r.results.Failures = append(r.results.Failures, Failure{Target: t.Name, Case: r.current, Error: err.Error()})
	r.progress("%s: %v", t.Name, err)
}

// rounds does something n times with every target, in turn, so that whatever
// else the machine does hits all of them.
func (r *runner) rounds(ctx context.Context, n int, do func(*target) error) {
	for range n {
		r.each(ctx, do)
	}
}

// progress tells what is measured now.
func (r *runner) progress(format string, a ...any) {
	r.o.Progress(r.current + ": " + fmt.Sprintf(format, a...))
}

// open connects to a target and gives it the image.
func (r *runner) open(ctx context.Context, target Target) (*target, error) {
	t, err := dial(target)
	if err != nil {
		return nil, err
	}
	t.logDir = r.o.LogDir
	if err := errors.Join(t.identify(ctx), t.removeAll(ctx)); err != nil {
		t.close()
		return nil, err
	}
	if t.image, err = t.pull(ctx, r.o.Image); err != nil {
		t.close()
		return nil, fmt.Errorf("pull %s: %w", r.o.Image, err)
	}
	return t, nil
}

func load() float64 {
	var one float64
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(text), &one)
	}
	return one
}

// hostInfo describes the machine.
func hostInfo() HostInfo {
	var u unix.Utsname
	h := HostInfo{CPUs: runtime.NumCPU()}
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) == nil {
		h.MemoryMiB = int(i.Totalram * uint64(i.Unit) >> 20)
	}
	h.Cgroup = "v1"
	var s unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
		h.Cgroup = "v2"
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				h.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	return h
}

// identify asks the runtime who it is.
func (t *target) identify(ctx context.Context) error {
	v, err := t.runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return err
	}
	t.version = v.GetRuntimeName() + " " + v.GetRuntimeVersion()
	return nil
}
