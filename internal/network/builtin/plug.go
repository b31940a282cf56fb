package builtin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
)

// podLink is the name of a pod's end.
const podLink = "eth0"

// hostMAC is the hardware address of the host's end of every pod's link. Each
// of these links has only two ends, so all can have the same.
var hostMAC = net.HardwareAddr{0x0a, 0x53, 0x4d, 0x50, 0x4e, 0x01}

// plug brings the pod's network into the state its record describes, whatever
// part of it is there already.
func (h *hostSide) plug(ctx context.Context, pod *record, netns string, mtu uint32) error {
	ns, err := os.Open(netns)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()

	ends, err := h.connect(pod, int(ns.Fd()), netns, mtu)
	if err != nil {
		return err
	}
	fault.Point("network.link-made")
	if err := host.InNetNS(netns, func() error { return setUpPodSide(pod, int32(ends.peer)) }); err != nil {
		return fmt.Errorf("set up %s in the pod: %w", podLink, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	fault.Point("network.pod-side-up")
	if err := h.setUpHostSide(pod, ends.index); err != nil {
		return err
	}
	fault.Point("network.host-side-up")
	if len(pod.Ports) == 0 {
		return nil
	}
	if err := h.firewall.open(pod); err != nil {
		return err
	}
	fault.Point("network.ports-open")
	return h.forgetConnections(pod)
}

// connect makes the pod's link, or finds the one that an earlier plug made. A
// link that leads to another namespace is replaced.
func (h *hostSide) connect(pod *record, ns int, netns string, mtu uint32) (link, error) {
	pair := addVeth(pod.Link, hostMAC, podLink, pod.mac(), ns, mtu)
	ends, err := h.rt.link(pod.Link, pair, quietUp(pod.Link))
	if !errors.Is(err, unix.EEXIST) {
		return ends, err
	}
	old, lookupErr := h.rt.link(pod.Link)
	if errors.Is(lookupErr, unix.ENODEV) {
		return link{}, fmt.Errorf("the pod's namespace has an %s already: %w", podLink, err)
	}
	if lookupErr != nil {
		return link{}, lookupErr
	}
	if !bytes.Equal(old.mac, hostMAC) {
		return link{}, fmt.Errorf("link %s exists and is not ours: %w", pod.Link, err)
	}
	var peer link
	err = host.InNetNS(netns, func() error {
		rt, err := openRtnl()
		if err != nil {
			return err
		}
		defer rt.Close()
		peer, err = rt.link(podLink)
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	})
	if err != nil {
		return link{}, err
	}
	if uint32(peer.index) == old.peer && bytes.Equal(peer.mac, pod.mac()) {
		return old, nil
	}
	return h.rt.link(pod.Link, delLink(pod.Link), pair, quietUp(pod.Link))
}

// setUpPodSide runs in the pod's namespace.
func setUpPodSide(pod *record, index int32) error {
	const loopback = 1 // in every namespace
	rt, err := openRtnl()
	if err != nil {
		return err
	}
	defer rt.Close()
	requests := []request{linkUp(loopback), linkUp(index)}
	for _, ip := range pod.IPs {
		requests = append(requests,
			addAddr(index, ip.Addr),
			addNeighbour(index, ip.Gateway, hostMAC),
			addRoute(route{dst: defaultRoute(ip.Addr), link: index, gateway: ip.Gateway}))
	}
	return rt.do(requests...)
}

func (h *hostSide) setUpHostSide(pod *record, index int32) error {
	var requests []request
	for _, ip := range pod.IPs {
		requests = append(requests,
			addNeighbour(index, ip.Addr, pod.mac()),
			addRoute(route{dst: single(ip.Addr), link: index, source: ip.Gateway}))
	}
	if len(pod.Ports) > 0 {
		requests = append(requests, routeLocalnet(index))
	}
	return errors.Join(h.rt.do(requests...), h.rt.settle(pod.Link))
}

// cut takes all traffic away from the pod, at once and whatever its namespace
// still does: without a route to its address the host sends it nothing, and
// the firewall's guard drops what it sends.
func (h *hostSide) cut(pod *record) error {
	var requests []request
	for _, ip := range pod.IPs {
		requests = append(requests, delRoute(route{dst: single(ip.Addr)}))
	}
	err := h.rt.do(requests...)
	fault.Point("network.routes-cut")
	if len(pod.Ports) == 0 {
		return err
	}
	return errors.Join(err, h.firewall.shut(pod), h.forgetConnections(pod))
}

// unplug removes what cut leaves. It takes the kernel some 17 ms: the usual way
// for a link to go is with the pod's namespace.
func (h *hostSide) unplug(pod *record) error { return h.rt.do(delLink(pod.Link)) }

// unplugged reports whether the pod's link is gone.
func (h *hostSide) unplugged(pod *record) (bool, error) {
	_, err := h.rt.link(pod.Link)
	if errors.Is(err, unix.ENODEV) {
		return true, nil
	}
	return false, err
}

// forgetConnections drops what the kernel remembers of UDP senders to the pod's
// host ports. A UDP "connection" lives while somebody keeps sending, and it
// would go on to where the port led before.
func (h *hostSide) forgetConnections(pod *record) error {
	for _, m := range pod.Ports {
		if m.Protocol != network.UDP {
			continue
		}
		filter := &netlink.ConntrackFilter{}
		if err := errors.Join(filter.AddProtocol(unix.IPPROTO_UDP), filter.AddPort(netlink.ConntrackOrigDstPort, m.HostPort)); err != nil {
			return err
		}
		for _, fam := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			if _, err := h.netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, filter); err != nil {
				return fmt.Errorf("forget connections to host port %s: %w", m, err)
			}
		}
	}
	return nil
}
