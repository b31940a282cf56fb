package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// settle is how long a runtime has to give memory back before it is looked at.
const settle = 3 * time.Second

// memory looks at the runtime's processes with no pod, with a few, and with many,
// each with one container.
func (r *runner) memory(ctx context.Context) {
	seen := r.newSamples()
	few, many := max(1, r.o.Pods/5), r.o.Pods
	r.each(ctx, func(t *target) error {
		r.progress("%s, %d pods", t.Name, many)
		var at [3]usage
		for i, n := range []int{0, few, many} {
			if err := r.grow(ctx, t, n); err != nil {
				return err
			}
			sleepFor(ctx, settle)
			processes, err := t.processes(ctx)
			if err != nil {
				return err
			}
			if at[i], err = memoryOf(processes); err != nil {
				return err
			}
			r.addUsage(seen[t], fmt.Sprintf("%d pods", n), at[i])
		}
		more := float64(many - few)
		seen[t].add(Key{Name: "each further pod, PSS", Unit: "MiB"}, float64(at[2].pss-at[1].pss)/more/(1<<20))
		seen[t].add(Key{Name: "each further pod, private and page tables", Unit: "MiB"}, float64(at[2].private()-at[1].private())/more/(1<<20))
		if err := t.removeAll(ctx); err != nil {
			return err
		}
		sleepFor(ctx, settle)
		processes, err := t.processes(ctx)
		if err != nil {
			return err
		}
		after, err := memoryOf(processes)
		r.addUsage(seen[t], "afterwards", after)
		return err
	})
	r.collect(seen)
}

func (u usage) private() int64 { return u.dirty + u.pageTables }

func (r *runner) addUsage(seen *samples, variant string, u usage) {
	seen.add(Key{Variant: variant, Name: "PSS", Unit: "MiB"}, float64(u.pss)/(1<<20))
	seen.add(Key{Variant: variant, Name: "private and page tables", Unit: "MiB"}, float64(u.private())/(1<<20))
	seen.add(Key{Variant: variant, Name: "processes", Unit: ""}, float64(u.processes))
}

// podsOf lists the pods that this benchmark has made.
func (t *target) podsOf(ctx context.Context) ([]string, error) {
	a, err := t.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		LabelSelector: map[string]string{label: ""}, State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}})
	ids := make([]string, 0, len(a.GetItems()))
	for _, p := range a.GetItems() {
		ids = append(ids, p.GetId())
	}
	return ids, err
}

// grow makes pods until there are n.
func (r *runner) grow(ctx context.Context, t *target, n int) error {
	ids, err := t.podsOf(ctx)
	if err != nil {
		return err
	}
	var configs []*runtimeapi.PodSandboxConfig
	for range n - len(ids) {
		configs = append(configs, r.podConfig(t, false))
	}
	return inParallel(4, len(configs), func(i int) error {
		_, err := t.up(ctx, configs[i])
		return err
	})
}

// containersPerPod is how many the case lists puts into each pod.
const containersPerPod = 10

// lists asks about many containers.
func (r *runner) lists(ctx context.Context) {
	for _, n := range r.o.Containers {
		variant := fmt.Sprintf("%d containers", n)
		seen := r.newSamples()
		// One target after the other: this many of several would be too many.
		r.each(ctx, func(t *target) error {
			r.progress("%s, %s", t.Name, variant)
			pods, err := r.fill(ctx, t, n)
			if err != nil {
				return err
			}
			r.ask(ctx, t, pods, variant, seen[t])
			return t.removeAll(ctx)
		})
		r.collect(seen)
	}
}

