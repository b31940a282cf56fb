package builtin

import (
	"net/netip"
	"testing"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
)

// BenchmarkAttach and BenchmarkDetach time what a pod's start and stop wait for,
// without the making and dropping of its namespace.

func BenchmarkAttach(b *testing.B) {
	for name, subnets := range map[string][]netip.Prefix{"v4": {subnet4}, "dual": {subnet4, subnet6}} {
		b.Run(name, func(b *testing.B) { benchmarkAttach(b, subnets) })
	}
	b.Run("port", func(b *testing.B) {
		benchmarkAttach(b, []netip.Prefix{subnet4}, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	})
}

func benchmarkAttach(b *testing.B, subnets []netip.Prefix, ports ...network.PortMapping) {
	lab := networktest.NewLab(b)
	n := openIn(b, lab, b.TempDir(), subnets...)
	for b.Loop() {
		b.StopTimer()
		pod := lab.NewPod(b, ports...)
		b.StartTimer()
		if _, err := n.Attach(b.Context(), pod); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := n.Detach(b.Context(), pod.ID); err != nil {
			b.Fatal(err)
		}
		lab.Drop(b, pod.NetNS)
		b.StartTimer()
	}
}

func BenchmarkDetach(b *testing.B) {
	for name, ports := range map[string][]network.PortMapping{
		"plain": nil,
		"port":  {{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080}},
	} {
		b.Run(name, func(b *testing.B) {
			lab := networktest.NewLab(b)
			n := openIn(b, lab, b.TempDir(), subnet4)
			for b.Loop() {
				b.StopTimer()
				pod := lab.NewPod(b, ports...)
				if _, err := n.Attach(b.Context(), pod); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := n.Detach(b.Context(), pod.ID); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				lab.Drop(b, pod.NetNS)
				b.StartTimer()
			}
		})
	}
}
