package stats

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultInterface is what a pod's first interface is called, by the kubelet's
// and CNI's convention.
const defaultInterface = "eth0"

// link is a network interface with its counters.
type link struct {
	name     string
	rx, tx   linkCounters
	loopback bool
}

type linkCounters struct{ bytes, packets, errors, dropped uint64 }

// networkUsage returns nil for a pod on the host's network: what goes through
// there is not the pod's.
func (c *Collector) networkUsage(p Pod) *runtimeapi.NetworkUsage {
	all := c.podLinks(p)
	if all == nil {
		return nil
	}
	usage := &runtimeapi.NetworkUsage{Timestamp: time.Now().UnixNano()}
	for _, l := range all {
		u := &runtimeapi.NetworkInterfaceUsage{
			Name: l.name, RxBytes: number(l.rx.bytes), RxErrors: number(l.rx.errors), TxBytes: number(l.tx.bytes), TxErrors: number(l.tx.errors),
		}
		if l.name == defaultInterface {
			usage.DefaultInterface = u
			continue
		}
		usage.Interfaces = append(usage.Interfaces, u)
	}
	if usage.DefaultInterface == nil && len(usage.Interfaces) > 0 {
		usage.DefaultInterface, usage.Interfaces = usage.Interfaces[0], usage.Interfaces[1:]
	}
	return usage
}

// podLinks returns the interfaces of a pod's own network, without loopback.
func (c *Collector) podLinks(p Pod) []link {
	if p.NetNS == "" {
		return nil
	}
	all, err := c.links.list(p.NetNS)
	if err != nil {
		// Mostly a pod that is being stopped.
		c.log.Debug("read network figures", "pod", p.ID, "err", err)
	}
	return all
}

// links asks for the interfaces of other network namespaces without entering
// them: the kernel knows a namespace by an id that it has in ours. Entering takes
// a thread that cannot be used again. Nothing that it holds keeps a namespace
// alive.
type links struct {
	mu   sync.Mutex
	open bool // socket is; since the first use
	fd   int
	seq  uint32
	buf  []byte
}

func (l *links) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open {
		unix.Close(l.fd)
	}
	l.open = false
}

// linkTimeout bounds the wait for the kernel's answer, which it gives within the
// system call unless others hold its network lock.
const linkTimeout = 5 * time.Second

func (l *links) connect() error {
	if l.open {
		return nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open route netlink socket: %w", err)
	}
	tv := unix.NsecToTimeval(linkTimeout.Nanoseconds())
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
	); err != nil {
		unix.Close(fd)
		return fmt.Errorf("set up route netlink socket: %w", err)
	}
	l.fd, l.open, l.buf = fd, true, make([]byte, 32<<10) // which is what the kernel sends at most
	return nil
}

