package builtin

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// hostSide is the host's network namespace: the sockets into it and what all
// pods share there.
type hostSide struct {
	netns    string // its path, or empty for the process's own
	link     string
	rt       *rtnl
	firewall *firewall
	netlink  *netlink.Handle // for what is rare: dumps and conntrack
}

// layout is what the shared part of the network depends on. Of each IP version
// the first gateway speaks for the host.
type layout struct {
	subnets  []netip.Prefix
	gateways []netip.Addr
}

func (l *layout) add(subnet netip.Prefix, gateway netip.Addr) {
	if !slices.Contains(l.subnets, subnet) {
		l.subnets = append(l.subnets, subnet)
		l.gateways = append(l.gateways, gateway)
	}
}

// equal reports whether two layouts have the same subnets, in whatever order.
func (l layout) equal(o layout) bool {
	return len(l.subnets) == len(o.subnets) &&
		!slices.ContainsFunc(l.subnets, func(s netip.Prefix) bool { return !slices.Contains(o.subnets, s) })
}

func openHostSide(netns, link string) (*hostSide, error) {
	h := &hostSide{netns: netns, link: link}
	err := h.inside(func() (err error) {
		if h.rt, err = openRtnl(); err != nil {
			return err
		}
		if h.firewall, err = openFirewall(link); err != nil {
			return err
		}
		h.netlink, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// inside runs fn in the host's namespace.
func (h *hostSide) inside(fn func() error) error {
	if h.netns == "" {
		return fn()
	}
	return host.InNetNS(h.netns, fn)
}

func (h *hostSide) Close() error {
	var errs []error
	if h.netlink != nil {
		h.netlink.Close()
	}
	if h.firewall != nil {
		errs = append(errs, h.firewall.Close())
	}
	if h.rt != nil {
		errs = append(errs, h.rt.Close())
	}
	return errors.Join(errs...)
}

// prepare makes what all pods share: forwarding, the link that holds the
// gateway addresses, a route that keeps traffic for addresses nobody has from
// leaving the node, and the firewall table. It can be repeated.
//
// The link is a bridge without ports. Any kind that can hold an address would
// do; of the virtual ones a kernel may lack (dummy) this one is the rarest to be
// missing. Pods are not plugged into it: each has a veth of its own and a route
// to it. There is no limit of 1023 ports, no broadcast that reaches a thousand
// pods, and packets between pods pass the same hooks as all others, so Services
// and policies work without br_netfilter.
func (h *hostSide) prepare(l layout) error {
	if err := h.inside(func() error { return enableForwarding(l) }); err != nil {
		return err
	}
	if err := h.checkOverlap(l); err != nil {
		return err
	}
	gateways, err := h.rt.link(h.link, addBridge(h.link))
	if err != nil {
		return err
	}
	if gateways.kind != "bridge" {
		return fmt.Errorf("link %s exists and is a %s, not ours", h.link, gateways.kind)
	}
	requests := []request{linkUp(gateways.index)}
	for _, g := range l.gateways {
		requests = append(requests, addAddr(gateways.index, g))
	}
	for _, s := range l.subnets {
		requests = append(requests, addRoute(route{dst: s, unreachable: true}))
	}
	requests = append(requests, h.outdated(int(gateways.index), l)...)
	return h.rt.do(requests...)
}

// dismantle undoes prepare, except that forwarding stays on: others may have come
// to rely on it.
func (h *hostSide) dismantle() error {
	err := h.firewall.remove()
	gateways, lookupErr := h.rt.link(h.link)
	if lookupErr != nil && !errors.Is(lookupErr, unix.ENODEV) {
		return errors.Join(err, lookupErr)
	}
	requests := h.outdated(int(gateways.index), layout{})
	if gateways.kind == "bridge" {
		requests = append(requests, delLink(h.link))
	}
	return errors.Join(err, h.rt.do(requests...))
}

// outdated removes what was prepared for subnets that are no longer in use: they
// may belong to another node by now.
func (h *hostSide) outdated(gateways int, l layout) []request {
	var requests []request
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		// What cannot be listed stays, and is listed again next time.
		addrs, _ := h.netlink.AddrList(nil, fam)
		for _, a := range addrs {
			if addr, ok := prefixOf(a.IPNet); ok && a.LinkIndex == gateways && addr.IsSingleIP() && !slices.Contains(l.gateways, addr.Addr()) {
				requests = append(requests, delAddr(int32(gateways), addr.Addr()))
			}
		}
		filter := &netlink.Route{Protocol: routeProtocol, Type: unix.RTN_UNREACHABLE}
		routes, _ := h.netlink.RouteListFiltered(fam, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
		for _, r := range routes {
			if dst, ok := prefixOf(r.Dst); ok && !slices.Contains(l.subnets, dst) {
				requests = append(requests, delRoute(route{dst: dst, unreachable: true}))
			}
		}
	}
	return requests
}

// enableForwarding makes the host a router. An interface that learns its own
// IPv6 routes from router advertisements would stop doing so now, unless told
// to go on.
func enableForwarding(l layout) error {
	for _, s := range l.subnets {
		if s.Addr().Is4() {
			if err := setSysctl("net/ipv4/ip_forward", "1"); err != nil {
				return err
			}
			continue
		}
		const all = "net/ipv6/conf/all/forwarding"
		if readSysctl(all) == "1" {
			continue
		}
		learning, _ := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
		for _, path := range learning {
			name := strings.TrimPrefix(path, "/proc/sys/")
			if readSysctl(name) == "1" {
				if err := host.WriteSysctl(name, "2"); err != nil {
					return err
				}
			}
		}
		if err := setSysctl(all, "1"); err != nil {
			return err
		}
	}
	return nil
}

// setSysctl writes only what is not so yet: /proc/sys may be read-only where
// the operator has set everything up.
func setSysctl(name, value string) error {
	if readSysctl(name) == value {
		return nil
	}
	return host.WriteSysctl(name, value)
}

func readSysctl(name string) string {
	data, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// checkOverlap refuses subnets that the host already reaches in another way:
// our routes would take that traffic.
func (h *hostSide) checkOverlap(l layout) error {
	for _, s := range l.subnets {
		routes, err := h.netlink.RouteListFiltered(int(family(s.Addr())), &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			dst, ok := prefixOf(r.Dst)
			if !ok || int(r.Protocol) == routeProtocol || dst.Bits() < s.Bits() || !s.Contains(dst.Addr()) {
				continue
			}
			return fmt.Errorf("pod subnet %s overlaps with the host's route to %s: choose another subnet", s, dst)
		}
	}
	return nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	if !ok {
		return netip.Prefix{}, false
	}
	if len(n.Mask) == net.IPv4len {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, bits), true
}

// mtu is that of the link with the default route: a packet that a pod can send
// then fits through. 1500 if there is no such link.
func (h *hostSide) mtu() uint32 {
	const usual = 1500
	routes, err := h.netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return usual
	}
	for _, r := range routes {
		if dst, ok := prefixOf(r.Dst); r.LinkIndex == 0 || ok && dst.Bits() > 0 {
			continue
		}
		if l, err := h.netlink.LinkByIndex(r.LinkIndex); err == nil && l.Attrs().MTU >= 1280 {
			return uint32(l.Attrs().MTU)
		}
	}
	return usual
}

// podLinks lists the names of the host's ends of pods' links.
func (h *hostSide) podLinks() ([]string, error) {
	links, err := h.netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var names []string
	for _, l := range links {
		if a := l.Attrs(); strings.HasPrefix(a.Name, h.link+"-") && a.HardwareAddr.String() == hostMAC.String() {
			names = append(names, a.Name)
		}
	}
	return names, nil
}

// podLink is the name of a pod's link on the host: digits of its ID, counted
// from skip.
func (h *hostSide) podLink(podID string, skip int) string {
	return h.link + "-" + podID[skip:skip+linkDigits]
}

// routedTo lists the pod addresses that our routes send to a link; none if there
// is no such link. Which subnet they are of, the kernel does not know.
func (h *hostSide) routedTo(name string, subnets []netip.Prefix) ([]podIP, error) {
	l, err := h.rt.link(name)
	if errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	filter := &netlink.Route{LinkIndex: int(l.index), Protocol: routeProtocol}
	var ips []podIP
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := h.netlink.RouteListFiltered(fam, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return nil, fmt.Errorf("list routes to %s: %w", name, err)
		}
		for _, r := range routes {
			dst, ok := prefixOf(r.Dst)
			gateway, _ := netip.AddrFromSlice(r.Src)
			if !ok || !dst.IsSingleIP() {
				continue
			}
			subnet := dst
			if i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return s.Contains(dst.Addr()) }); i >= 0 {
				subnet = subnets[i]
			}
			ips = append(ips, podIP{Addr: dst.Addr(), Subnet: subnet, Gateway: gateway.Unmap()})
		}
	}
	return ips, nil
}
