package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnl is a route netlink socket. It sends several requests in one system call,
// which the kernel works off in order: a pod's end is set up by one message to
// its namespace. The socket belongs to the namespace of the thread that made it.
type rtnl struct {
	mu  sync.Mutex
	fd  int
	seq uint32
}

// request is one message. The kernel's answer is an error, nothing, or, for a
// get, one message.
type request struct {
	what   string // for error messages: "add route 10.0.0.0/8"
	typ    uint16
	flags  uint16
	body   []nl.NetlinkRequestData
	ignore unix.Errno // not an error: what was asked for is so already
}

// rtnlTimeout bounds the wait for one answer. The kernel answers within the
// system call; it takes long only while others hold its network lock.
const rtnlTimeout = 30 * time.Second

func openRtnl() (*rtnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	tv := unix.NsecToTimeval(rtnlTimeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
	)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up route netlink socket: %w", err)
	}
	return &rtnl{fd: fd}, nil
}

func (c *rtnl) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	fd := c.fd
	c.fd = -1 // never somebody else's
	return unix.Close(fd)
}

// do sends the requests together and returns the joined errors of those that
// failed. A failed request does not keep the ones after it from being done.
func (c *rtnl) do(requests ...request) error {
	if len(requests) == 0 {
		return nil
	}
	_, err := c.exchange(requests)
	return err
}

// get sends the requests together and returns the last one's answer.
func (c *rtnl) get(requests ...request) ([]byte, error) {
	answers, err := c.exchange(requests)
	if err != nil {
		return nil, err
	}
	return answers[len(answers)-1], nil
}

func (c *rtnl) exchange(requests []request) ([][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.seq + 1
	var out []byte
	for _, r := range requests {
		c.seq++
		msg := nl.NewNetlinkRequest(int(r.typ), int(r.flags)|unix.NLM_F_ACK)
		msg.Seq = c.seq
		for _, b := range r.body {
			msg.AddData(b)
		}
		out = append(out, msg.Serialize()...)
	}
	if err := unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("%s: send: %w", requests[0].what, err)
	}

	answers := make([][]byte, len(requests))
	var errs []error
	buf := make([]byte, 32<<10)
	for acks := 0; acks < len(requests); {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: receive: %w", requests[acks].what, err)
		}
		for rest := buf[:n]; len(rest) >= unix.NLMSG_HDRLEN; {
			length := binary.NativeEndian.Uint32(rest)
			if length < unix.NLMSG_HDRLEN || int(length) > len(rest) {
				return nil, fmt.Errorf("%s: malformed netlink message", requests[0].what)
			}
			typ, flags, seq := binary.NativeEndian.Uint16(rest[4:]), binary.NativeEndian.Uint16(rest[6:]), binary.NativeEndian.Uint32(rest[8:])
			body := rest[unix.NLMSG_HDRLEN:length]
			rest = rest[min(len(rest), int(length+3)&^3):]
			i := int(seq - first)
			if i < 0 || i >= len(requests) {
				continue // an answer to an exchange that was given up
			}
			if typ != unix.NLMSG_ERROR {
				answers[i] = append([]byte(nil), body...)
				continue
			}
			acks++
			if err := ackError(body, flags); err != nil && !errors.Is(err, requests[i].ignore) {
				errs = append(errs, fmt.Errorf("%s: %w", requests[i].what, err))
			}
		}
	}
	return answers, errors.Join(errs...)
}

// ackError turns an acknowledgement into an error, with the kernel's own words
// if it sent some.
func ackError(body []byte, flags uint16) error {
	if len(body) < 4 {
		return errors.New("malformed acknowledgement")
	}
	code := -int32(binary.NativeEndian.Uint32(body))
	if code == 0 {
		return nil
	}
	err := error(unix.Errno(code))
	const header = 4 + unix.NLMSG_HDRLEN // the code and the request's header
	if flags&unix.NLM_F_ACK_TLVS == 0 || len(body) < header {
		return err
	}
	if flags&unix.NLM_F_CAPPED == 0 {
		return err
	}
	attrs, parseErr := nl.ParseRouteAttr(body[header:])
	if parseErr != nil {
		return err
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", err, nl.BytesToString(a.Value))
		}
	}
	return err
}

// link is what RTM_GETLINK tells.
type link struct {
	index int32
	peer  uint32 // index of a veth's other end, in its own namespace
	name  string
	kind  string
	mac   net.HardwareAddr
	mtu   uint32
}

func parseLink(msg []byte) (link, error) {
	if len(msg) < unix.SizeofIfInfomsg {
		return link{}, errors.New("short link message")
	}
	info := nl.DeserializeIfInfomsg(msg)
	attrs, err := nl.ParseRouteAttr(msg[unix.SizeofIfInfomsg:])
	if err != nil {
		return link{}, err
	}
	l := link{index: info.Index}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.IFLA_IFNAME:
			l.name = nl.BytesToString(a.Value)
		case unix.IFLA_LINK:
			l.peer = binary.NativeEndian.Uint32(a.Value)
		case unix.IFLA_ADDRESS:
			l.mac = net.HardwareAddr(a.Value)
		case unix.IFLA_MTU:
			l.mtu = binary.NativeEndian.Uint32(a.Value)
		case unix.IFLA_LINKINFO:
			nested, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return link{}, err
			}
			for _, n := range nested {
				if n.Attr.Type == unix.IFLA_INFO_KIND {
					l.kind = nl.BytesToString(n.Value)
				}
			}
		}
	}
	return l, nil
}

