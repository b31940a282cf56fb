package network

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
)

// Auto attaches new pods by the built-in network until a CNI configuration
// appears, and by CNI from then on: a configuration that is replaced or damaged
// later makes the node not ready rather than hand its pods to another network.
// A pod is detached by the network that attached it.
type Auto struct {
	builtin, cni Network
	configured   func() bool // whether there is a CNI configuration
	switched     atomic.Bool
}

var _ Network = (*Auto)(nil)

// NewAuto chooses between two networks, and owns them from now on. Configured
// reports whether there is a CNI configuration, good or bad.
func NewAuto(builtin, cni Network, configured func() bool) *Auto {
	return &Auto{builtin: builtin, cni: cni, configured: configured}
}

// current is the network for new pods.
func (a *Auto) current() Network {
	if !a.switched.Load() && a.configured() {
		a.switched.Store(true)
	}
	if a.switched.Load() {
		return a.cni
	}
	return a.builtin
}

// of is the network that knows the pod, or else the one for new pods.
func (a *Auto) of(podID string) Network {
	for _, n := range []Network{a.builtin, a.cni} {
		if n.Holds(podID) {
			return n
		}
	}
	return a.current()
}

// Attach implements Network.
func (a *Auto) Attach(ctx context.Context, pod Pod) (Result, error) {
	return a.of(pod.ID).Attach(ctx, pod)
}

// Detach implements Network.
func (a *Auto) Detach(ctx context.Context, podID string) error {
	return a.of(podID).Detach(ctx, podID)
}

// Sweep implements Network.
func (a *Auto) Sweep(ctx context.Context, live func(podID string) bool) error {
	return errors.Join(a.builtin.Sweep(ctx, live), a.cni.Sweep(ctx, live))
}

// Holds implements Network.
func (a *Auto) Holds(podID string) bool {
	return a.builtin.Holds(podID) || a.cni.Holds(podID)
}

// Ready implements Network.
func (a *Auto) Ready() error { return a.current().Ready() }

// SetPodCIDR implements Network.
func (a *Auto) SetPodCIDR(cidrs []netip.Prefix) error {
	return errors.Join(a.builtin.SetPodCIDR(cidrs), a.cni.SetPodCIDR(cidrs))
}

// Close implements Network.
func (a *Auto) Close() error { return errors.Join(a.builtin.Close(), a.cni.Close()) }