// list returns the interfaces in the namespace pinned at path, without loopback.
func (l *links) list(path string) ([]link, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.connect(); err != nil {
		return nil, err
	}
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(ns)
	id, err := l.id(ns)
	if err != nil {
		return nil, fmt.Errorf("id of network namespace %s: %w", path, err)
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(id))))
	var all []link
	err = l.ask(req, func(m []byte) {
		if li, ok := parseLink(m); ok && !li.loopback {
			all = append(all, li)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list interfaces of network namespace %s: %w", path, err)
	}
	return all, nil
}

// ask sends a request and calls fn with the body of each message that answers it.
// The answer ends with an acknowledgement, or that of a dump with its end.
func (l *links) ask(req *nl.NetlinkRequest, fn func(m []byte)) error {
	l.seq++
	req.Seq = l.seq
	if req.Flags&unix.NLM_F_DUMP == 0 {
		req.Flags |= unix.NLM_F_ACK
	}
	if err := unix.Sendto(l.fd, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(l.fd, l.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for rest := l.buf[:n]; len(rest) >= unix.NLMSG_HDRLEN; {
			length := binary.NativeEndian.Uint32(rest)
			if length < unix.NLMSG_HDRLEN || int(length) > len(rest) {
				return errors.New("malformed netlink message")
			}
			typ, seq := binary.NativeEndian.Uint16(rest[4:]), binary.NativeEndian.Uint32(rest[8:])
			body := rest[unix.NLMSG_HDRLEN:length]
			rest = rest[min(len(rest), int(length+3)&^3):]
			switch {
			case seq != l.seq: // an answer that somebody gave up
			case typ == unix.NLMSG_DONE || typ == unix.NLMSG_ERROR:
				return answerError(body)
			default:
				fn(body)
			}
		}
	}
}

// answerError turns the end of an answer into an error, or nil.
func answerError(body []byte) error {
	if len(body) < 4 {
		return errors.New("malformed netlink message")
	}
	if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// The attributes of messages about namespace ids.
const (
	netnsaNSID = 1
	netnsaFD   = 3
)

// id returns the id of a namespace, and has it given one if it has none. The id
// goes with the namespace.
func (l *links) id(fd int) (int32, error) {
	for range 2 {
		id := int32(-1)
		get := nl.NewNetlinkRequest(unix.RTM_GETNSID, 0)
		get.AddData(nl.NewRtGenMsg())
		get.AddData(nl.NewRtAttr(netnsaFD, nl.Uint32Attr(uint32(fd))))
		if err := l.ask(get, func(m []byte) { id = parseID(m) }); err != nil {
			return 0, err
		}
		if id >= 0 {
			return id, nil
		}
		add := nl.NewNetlinkRequest(unix.RTM_NEWNSID, 0)
		add.AddData(nl.NewRtGenMsg())
		add.AddData(nl.NewRtAttr(netnsaFD, nl.Uint32Attr(uint32(fd))))
		add.AddData(nl.NewRtAttr(netnsaNSID, nl.Uint32Attr(0xffffffff))) // any
		if err := l.ask(add, func([]byte) {}); err != nil && !errors.Is(err, unix.EEXIST) {
			return 0, err
		}
	}
	return 0, errors.New("it gets none")
}

// parseID returns the namespace's id, or -1.
func parseID(m []byte) int32 {
	const header = unix.NLMSG_ALIGNTO // one byte, padded
	if len(m) < header {
		return -1
	}
	for typ, value := range attributes(m[header:]) {
		if typ == netnsaNSID && len(value) == 4 {
			return int32(binary.NativeEndian.Uint32(value))
		}
	}
	return -1
}

// attributes yields the attributes in a message's body.
func attributes(rest []byte) func(yield func(typ uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(rest) >= unix.SizeofRtAttr {
			length := int(binary.NativeEndian.Uint16(rest))
			if length < unix.SizeofRtAttr || length > len(rest) {
				return
			}
			if !yield(binary.NativeEndian.Uint16(rest[2:]), rest[unix.SizeofRtAttr:length]) {
				return
			}
			rest = rest[min(len(rest), (length+3)&^3):]
		}
	}
}

// parseLink reads one interface. It is not ok if the message is not about the
// namespace that was asked for, as a kernel answers that does not know the
// question.
func parseLink(m []byte) (l link, ok bool) {
	if len(m) < unix.SizeofIfInfomsg {
		return l, false
	}
	l.loopback = binary.NativeEndian.Uint32(m[8:])&unix.IFF_LOOPBACK != 0
	for typ, value := range attributes(m[unix.SizeofIfInfomsg:]) {
		switch typ {
		case unix.IFLA_TARGET_NETNSID:
			ok = true
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(value)
		case unix.IFLA_STATS64:
			if len(value) < 64 {
				return l, false
			}
			counter := func(i int) uint64 { return binary.NativeEndian.Uint64(value[8*i:]) }
			l.rx = linkCounters{packets: counter(0), bytes: counter(2), errors: counter(4), dropped: counter(6)}
			l.tx = linkCounters{packets: counter(1), bytes: counter(3), errors: counter(5), dropped: counter(7)}
		}
	}
	return l, ok && l.name != ""
}