// link looks a link up by name, after doing the requests before it.
func (c *rtnl) link(name string, before ...request) (link, error) {
	get := request{
		what: "look up link " + name,
		typ:  unix.RTM_GETLINK,
		body: []nl.NetlinkRequestData{nl.NewIfInfomsg(unix.AF_UNSPEC), attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name))},
	}
	msg, err := c.get(append(before, get)...)
	if err != nil {
		return link{}, err
	}
	return parseLink(msg)
}

// settle makes the kernel take notice that a link has a carrier. It would do so
// by itself, but in a background task that may come up to a second late, and
// until then the link drops what is sent on it: the first packet to a new pod.
// Asking for the link's state does the work at once.
func (c *rtnl) settle(name string) error {
	state := ethtoolValue{cmd: unix.ETHTOOL_GLINK}
	req := ethtoolRequest{value: &state}
	copy(req.name[:unix.IFNAMSIZ-1], name)
	c.mu.Lock()
	defer c.mu.Unlock()
	// Any socket of the namespace will do for an ioctl on a link.
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("settle link %s: %w", name, errno)
	}
	if state.data == 0 {
		return fmt.Errorf("settle link %s: it has no carrier", name)
	}
	return nil
}

// ethtoolRequest is struct ifreq with a pointer to a struct ethtool_value.
type ethtoolRequest struct {
	name  [unix.IFNAMSIZ]byte
	value *ethtoolValue
	_     [24 - unsafe.Sizeof(uintptr(0))]byte
}

type ethtoolValue struct{ cmd, data uint32 }

// The requests.

const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL
const replace = unix.NLM_F_CREATE | unix.NLM_F_REPLACE

func attr(typ int, data []byte) *nl.RtAttr { return nl.NewRtAttr(typ, data) }

func upInfo(index int32) *nl.IfInfomsg {
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index, info.Flags, info.Change = index, unix.IFF_UP, unix.IFF_UP
	return info
}

func linkUp(index int32) request {
	return request{what: "bring link up", typ: unix.RTM_NEWLINK, body: []nl.NetlinkRequestData{upInfo(index)}}
}

func delLink(name string) request {
	return request{
		what:   "delete link " + name,
		typ:    unix.RTM_DELLINK,
		body:   []nl.NetlinkRequestData{nl.NewIfInfomsg(unix.AF_UNSPEC), attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name))},
		ignore: unix.ENODEV,
	}
}

// addBridge makes a bridge, which stays without ports; see hostLink.
func addBridge(name string) request {
	kind := attr(unix.IFLA_LINKINFO, nil)
	kind.AddRtAttr(unix.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	return request{
		what:   "create link " + name,
		typ:    unix.RTM_NEWLINK,
		flags:  create,
		body:   []nl.NetlinkRequestData{upInfo(0), attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)), kind},
		ignore: unix.EEXIST,
	}
}

// addVeth makes a veth pair with the peer in another namespace from the start:
// moving it there later would cost twenty times as much. Both ends are down.
func addVeth(name string, mac net.HardwareAddr, peer string, peerMAC net.HardwareAddr, peerNS int, mtu uint32) request {
	kind := attr(unix.IFLA_LINKINFO, nil)
	kind.AddRtAttr(unix.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	other := kind.AddRtAttr(unix.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	other.AddChild(nl.NewIfInfomsg(unix.AF_UNSPEC))
	other.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(peer))
	other.AddRtAttr(unix.IFLA_ADDRESS, peerMAC)
	other.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(mtu))
	other.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(peerNS)))
	return request{
		what:  "create link " + name,
		typ:   unix.RTM_NEWLINK,
		flags: create,
		body: []nl.NetlinkRequestData{
			nl.NewIfInfomsg(unix.AF_UNSPEC),
			attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)),
			// Set explicitly, an address is not "random" in udev's eyes, which
			// would otherwise replace it behind our back.
			attr(unix.IFLA_ADDRESS, mac),
			attr(unix.IFLA_MTU, nl.Uint32Attr(mtu)),
			kind,
		},
	}
}

// quietUp brings a link up without an IPv6 link-local address, which nobody needs
// here: no duplicate detection, no router solicitations, no multicast reports
// that would keep a thousand pods' links busy.
func quietUp(name string) request {
	spec := attr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, nl.Uint8Attr(nl.IN6_ADDR_GEN_MODE_NONE))
	return request{
		what: "bring up link " + name,
		typ:  unix.RTM_SETLINK,
		body: []nl.NetlinkRequestData{upInfo(0), attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)), spec},
	}
}

