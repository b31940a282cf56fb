package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/state"
)

// podKind is what is known of a pod's attachment: DIR/pods/ID. It is written
// before the plugins are called, and again with their result. It is durable,
// because plugins keep what they gave (addresses, say) across reboots.
var podKind = state.Kind{Name: "network-cni-pod", Version: 1}

// cidrsKind is DIR/cidrs, the subnets the kubelet asked for last.
var cidrsKind = state.Kind{Name: "network-cni-cidrs", Version: 1}

type record struct {
	Pod          string                `json:"pod"`
	Name         string                `json:"name"` // namespace/name, for messages
	Boot         string                `json:"boot"`
	NetNS        string                `json:"netns"`
	Network      json.RawMessage       `json:"network"` // the configuration
	Args         [][2]string           `json:"args"`
	Capabilities map[string]any        `json:"capabilities,omitempty"`
	Ports        []network.PortMapping `json:"ports,omitempty"`
	Result       json.RawMessage       `json:"result,omitempty"` // absent until ADD is done
	Leaving      bool                  `json:"leaving,omitempty"`
}

func newRecord(pod network.Pod, list *libcni.NetworkConfigList, cidrs []netip.Prefix) (*record, error) {
	capabilities, err := capabilitiesOf(pod, cidrs)
	if err != nil {
		return nil, err
	}
	return &record{
		Pod:     pod.ID,
		Name:    pod.Namespace + "/" + pod.Name,
		Boot:    host.BootID(),
		NetNS:   pod.NetNS,
		Network: list.Bytes,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", pod.Namespace},
			{"K8S_POD_NAME", pod.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", pod.ID},
			{"K8S_POD_UID", pod.UID},
		},
		Capabilities: capabilities,
		Ports:        pod.Mapped(),
	}, nil
}

// capabilitiesOf is the data that libcni passes to those plugins that declare
// the capability of that name, in the form of the CNI conventions.
func capabilitiesOf(pod network.Pod, cidrs []netip.Prefix) (map[string]any, error) {
	capabilities := make(map[string]any)
	type portMapping struct {
		HostPort      uint16 `json:"hostPort"`
		ContainerPort uint16 `json:"containerPort"`
		Protocol      string `json:"protocol"`
		HostIP        string `json:"hostIP"`
	}
	var ports []portMapping
	for _, m := range pod.Mapped() {
		p := portMapping{m.HostPort, m.ContainerPort, string(m.Protocol), ""}
		if m.HostIP.IsValid() {
			p.HostIP = m.HostIP.String()
		}
		ports = append(ports, p)
	}
	if len(ports) > 0 {
		capabilities["portMappings"] = ports
	}
	bandwidth, err := pod.Bandwidth()
	if err != nil {
		return nil, err
	}
	if bandwidth != (network.Bandwidth{}) {
		// The burst is the largest the plugin takes, as it is with others.
		limits := make(map[string]uint64)
		const burst = 1<<31 - 1
		if bandwidth.Ingress > 0 {
			limits["ingressRate"], limits["ingressBurst"] = bandwidth.Ingress, burst
		}
		if bandwidth.Egress > 0 {
			limits["egressRate"], limits["egressBurst"] = bandwidth.Egress, burst
		}
		capabilities["bandwidth"] = limits
	}
	if len(cidrs) > 0 {
		type ipRange struct {
			Subnet string `json:"subnet"`
		}
		var ranges [][]ipRange
		for _, c := range cidrs {
			ranges = append(ranges, []ipRange{{c.String()}})
		}
		capabilities["ipRanges"] = ranges
	}
	if len(pod.Annotations) > 0 {
		capabilities["io.kubernetes.cri.pod-annotations"] = pod.Annotations
	}
	if pod.CgroupParent != "" {
		capabilities["cgroupPath"] = pod.CgroupParent
	}
	return capabilities, nil
}

// fromAttachment makes a record from libcni's cache.
func fromAttachment(a *libcni.NetworkAttachment) (*record, error) {
	r := &record{
		Pod:          a.ContainerID,
		Name:         "unknown",
		Boot:         host.BootID(),
		NetNS:        a.NetNS,
		Network:      a.Config,
		Args:         a.CniArgs,
		Capabilities: a.CapabilityArgs,
	}
	_, err := r.list()
	return r, err
}

func (r *record) list() (*libcni.NetworkConfigList, error) {
	return libcni.NetworkConfFromBytes(r.Network)
}

func (r *record) runtime() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID:    r.Pod,
		NetNS:          r.NetNS,
		IfName:         podLink,
		Args:           r.Args,
		CapabilityArgs: r.Capabilities,
	}
}

// attachedTo reports whether ADD was done for the namespace, and it is still
// that namespace.
func (r *record) attachedTo(netns string) bool {
	return r.Result != nil && r.Boot == host.BootID() && r.NetNS == netns
}

// result reads the plugins' result in any version of the CNI specification.
func (r *record) result() (network.Result, error) {
	list, err := r.list()
	if err != nil {
		return network.Result{}, err
	}
	res, err := parseResult(r.Result)
	if err != nil {
		return network.Result{}, fmt.Errorf("cni network %s: result: %w", list.Name, err)
	}
	return res, nil
}

func parseResult(data []byte) (network.Result, error) {
	parsed, err := create.CreateFromBytes(data)
	if err != nil {
		return network.Result{}, err
	}
	result, err := types100.GetResult(parsed)
	if err != nil {
		return network.Result{}, err
	}
	out := network.Result{Interface: podLink, DNS: network.DNS(result.DNS)}
	link := -1
	for i, l := range result.Interfaces {
		if l.Name == podLink && l.Sandbox != "" {
			link = i
			out.MAC, _ = net.ParseMAC(l.Mac)
		}
	}
	for _, ip := range result.IPs {
		if ip.Interface != nil && link >= 0 && *ip.Interface != link {
			continue // of a link on the host, or another in the pod
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return network.Result{}, fmt.Errorf("malformed address %q", ip.Address.IP)
		}
		out.IPs = append(out.IPs, addr.Unmap())
	}
	if len(out.IPs) == 0 {
		return network.Result{}, errors.New("the plugins gave the pod no address")
	}
	return out, nil
}

// shelf is the directory of records.
type shelf struct{ dir string }

func openShelf(dir string) (shelf, error) {
	s := shelf{dir}
	if err := os.MkdirAll(s.path(""), 0o700); err != nil {
		return s, err
	}
	return s, errors.Join(state.SweepTemporary(dir), state.SweepTemporary(s.path("")))
}

func (s shelf) path(podID string) string { return filepath.Join(s.dir, "pods", podID) }

func (s shelf) store(r *record) error {
	return state.Write(s.path(r.Pod), podKind, r, state.Durable)
}

func (s shelf) forget(podID string) error { return state.Remove(s.path(podID)) }

// load returns the records, and the pod IDs of damaged ones.
func (s shelf) load() (good map[string]*record, damaged []string, err error) {
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
		default:
			good[r.Pod] = &r
		}
	}
	return good, damaged, nil
}

func (s shelf) cidrs() ([]netip.Prefix, error) {
	var cidrs []netip.Prefix
	err := state.Read(filepath.Join(s.dir, "cidrs"), cidrsKind, &cidrs)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return cidrs, err
}

func (s shelf) storeCIDRs(cidrs []netip.Prefix) error {
	return state.Write(filepath.Join(s.dir, "cidrs"), cidrsKind, cidrs, state.Durable)
}