// fill makes n containers in a tenth as many pods.
func (r *runner) fill(ctx context.Context, t *target, n int) ([]*pod, error) {
	pods := make([]*pod, max(1, n/containersPerPod))
	configs := make([]*runtimeapi.PodSandboxConfig, len(pods))
	for i := range configs {
		configs[i] = r.podConfig(t, false)
	}
	return pods, inParallel(4, len(pods), func(i int) (err error) {
		if pods[i], err = t.runPod(ctx, configs[i]); err != nil {
			return err
		}
		for range containersPerPod {
			if _, err := t.add(ctx, pods[i], t.containerConfig(pods[i], sleep...)); err != nil {
				return err
			}
		}
		return nil
	})
}

// ask makes each call that a kubelet makes again and again. One that fails does not
// keep the others from being made.
func (r *runner) ask(ctx context.Context, t *target, pods []*pod, variant string, seen *samples) {
	calls := []struct {
		name string
		call func() error
	}{
		{"ListPodSandbox", func() error {
			_, err := t.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return err
		}},
		{"ListContainers", func() error {
			_, err := t.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return err
		}},
		{"PodSandboxStatus", func() error {
			_, err := t.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pods[rand.IntN(len(pods))].id})
			return err
		}},
		{"ContainerStatus", func() error {
			p := pods[rand.IntN(len(pods))]
			_, err := t.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: p.containers[rand.IntN(len(p.containers))]})
			return err
		}},
		{"ListContainerStats", func() error {
			_, err := t.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return err
		}},
		{"ListPodSandboxStats", func() error {
			_, err := t.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return err
		}},
	}
	for _, c := range calls {
		for i := range r.o.N + 1 {
			began := time.Now()
			if err := c.call(); err != nil {
				r.note(t, fmt.Errorf("%s: %w", c.name, err))
				break
			}
			if i > 0 { // the first one warms up
				seen.ms(variant, c.name, time.Since(began))
			}
		}
	}
}

// density makes pods up to a number, and looks at how the node does on the way.
func (r *runner) density(ctx context.Context) {
	seen := r.newSamples()
	r.each(ctx, func(t *target) error {
		var ups []time.Duration
		var containers []string
		for _, n := range densitySteps(r.o.Density) {
			r.progress("%s, %d pods", t.Name, n)
			for len(ups) < n {
				config := r.podConfig(t, false)
				began := time.Now()
				p, err := t.up(ctx, config)
				if err != nil {
					return fmt.Errorf("pod %d: %w", len(ups)+1, err)
				}
				ups = append(ups, time.Since(began))
				containers = append(containers, p.containers...)
			}
			if err := r.look(ctx, t, ups, containers, seen[t]); err != nil {
				return err
			}
		}
		return t.removeAll(ctx)
	})
	r.collect(seen)
}

// densitySteps are the numbers of pods at which density looks.
func densitySteps(n int) []int {
	var steps []int
	for _, s := range []int{10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1500, 2000, 3000, 4000, 5000} {
		if s < n {
			steps = append(steps, s)
		}
	}
	return append(steps, n)
}

// window is how many of the last starts count at a step of density.
const window = 100

func (r *runner) look(ctx context.Context, t *target, ups []time.Duration, containers []string, seen *samples) error {
	variant := fmt.Sprintf("%d pods", len(ups))
	for _, d := range ups[max(0, len(ups)-window):] {
		seen.ms(variant, podUp, d)
	}
	for range 20 {
		began := time.Now()
		if err := t.execSync(ctx, containers[rand.IntN(len(containers))], "true"); err != nil {
			return err
		}
		seen.ms(variant, "ExecSync", time.Since(began))
	}
	for range 10 {
		began := time.Now()
		if _, err := t.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err != nil {
			return err
		}
		seen.ms(variant, "ListPodSandbox", time.Since(began))
	}
	processes, err := t.processes(ctx)
	if err != nil {
		return err
	}
	u, err := memoryOf(processes)
	if err != nil {
		return err
	}
	seen.add(Key{Variant: variant, Name: "PSS", Unit: "MiB"}, float64(u.pss)/(1<<20))
	daemon, err := t.daemon()
	if err != nil {
		return err
	}
	if u, err = memoryOf(map[int]process{daemon: {}}); err != nil {
		return err
	}
	seen.add(Key{Variant: variant, Name: "PSS of the daemon", Unit: "MiB"}, float64(u.pss)/(1<<20))
	return nil
}