// routeLocalnet lets a link carry packets from and to 127.0.0.0/8, which the
// host needs to send its own loopback traffic to a pod's host port.
func routeLocalnet(index int32) request {
	spec := attr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(unix.IFLA_INET_CONF, nil)
	conf.AddRtAttr(devconfRouteLocalnet, nl.Uint32Attr(1))
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index = index
	return request{what: "set route_localnet", typ: unix.RTM_SETLINK, body: []nl.NetlinkRequestData{info, spec}}
}

// devconfRouteLocalnet is IPV4_DEVCONF_ROUTE_LOCALNET of linux/ip.h.
const devconfRouteLocalnet = 26

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// addAddr gives a link an address without a subnet. IPv6 addresses are usable
// at once: nobody else can have them.
func addAddr(index int32, addr netip.Addr) request {
	msg := nl.NewIfAddrmsg(int(family(addr)))
	msg.Prefixlen, msg.Index = uint8(addr.BitLen()), uint32(index)
	body := []nl.NetlinkRequestData{msg, attr(unix.IFA_LOCAL, addr.AsSlice()), attr(unix.IFA_ADDRESS, addr.AsSlice())}
	if addr.Is6() {
		body = append(body, attr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE)))
	}
	return request{what: "add address " + addr.String(), typ: unix.RTM_NEWADDR, flags: replace, body: body}
}

func delAddr(index int32, addr netip.Addr) request {
	r := addAddr(index, addr)
	r.what, r.typ, r.flags, r.ignore = "delete address "+addr.String(), unix.RTM_DELADDR, 0, unix.EADDRNOTAVAIL
	return r
}

// addNeighbour says for good which hardware address an IP address has, so that
// nobody has to ask on the wire and no table of learned neighbours can overflow.
func addNeighbour(index int32, addr netip.Addr, mac net.HardwareAddr) request {
	msg := &ndmsg{Family: family(addr), Index: uint32(index), State: unix.NUD_PERMANENT}
	return request{
		what:  "add neighbour " + addr.String(),
		typ:   unix.RTM_NEWNEIGH,
		flags: replace,
		body:  []nl.NetlinkRequestData{msg, attr(unix.NDA_DST, addr.AsSlice()), attr(unix.NDA_LLADDR, mac)},
	}
}

type ndmsg struct {
	Family uint8
	Index  uint32
	State  uint16
}

func (m *ndmsg) Len() int { return unix.SizeofNdMsg }

func (m *ndmsg) Serialize() []byte {
	b := make([]byte, unix.SizeofNdMsg)
	b[0] = m.Family
	binary.NativeEndian.PutUint32(b[4:], m.Index)
	binary.NativeEndian.PutUint16(b[8:], m.State)
	return b
}

// routeProtocol marks the host's routes as ours, as RTPROT_BIRD and its like do.
const routeProtocol = 0x53

// route is a route of the main table.
type route struct {
	dst         netip.Prefix
	link        int32      // 0: none
	gateway     netip.Addr // reached through link although it is in no subnet of it
	source      netip.Addr // preferred by the host's own packets
	unreachable bool
}

func (r route) request(what string, typ, flags uint16) request {
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{
		Family:   family(r.dst.Addr()),
		Dst_len:  uint8(r.dst.Bits()),
		Table:    unix.RT_TABLE_MAIN,
		Protocol: routeProtocol,
		Scope:    unix.RT_SCOPE_LINK,
		Type:     unix.RTN_UNICAST,
	}}
	body := []nl.NetlinkRequestData{msg, attr(unix.RTA_DST, r.dst.Addr().AsSlice())}
	if r.unreachable {
		msg.Type, msg.Scope = unix.RTN_UNREACHABLE, unix.RT_SCOPE_UNIVERSE
		// Behind any other route for the same subnet.
		body = append(body, attr(unix.RTA_PRIORITY, nl.Uint32Attr(4096)))
	}
	if r.link != 0 {
		body = append(body, attr(unix.RTA_OIF, nl.Uint32Attr(uint32(r.link))))
	}
	if r.gateway.IsValid() {
		msg.Scope = unix.RT_SCOPE_UNIVERSE
		msg.Flags |= unix.RTNH_F_ONLINK
		body = append(body, attr(unix.RTA_GATEWAY, r.gateway.AsSlice()))
	}
	if r.source.IsValid() {
		body = append(body, attr(unix.RTA_PREFSRC, r.source.AsSlice()))
	}
	return request{what: what + " route " + r.dst.String(), typ: typ, flags: flags, body: body}
}

func addRoute(r route) request { return r.request("add", unix.RTM_NEWROUTE, replace) }

func delRoute(r route) request {
	req := r.request("delete", unix.RTM_DELROUTE, 0)
	req.ignore = unix.ESRCH
	return req
}

// single is the prefix that holds only addr.
func single(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }

// defaultRoute is the destination of the default route of an IP version.
func defaultRoute(like netip.Addr) netip.Prefix {
	if like.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}
