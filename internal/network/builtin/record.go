package builtin

import (
	"crypto/sha256"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/state"
)

// podKind is what the network holds for one pod: STATE/pods/ID. It is written
// before anything is taken and removed after everything is given back. It is
// volatile: what it describes does not outlive the boot either.
var podKind = state.Kind{Name: "network-builtin-pod", Version: 1}

// subnetsKind is DIR/subnets, the subnets the kubelet asked for last.
var subnetsKind = state.Kind{Name: "network-builtin-subnets", Version: 1}

type record struct {
	Pod     string                `json:"pod"`
	Name    string                `json:"name"` // namespace/name, for messages
	Boot    string                `json:"boot"`
	Link    string                `json:"link"` // the host's end
	IPs     []podIP               `json:"ips"`
	Ports   []network.PortMapping `json:"ports,omitempty"`
	Leaving bool                  `json:"leaving,omitempty"`
}

// podIP is an address of a pod and where it comes from.
type podIP struct {
	Addr    netip.Addr   `json:"addr"`
	Subnet  netip.Prefix `json:"subnet"`
	Gateway netip.Addr   `json:"gateway"`
}

func (r *record) result() network.Result {
	res := network.Result{Interface: podLink, MAC: r.mac()}
	for _, ip := range r.IPs {
		res.IPs = append(res.IPs, ip.Addr)
	}
	return res
}

// mac is the hardware address of the pod's end: locally administered and
// derived from the pod's address, so that a pod keeps it however often its link
// is made.
func (r *record) mac() net.HardwareAddr {
	sum := sha256.Sum256(r.IPs[0].Addr.AsSlice())
	return net.HardwareAddr{0x0a, 0x53, sum[0], sum[1], sum[2], sum[3]}
}

// ip returns the pod's address of the same IP version as like.
func (r *record) ip(is4 bool) (netip.Addr, bool) {
	for _, ip := range r.IPs {
		if ip.Addr.Is4() == is4 {
			return ip.Addr, true
		}
	}
	return netip.Addr{}, false
}

// shelf has the directories of records: dir for what outlives the boot, state for
// what does not.
type shelf struct{ dir, state string }

func openShelf(dir, stateDir string) (shelf, error) {
	s := shelf{dir, stateDir}
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll(s.path(""), 0o700)); err != nil {
		return s, err
	}
	return s, errors.Join(state.SweepTemporary(dir), state.SweepTemporary(s.path("")))
}

func (s shelf) path(podID string) string { return filepath.Join(s.state, "pods", podID) }

func (s shelf) store(r *record) error {
	return state.Write(s.path(r.Pod), podKind, r, state.Volatile)
}

func (s shelf) forget(podID string) error { return state.Remove(s.path(podID)) }

// load returns the records of this boot and removes those of earlier ones, for
// what they describe is gone. Damaged ones are returned by pod ID.
func (s shelf) load(boot string) (good map[string]*record, damaged []string, err error) {
	entries, err := os.ReadDir(s.path(""))
	if err != nil {
		return nil, nil, err
	}
	good = make(map[string]*record)
	for _, e := range entries {
		if !network.IsPodID(e.Name()) {
			continue
		}
		var r record
		err := state.Read(s.path(e.Name()), podKind, &r)
		switch {
		case errors.Is(err, state.ErrDamaged):
			damaged = append(damaged, e.Name())
		case err != nil:
			return nil, nil, err
		case r.Boot != boot:
			if err := s.forget(e.Name()); err != nil {
				return nil, nil, err
			}
		default:
			good[r.Pod] = &r
		}
	}
	return good, damaged, nil
}

func (s shelf) subnets() ([]netip.Prefix, error) {
	var subnets []netip.Prefix
	err := state.Read(filepath.Join(s.dir, "subnets"), subnetsKind, &subnets)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return subnets, err
}

func (s shelf) storeSubnets(subnets []netip.Prefix) error {
	return state.Write(filepath.Join(s.dir, "subnets"), subnetsKind, subnets, state.Durable)
}
