// Package network gives pods their network. It declares the Network interface,
// its contract and the choice between implementations; the implementations are
// in builtin (netlink, no plugins) and cni (libcni), and networktest holds the
// tests that every one of them passes.
//
// The package never creates, pins or removes a network namespace: a pod arrives
// with one, and whoever made it removes it after Detach.
package network

import (
	"context"
	"net"
	"net/netip"
)

// A Network attaches pods' network namespaces and detaches them again.
//
// Everything is keyed by the pod's ID. A network writes down what it is about to
// take for a pod (address, host ports, link, plugin call) before it takes it,
// and forgets it only when it is given back. Whatever instant the process is
// killed at, a retried Attach, a Detach or a Sweep in the next process finds
// the record and finishes or undoes the work.
//
// The life of one pod:
//
//	           Attach               Detach            namespace gone
//	(unknown) ────────▶ attached ───────────▶ leaving ───────────────▶ (unknown)
//	    ▲                  │ ▲
//	    │ error, undone    └─┘ Attach again: the same Result
//	    └──────────────────┘
//
// A leaving pod has no traffic and no host ports, but its addresses are not
// given to anybody else before its link is gone.
//
// Methods may be called from any goroutine. Calls for one pod wait for each
// other; calls for different pods do not.
type Network interface {
	// Attach connects the namespace pinned at pod.NetNS and brings up its
	// loopback device. Repeated for an attached pod, in this process or a later
	// one, it repairs what is missing and returns the same Result. An Attach
	// that fails undoes itself; what it cannot undo at once is retried in the
	// background and meanwhile stays taken.
	//
	// Errors: ErrInvalidArgument for a malformed pod, ErrAlreadyExists when
	// another pod holds a host port (the text names the pod),
	// ErrResourceExhausted when no address is free, ErrUnavailable when the
	// network is not ready, ErrFailedPrecondition while the pod is leaving.
	Attach(ctx context.Context, pod Pod) (Result, error)

	// Detach takes the pod off the network. It succeeds for an unknown pod, and
	// tries again at once what failed before for a leaving one. It may be called
	// before or after the pod's namespace is removed. When it fails the network
	// goes on trying by itself, in this process and the next: the caller may
	// report the error and forget the pod.
	Detach(ctx context.Context, podID string) error

	// Sweep detaches every pod of which live says no. It is called once, at
	// start, before or while pods are attached; live must say yes to pods that
	// are being attached.
	Sweep(ctx context.Context, live func(podID string) bool) error

	// Holds reports whether there is a record of the pod: it is attached,
	// being attached, or leaving.
	Holds(podID string) bool

	// Ready is nil when Attach can be expected to work, and otherwise says in
	// words for the node's operator why not. It does not wait for anything.
	Ready() error

	// SetPodCIDR replaces the subnets that new pods get addresses from, at most
	// one for each IP version. Attached pods keep theirs.
	SetPodCIDR(cidrs []netip.Prefix) error

	// Close ends the network's background work and leaves pods attached.
	Close() error
}

// Pod is what a network needs to know of a pod.
type Pod struct {
	ID           string // 64 hex digits
	Namespace    string // the Kubernetes namespace
	Name         string
	UID          string
	NetNS        string // path on which the network namespace is pinned
	Hostname     string
	PortMappings []PortMapping
	Labels       map[string]string
	Annotations  map[string]string
	CgroupParent string
}

// Protocol is the transport protocol of a port mapping.
type Protocol string

// The protocols Kubernetes knows.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// PortMapping sends traffic for a port of the host to a port of the pod.
type PortMapping struct {
	Protocol      Protocol   `json:"protocol"`
	ContainerPort uint16     `json:"containerPort"`
	HostPort      uint16     `json:"hostPort"`         // 0: no mapping
	HostIP        netip.Addr `json:"hostIP,omitempty"` // zero or unspecified: every address of the host
}

// Result is what a pod got.
type Result struct {
	IPs       []netip.Addr     // the primary address first
	Interface string           // its name in the pod
	MAC       net.HardwareAddr // of Interface; may be nil with CNI
	DNS       DNS              // only from CNI, and rarely there
}

// DNS is resolver configuration.
type DNS struct {
	Nameservers []string `json:"nameservers,omitempty"`
	Domain      string   `json:"domain,omitempty"`
	Search      []string `json:"search,omitempty"`
	Options     []string `json:"options,omitempty"`
}
