package bench

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pods takes pods through their life, one at a time: on the pod network and on
// the host's, back to back and with pauses, in which kernels grow quiet.
func (r *runner) pods(ctx context.Context) {
	for _, v := range []lifeVariant{
		{name: ""},
		{name: "pauses", pause: r.o.Pause},
		{name: "host network", hostNetwork: true},
		{name: "host network, pauses", hostNetwork: true, pause: r.o.Pause},
		{name: "default seccomp profile", seccomp: true},
	} {
		r.progress("%d pods, %s", r.o.N, orElse(v.name, "back to back"))
		seen := r.newSamples()
		r.each(ctx, func(t *target) error { return r.life(ctx, t, v, &samples{}) }) // warm up
		r.rounds(ctx, r.o.N, func(t *target) error {
			sleepFor(ctx, v.pause)
			return r.life(ctx, t, v, seen[t])
		})
		r.collect(seen)
	}
}

// lifeVariant is a kind of pod, and the pause before each.
type lifeVariant struct {
	name                 string
	hostNetwork, seccomp bool
	pause                time.Duration
}

// life times each step of a pod's life.
func (r *runner) life(ctx context.Context, t *target, v lifeVariant, seen *samples) error {
	config := r.podConfig(t, v.hostNetwork)
	began := time.Now()
	p, err := t.runPod(ctx, config)
	if err != nil {
		return err
	}
	ran := time.Now()
	container := t.containerConfig(p, sleep...)
	if v.seccomp {
		container.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	}
	id, err := t.create(ctx, p, container)
	if err != nil {
		return err
	}
	created := time.Now()
	if err := t.startContainer(ctx, id); err != nil {
		return err
	}
	started := time.Now()
	if err := t.stop(ctx, p.id); err != nil {
		return err
	}
	stopped := time.Now()
	if err := t.remove(ctx, p.id); err != nil {
		return err
	}
	removed := time.Now()
	variant := v.name
	seen.ms(variant, podUp, started.Sub(began))
	seen.ms(variant, podDown, removed.Sub(started))
	seen.ms(variant, "RunPodSandbox", ran.Sub(began))
	seen.ms(variant, "CreateContainer", created.Sub(ran))
	seen.ms(variant, "StartContainer", started.Sub(created))
	seen.ms(variant, "StopPodSandbox", stopped.Sub(started))
	seen.ms(variant, "RemovePodSandbox", removed.Sub(stopped))
	return nil
}

// Names of figures that others refer to.
const (
	podUp   = "pod up: run, create, start"
	podDown = "pod down: stop, remove"
)

// containers takes containers through their life in pods that are there.
func (r *runner) containers(ctx context.Context) {
	r.progress("%d containers", r.o.N)
	pods := map[*target]*pod{}
	r.each(ctx, func(t *target) (err error) {
		pods[t], err = t.runPod(ctx, r.podConfig(t, false))
		return err
	})
	seen := r.newSamples()
	r.rounds(ctx, r.o.N, func(t *target) error {
		p := pods[t]
		began := time.Now()
		id, err := t.create(ctx, p, t.containerConfig(p, sleep...))
		if err != nil {
			return err
		}
		created := time.Now()
		if err := t.startContainer(ctx, id); err != nil {
			return err
		}
		started := time.Now()
		if err := t.stopContainer(ctx, id); err != nil {
			return err
		}
		stopped := time.Now()
		if err := t.removeContainer(ctx, id); err != nil {
			return err
		}
		seen[t].ms("", "CreateContainer", created.Sub(began))
		seen[t].ms("", "StartContainer", started.Sub(created))
		seen[t].ms("", "StopContainer, no grace", stopped.Sub(started))
		seen[t].ms("", "RemoveContainer", time.Since(stopped))
		return nil
	})
	r.collect(seen)
}

// burst makes and removes pods, several at a time.
func (r *runner) burst(ctx context.Context) {
	for _, c := range r.o.Parallel {
		n := max(2*c, r.o.N)
		variant := fmt.Sprintf("%d at a time", c)
		r.progress("%d pods, %s", n, variant)
		seen := r.newSamples()
		r.rounds(ctx, 3, func(t *target) error { return r.wave(ctx, t, c, n, variant, seen[t]) })
		r.collect(seen)
	}
}

// wave makes n pods, c at a time, and removes them again.
func (r *runner) wave(ctx context.Context, t *target, c, n int, variant string, seen *samples) error {
	ids := make([]string, n)
	took := make([]time.Duration, n)
	configs := make([]func() error, n)
	for i := range configs {
		config := r.podConfig(t, false)
		configs[i] = func() error {
			began := time.Now()
			p, err := t.up(ctx, config)
			if err == nil {
				ids[i], took[i] = p.id, time.Since(began)
			}
			return err
		}
	}
	up, cpu, err := timed(func() error { return inParallel(c, n, func(i int) error { return configs[i]() }) })
	if err != nil {
		return err
	}
	seen.add(Key{Variant: variant, Name: "pods up", Unit: "1/s"}, float64(n)/up.Seconds())
	seen.ms(variant, cpuUp, cpu/time.Duration(n))
	for _, d := range took {
		seen.ms(variant, "one of them up", d)
	}
	down, cpu, err := timed(func() error { return inParallel(c, n, func(i int) error { return t.down(ctx, ids[i]) }) })
	if err != nil {
		return err
	}
	seen.add(Key{Variant: variant, Name: "pods down", Unit: "1/s"}, float64(n)/down.Seconds())
	seen.ms(variant, "CPU per pod down", cpu/time.Duration(n))
	return nil
}

const cpuUp = "CPU per pod up"

// timed tells how long something took, and the CPU time that everything else
// has used meanwhile.
func timed(do func() error) (took, cpu time.Duration, err error) {
	before, err := cpuClock()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := do(); err != nil {
		return 0, 0, err
	}
	took = time.Since(began)
	after, err := cpuClock()
	return took, after - before, err
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func sleepFor(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
