package network

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
)

var podID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// IsPodID reports whether s has the form of a pod's ID.
func IsPodID(s string) bool { return podID.MatchString(s) }

// Validate checks what every network relies on. The error wraps
// ErrInvalidArgument.
func (p Pod) Validate() error {
	if !IsPodID(p.ID) {
		return fmt.Errorf("pod id %q: %w: not 64 hex digits", p.ID, errdefs.ErrInvalidArgument)
	}
	if p.NetNS == "" {
		return fmt.Errorf("pod %s: %w: no network namespace", p.ID, errdefs.ErrInvalidArgument)
	}
	ports := p.Mapped()
	for i, m := range ports {
		if err := m.validate(); err != nil {
			return err
		}
		for _, earlier := range ports[:i] {
			if m.Conflicts(earlier) {
				return fmt.Errorf("port mapping %s: %w: the pod asks for the host port twice", m, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func (m PortMapping) validate() error {
	switch m.Protocol {
	case TCP, UDP, SCTP:
	default:
		return fmt.Errorf("port mapping %s: %w: unknown protocol %q, use tcp, udp or sctp", m, errdefs.ErrInvalidArgument, m.Protocol)
	}
	if m.ContainerPort == 0 {
		return fmt.Errorf("port mapping %s: %w: no container port", m, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Mapped returns the mappings that ask for a host port, without duplicates.
func (p Pod) Mapped() []PortMapping {
	var mapped []PortMapping
	for _, m := range p.PortMappings {
		m.HostIP = m.HostIP.Unmap().WithZone("")
		if m.HostPort != 0 && !slices.Contains(mapped, m) {
			mapped = append(mapped, m)
		}
	}
	return mapped
}

// String returns the host's side, such as "8080/tcp" or "10.0.0.1:53/udp".
func (m PortMapping) String() string {
	if m.HostIP.IsValid() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(m.HostIP, m.HostPort), m.Protocol)
	}
	return fmt.Sprintf("%d/%s", m.HostPort, m.Protocol)
}

// Serves reports whether traffic to the host address reaches the mapping. An
// unspecified host IP serves the addresses of its IP version, none serves both.
func (m PortMapping) Serves(host netip.Addr) bool {
	switch {
	case !m.HostIP.IsValid():
		return true
	case m.HostIP.IsUnspecified():
		return m.HostIP.Is4() == host.Is4()
	default:
		return m.HostIP == host
	}
}

// Conflicts reports whether two mappings want the same port of the same address.
func (m PortMapping) Conflicts(o PortMapping) bool {
	if m.Protocol != o.Protocol || m.HostPort != o.HostPort {
		return false
	}
	if !m.HostIP.IsValid() || !o.HostIP.IsValid() {
		return true
	}
	return m.Serves(o.HostIP) || o.Serves(m.HostIP)
}

// ValidateCIDRs checks subnets for pods: at most one of each IP version, with
// room for a gateway and a pod. The error wraps ErrInvalidArgument.
func ValidateCIDRs(cidrs []netip.Prefix) error {
	versions := make(map[bool]netip.Prefix)
	for _, c := range cidrs {
		if !c.IsValid() || c != c.Masked() {
			return fmt.Errorf("pod subnet %s: %w: not a network address such as 10.88.0.0/16", c, errdefs.ErrInvalidArgument)
		}
		if c.Addr().BitLen()-c.Bits() < 2 {
			return fmt.Errorf("pod subnet %s: %w: too small for a gateway and a pod", c, errdefs.ErrInvalidArgument)
		}
		if other, ok := versions[c.Addr().Is4()]; ok {
			return fmt.Errorf("pod subnets %s and %s: %w: two subnets of the same IP version", other, c, errdefs.ErrInvalidArgument)
		}
		versions[c.Addr().Is4()] = c
	}
	return nil
}
