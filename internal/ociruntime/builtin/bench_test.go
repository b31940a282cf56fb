package builtin_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

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
}

func newStages(b *testing.B) *stages {
	return &stages{b: b, times: make(map[string][]time.Duration)}
}

func (s *stages) begin() { s.last = time.Now() }

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
	s.b.ReportMetric(0, "ns/op")
}

func BenchmarkContainer(b *testing.B) {
	lab := conformance.NewLab(b)
	rt := newRuntime(b)
	for _, pause := range pauses {
		b.Run(fmt.Sprintf("pause=%v", pause), func(b *testing.B) {
			s := newStages(b)
			for b.Loop() {
				c := lab.Prepare(b, rt, []string{"true"})
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
			}
			s.report()
		})
	}
}

func BenchmarkExec(b *testing.B) {
	lab := conformance.NewLab(b)
	rt := newRuntime(b)
	c := lab.Run(b, rt, []string{"sleep", "1000"})
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
			}
			s.report()
		})
	}
}
