package cni

import "testing"

// BenchmarkPod is the built-in network's benchmark for Debian's bridge,
// host-local and portmap plugins: what their programs cost.
func BenchmarkPod(b *testing.B) {
	lab := newBench(b)
	lab.configureBridge(b)
	n := lab.open(b)
	for b.Loop() {
		b.StopTimer()
		pod := lab.NewPod(b)
		b.StartTimer()
		if _, err := n.Attach(b.Context(), pod); err != nil {
			b.Fatal(err)
		}
		if err := n.Detach(b.Context(), pod.ID); err != nil {
			b.Fatal(err)
		}
	}
}