// starts is how often the case start starts a daemon.
const starts = 5

// start kills the daemon and starts it again, with pods running.
func (r *runner) start(ctx context.Context) {
	for _, n := range r.o.StartPods {
		variant := fmt.Sprintf("%d pods", n)
		seen := r.newSamples()
		r.each(ctx, func(t *target) error {
			if t.Start == "" {
				return errors.New("no command was given that starts it")
			}
			r.progress("%s, %s", t.Name, variant)
			if err := r.grow(ctx, t, n); err != nil {
				return err
			}
			for range starts {
				if err := r.restart(ctx, t, n, variant, seen[t]); err != nil {
					return err
				}
			}
			return t.removeAll(ctx)
		})
		r.collect(seen)
	}
}

// restart times how long a daemon takes to answer, and until it lists all pods.
func (r *runner) restart(ctx context.Context, t *target, pods int, variant string, seen *samples) error {
	pid, err := t.daemon()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for !ended(pid) {
		if sleepFor(ctx, time.Millisecond); ctx.Err() != nil {
			return fmt.Errorf("process %d does not end: %w", pid, ctx.Err())
		}
	}
	cmd := exec.Command("/bin/sh", "-c", t.Start)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it stays when the benchmark ends
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() //nolint:errcheck // reaps it if it ends while the benchmark runs
	if err := t.await(ctx, func() bool {
		_, err := t.runtime.Version(ctx, &runtimeapi.VersionRequest{})
		return err == nil
	}); err != nil {
		return fmt.Errorf("the daemon does not answer after %q: %w", t.Start, err)
	}
	seen.ms(variant, "until it answers", time.Since(began))
	if err := t.await(ctx, func() bool {
		ids, err := t.podsOf(ctx)
		return err == nil && len(ids) == pods
	}); err != nil {
		return fmt.Errorf("after its start the daemon does not list all pods: %w", err)
	}
	seen.ms(variant, "until it lists all pods", time.Since(began))
	// It may still be busy with what it found.
	sleepFor(ctx, time.Second)
	return nil
}

// ended tells whether nothing of a process is left to run. One whose first
// thread has ended may still hold files with its others.
func ended(pid int) bool {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil || len(threads) != 1 {
		return err != nil
	}
	all, err := readProcesses()
	return err == nil && all[pid].state == "Z"
}

// await asks again and again, as fast as a client can.
func (t *target) await(ctx context.Context, ok func() bool) error {
	for !ok() {
		t.conn.ResetConnectBackoff()
		if sleepFor(ctx, time.Millisecond); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// pull pulls images that are not there, and removes them.
func (r *runner) pull(ctx context.Context) {
	for _, ref := range r.o.PullImages {
		r.progress("%s", ref)
		seen := r.newSamples()
		r.rounds(ctx, pulls, func(t *target) error { return r.pullOnce(ctx, t, ref, seen[t]) })
		r.collect(seen)
	}
}

// pulls is how often the case pull pulls an image.
const pulls = 3

func (r *runner) pullOnce(ctx context.Context, t *target, ref string, seen *samples) error {
	image := &runtimeapi.ImageSpec{Image: ref}
	if _, err := t.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image}); err != nil {
		return err
	}
	syscall.Sync() // what others have written is not this pull's
	before, err := t.cpuOf(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	if _, err := t.pull(ctx, ref); err != nil {
		return err
	}
	seen.ms(ref, "PullImage", time.Since(began))
	after, err := t.cpuOf(ctx)
	if err != nil {
		return err
	}
	seen.ms(ref, "CPU of PullImage", after-before)
	began = time.Now()
	if _, err := t.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image}); err != nil {
		return err
	}
	seen.ms(ref, "RemoveImage", time.Since(began))
	return nil
}
