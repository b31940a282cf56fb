package builtin

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
)

// BenchmarkPod times what the start and the stop of a pod wait for, without the
// making and dropping of the pod's namespace: back to back, and with pauses,
// after which the kernel's grace periods are not paid for by the pod before. The
// last case is among more pods than a bridge has ports.
func BenchmarkPod(b *testing.B) {
	port := network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080}
	for _, c := range []struct {
		name    string
		subnets []netip.Prefix
		ports   []network.PortMapping
		pause   time.Duration
		crowd   int
	}{
		{"v4", []netip.Prefix{subnet4}, nil, 0, 0},
		{"dual", []netip.Prefix{subnet4, subnet6}, nil, 0, 0},
		{"port", []netip.Prefix{subnet4}, []network.PortMapping{port}, 0, 0},
		{"v4-paused", []netip.Prefix{subnet4}, nil, 300 * time.Millisecond, 0},
		{"port-paused", []netip.Prefix{subnet4}, []network.PortMapping{port}, 300 * time.Millisecond, 0},
		{"v4-crowded", []netip.Prefix{subnet4}, nil, 0, 1100},
	} {
		b.Run(c.name, func(b *testing.B) {
			lab := networktest.NewLab(b)
			n := openIn(b, lab, b.TempDir(), c.subnets...)
			for range c.crowd {
				networktest.Attach(b, n, lab.NewPod(b))
			}
			var attach, detach []time.Duration
			for b.Loop() {
				b.StopTimer()
				pod := lab.NewPod(b, c.ports...)
				time.Sleep(c.pause)
				b.StartTimer()
				attach = append(attach, timed(func() error { _, err := n.Attach(b.Context(), pod); return err }, b))
				detach = append(detach, timed(func() error { return n.Detach(b.Context(), pod.ID) }, b))
				b.StopTimer()
				lab.Drop(b, pod.NetNS)
				b.StartTimer()
			}
			report(b, "attach", attach)
			report(b, "detach", detach)
		})
	}
}

func timed(do func() error, b *testing.B) time.Duration {
	start := time.Now()
	if err := do(); err != nil {
		b.Fatal(err)
	}
	return time.Since(start)
}

func report(b *testing.B, what string, took []time.Duration) {
	slices.Sort(took)
	for name, i := range map[string]int{"p50": len(took) / 2, "p99": len(took) * 99 / 100} {
		b.ReportMetric(float64(took[i].Microseconds()), what+"-"+name+"-µs")
	}
}
