package builtin_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime"
	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// The kernel makes the first process that is moved between cgroups after a quiet
// time wait for an RCU grace period, which benchmarks in a loop never see. Hence
// the pauses.
var pauses = []time.Duration{0, 300 * time.Millisecond}

// stages measures the parts of an operation.
type stages struct {
	b     *testing.B
	names []string
	times map[string][]time.Duration
	last  time.Time
	used  []time.Duration // CPU from begin to the end, here and in what was reaped
	since time.Duration
}

// cpu is what this process and its children have used.
func cpu() time.Duration {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		unix.Getrusage(who, &u)
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// finish is called at the end of each round.
func (s *stages) finish() { s.used = append(s.used, cpu()-s.since) }

func newStages(b *testing.B) *stages {
	return &stages{b: b, times: make(map[string][]time.Duration)}
}

func (s *stages) begin() { s.since, s.last = cpu(), time.Now() }

func (s *stages) end(name string) {
	now := time.Now()
	if s.times[name] == nil {
		s.names = append(s.names, name)
	}
	s.times[name] = append(s.times[name], now.Sub(s.last))
	s.last = now
}

// report reports the medians.
func (s *stages) report() {
	var sum float64
	for _, name := range s.names {
		slices.Sort(s.times[name])
		median := float64(s.times[name][len(s.times[name])/2].Microseconds()) / 1000
		sum += median
		s.b.ReportMetric(median, "ms-"+name)
	}
	s.b.ReportMetric(sum, "ms-all")
	slices.Sort(s.used)
	s.b.ReportMetric(float64(s.used[len(s.used)/2].Microseconds())/1000, "ms-cpu")
	s.b.ReportMetric(0, "ns/op")
}

// runtimes are the two ways to start processes.
var runtimes = map[string]conformance.Factory{"launch": newLaunching, "libcontainer": newLibcontainer}

func BenchmarkContainer(b *testing.B) {
	for name, factory := range runtimes {
		b.Run(name, func(b *testing.B) { benchmarkContainer(b, factory(b)) })
	}
}

func benchmarkContainer(b *testing.B, rt ociruntime.Runtime) {
	lab := conformance.NewLab(b)
	for _, pause := range pauses {
		b.Run(fmt.Sprintf("pause=%v", pause), func(b *testing.B) {
			s := newStages(b)
			for b.Loop() {
				c := lab.Prepare(b, rt, []string{"true"}, usual)
				time.Sleep(pause)
				s.begin()
				if err := c.Create(); err != nil {
					b.Fatal(err)
				}
				s.end("create")
				c.Start()
				s.end("start")
				c.Wait()
				s.end("exit")
				c.Delete()
				s.end("delete")
				s.finish()
			}
			s.report()
		})
	}
}

// usual makes a spec one of a node's everyday containers: it has the default
// seccomp profile.
func usual(s *specs.Spec) {
	profile, err := seccomp.GetDefaultProfile(s)
	if err != nil {
		panic(err)
	}
	s.Linux.Seccomp = profile
}

func BenchmarkExec(b *testing.B) {
	for name, factory := range runtimes {
		b.Run(name, func(b *testing.B) { benchmarkExec(b, factory(b)) })
	}
}

func benchmarkExec(b *testing.B, rt ociruntime.Runtime) {
	lab := conformance.NewLab(b)
	c := lab.Run(b, rt, []string{"sleep", "1000"}, usual)
	for _, pause := range pauses {
		b.Run(fmt.Sprintf("pause=%v", pause), func(b *testing.B) {
			s := newStages(b)
			for b.Loop() {
				time.Sleep(pause)
				s.begin()
				started, err := rt.Exec(b.Context(), c.Container, ociruntime.ExecRequest{Process: c.Process("true")})
				if err != nil {
					b.Fatal(err)
				}
				s.end("exec")
				unix.Wait4(started.Pid, nil, 0, nil)
				s.end("exit")
				s.finish()
			}
			s.report()
		})
	}
}
