package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/network"
)

// firewall is one nftables table. Its chains are fixed; pods with host ports
// are elements of its maps, so that a pod costs one small batch and the kernel
// one hash lookup for a new connection, however many pods there are. In the
// words of nft, for IPv4 (IPv6 has the same):
//
//	table inet sampan0 {
//	  set subnets4 { ipv4_addr; flags interval }
//	  set hairpin4 { ipv4_addr . ipv4_addr }                                   # pods with host ports: (A, A)
//	  map ports4   { inet_proto . inet_service : ipv4_addr . inet_service }    # on every address
//	  map bound4   { ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//
//	  chain guard {           # what a pod sends comes from the pod's own address, and never goes to 127.0.0.1
//	    type filter hook prerouting priority raw
//	    iifname "sampan0-*" ip daddr 127.0.0.0/8 drop
//	    iifname "sampan0-*" fib saddr . iif oif missing drop
//	  }
//	  chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local jump hostports }
//	  chain output     { type nat hook output priority dstnat; ip6 daddr ::1 accept; fib daddr type local jump hostports }
//	  chain hostports {
//	    dnat ip to ip daddr . meta l4proto . th dport map @bound4
//	    dnat ip to meta l4proto . th dport map @ports4
//	  }
//	  chain postrouting {
//	    type nat hook postrouting priority srcnat
//	    ip saddr . ip daddr @hairpin4 snat ip to GATEWAY                       # a pod that calls itself by its host port
//	    oifname "sampan0-*" ip saddr 127.0.0.0/8 snat ip to GATEWAY            # the host through 127.0.0.1
//	    ip saddr @subnets4 ip daddr != @subnets4 masquerade                    # out of the node
//	  }
//	}
//
// The kernel routes 127.0.0.1 out of the host if told to (route_localnet), but
// has no such thing for ::1: the answer to a translated packet would be dropped.
// Connections to [::1] are therefore left alone and refused, and clients that
// try ::1 first go on to 127.0.0.1.
type firewall struct {
	mu    sync.Mutex // a Conn collects one batch at a time
	conn  *nftables.Conn
	table *nftables.Table
	link  string // host ends of pods are called link-*
}

// openFirewall opens the netlink socket in the namespace of the calling thread.
func openFirewall(link string) (*firewall, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return &firewall{conn: conn, table: &nftables.Table{Name: link, Family: nftables.TableFamilyINet}, link: link}, nil
}

func (f *firewall) Close() error { return f.conn.CloseLasting() }

// present reports whether the table is there; others can flush it away.
func (f *firewall) present() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.conn.ListTableOfFamily(f.table.Name, f.table.Family)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// blockers names chains of others that drop what they do not know of all
// forwarded traffic, as Docker sets up. What one table accepts another can still
// drop; only the operator can say that pods may pass there.
func (f *firewall) blockers() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	chains, err := f.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var names []string
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		switch c.Table.Family {
		case nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
			names = append(names, familyNames[c.Table.Family]+" "+c.Table.Name+" "+c.Name)
		}
	}
	return names, nil
}

var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyINet: "inet",
	nftables.TableFamilyIPv4: "ip",
	nftables.TableFamilyIPv6: "ip6",
}

// remove deletes the table.
func (f *firewall) remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn.AddTable(f.table) // so that there is one to delete
	f.conn.DelTable(f.table)
	return f.flush("delete table")
}

// rebuild replaces the table and everything in it at one instant.
func (f *firewall) rebuild(l layout, pods []*record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn.AddTable(f.table)
	f.conn.DelTable(f.table)
	f.conn.AddTable(f.table)
	var errs []error
	for _, v := range versions {
		errs = append(errs, f.addSets(v, l))
	}
	f.addGuard()
	hostports := f.addHostPorts()
	f.addEntrances(hostports)
	f.addPostrouting(l)
	for _, pod := range pods {
		errs = append(errs, f.elements(pod, f.conn.SetAddElements))
	}
	return errors.Join(append(errs, f.flush("rebuild table"))...)
}

// open lets traffic for the pod's host ports in.
func (f *firewall) open(pod *record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.elements(pod, f.conn.SetAddElements); err != nil {
		return err
	}
	return f.flush("open host ports")
}

// shut undoes open; what is not there is no error.
func (f *firewall) shut(pod *record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	// One batch for all, and if something is missing, one for each.
	if err := f.elements(pod, f.conn.SetDeleteElements); err != nil {
		return err
	}
	err := f.flush("shut host ports")
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	each := func(s *nftables.Set, elements []nftables.SetElement) error {
		for _, e := range elements {
			if err := f.conn.SetDeleteElements(s, []nftables.SetElement{e}); err != nil {
				return err
			}
			if err := f.flush("shut host port"); !errors.Is(err, unix.ENOENT) {
				errs = append(errs, err)
			}
		}
		return nil
	}
	return errors.Join(append(errs, f.elements(pod, each))...)
}

// forward is an element of pods' sets and maps: which, and its key.
type forward struct{ set, key string }

// forwards lists those there are. Without the table there are none.
func (f *firewall) forwards() (map[forward]*nftables.Set, error) {
	all, err := f.listForwards()
	if err == nil {
		return all, nil
	}
	if there, perr := f.present(); perr == nil && !there {
		return nil, nil
	}
	return nil, err
}

func (f *firewall) listForwards() (map[forward]*nftables.Set, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make(map[forward]*nftables.Set)
	for _, v := range versions {
		for _, s := range []*nftables.Set{f.hairpin(v), f.ports(v), f.bound(v)} {
			elements, err := f.conn.GetSetElements(s)
			if err != nil {
				return nil, fmt.Errorf("list elements of %s %s: %w", f.table.Name, s.Name, err)
			}
			for _, e := range elements {
				all[forward{s.Name, string(e.Key)}] = s
			}
		}
	}
	return all, nil
}

// delete removes one element.
func (f *firewall) delete(s *nftables.Set, key []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.conn.SetDeleteElements(s, []nftables.SetElement{{Key: key}}); err != nil {
		return err
	}
	return f.flush("delete element")
}

func (f *firewall) flush(what string) error {
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("%s %s: %w", what, f.table.Name, err)
	}
	return nil
}

// version is what differs between IPv4 and IPv6.
type version struct {
	suffix       string
	proto        byte // nfproto
	addr         nftables.SetDatatype
	saddr, daddr uint32 // offsets in the IP header
	len          uint32 // of an address
}

var versions = []version{
	{"4", unix.NFPROTO_IPV4, nftables.TypeIPAddr, 12, 16, 4},
	{"6", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, 8, 24, 16},
}

func (v version) is4() bool { return v.proto == unix.NFPROTO_IPV4 }

// endpoint is the data of the maps: where a connection goes.
func (v version) endpoint() nftables.SetDatatype {
	return nftables.MustConcatSetType(v.addr, nftables.TypeInetService)
}

func (f *firewall) set(name string, v version, key nftables.SetDatatype) *nftables.Set {
	return &nftables.Set{Table: f.table, Name: name + v.suffix, KeyType: key}
}

func (f *firewall) subnets(v version) *nftables.Set {
	s := f.set("subnets", v, v.addr)
	s.Interval = true
	return s
}

func (f *firewall) hairpin(v version) *nftables.Set {
	s := f.set("hairpin", v, nftables.MustConcatSetType(v.addr, v.addr))
	s.Concatenation = true
	return s
}

// ports maps a port of any of the host's addresses to a pod.
func (f *firewall) ports(v version) *nftables.Set {
	s := f.set("ports", v, nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService))
	s.Concatenation, s.IsMap, s.DataType = true, true, v.endpoint()
	return s
}

// bound maps a port of one of the host's addresses to a pod.
func (f *firewall) bound(v version) *nftables.Set {
	s := f.set("bound", v, nftables.MustConcatSetType(v.addr, nftables.TypeInetProto, nftables.TypeInetService))
	s.Concatenation, s.IsMap, s.DataType = true, true, v.endpoint()
	return s
}

func (f *firewall) addSets(v version, l layout) error {
	var subnets []nftables.SetElement
	for _, s := range l.subnets {
		if s.Addr().Is4() == v.is4() {
			subnets = append(subnets,
				nftables.SetElement{Key: s.Addr().AsSlice()},
				nftables.SetElement{Key: afterLast(s), IntervalEnd: true})
		}
	}
	return errors.Join(
		f.conn.AddSet(f.subnets(v), subnets),
		f.conn.AddSet(f.hairpin(v), nil),
		f.conn.AddSet(f.ports(v), nil),
		f.conn.AddSet(f.bound(v), nil))
}

// afterLast is the first address behind the subnet.
func afterLast(subnet netip.Prefix) []byte {
	b := subnet.Addr().AsSlice()
	for i := len(b) - 1; i >= 0; i-- {
		host := min(8, max(0, len(b)*8-subnet.Bits()-8*(len(b)-1-i)))
		b[i] |= byte(1<<host - 1)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next().AsSlice()
}

// elements applies do to the pod's elements of each set and map.
func (f *firewall) elements(pod *record, do func(*nftables.Set, []nftables.SetElement) error) error {
	for _, v := range versions {
		ip, ok := pod.ip(v.is4())
		if !ok {
			continue
		}
		var ports, bound []nftables.SetElement
		for _, m := range pod.Ports {
			key := concat([]byte{protocolNumbers[m.Protocol]}, bigEndian(m.HostPort))
			to := concat(ip.AsSlice(), bigEndian(m.ContainerPort))
			switch {
			case !m.HostIP.IsValid() || m.HostIP.IsUnspecified() && m.HostIP.Is4() == v.is4():
				ports = append(ports, nftables.SetElement{Key: key, Val: to})
			case m.HostIP.Is4() == v.is4():
				bound = append(bound, nftables.SetElement{Key: concat(m.HostIP.AsSlice(), key), Val: to})
			}
		}
		if len(ports)+len(bound) == 0 {
			continue
		}
		self := []nftables.SetElement{{Key: concat(ip.AsSlice(), ip.AsSlice())}}
		if err := do(f.hairpin(v), self); err != nil {
			return err
		}
		for set, elements := range map[*nftables.Set][]nftables.SetElement{f.ports(v): ports, f.bound(v): bound} {
			if len(elements) == 0 {
				continue
			}
			if err := do(set, elements); err != nil {
				return err
			}
		}
	}
	return nil
}

var protocolNumbers = map[network.Protocol]byte{
	network.TCP:  unix.IPPROTO_TCP,
	network.UDP:  unix.IPPROTO_UDP,
	network.SCTP: unix.IPPROTO_SCTP,
}

func bigEndian(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// concat joins the fields of a concatenated key or value, each of which is
// padded to the size of a register.
func concat(fields ...[]byte) []byte {
	var out []byte
	for _, f := range fields {
		out = append(out, f...)
		out = append(out, make([]byte, -len(f)&3)...)
	}
	return out
}

// The rules. Registers are the 4 byte ones, counted from reg; a concatenation
// lies in successive registers.

const reg = unix.NFT_REG32_00

func (f *firewall) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	return f.conn.AddChain(&nftables.Chain{Name: name, Table: f.table, Type: typ, Hooknum: hook, Priority: priority})
}

func (f *firewall) rule(chain *nftables.Chain, parts ...[]expr.Any) {
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: slices.Concat(parts...)})
}

func (f *firewall) addGuard() {
	guard := f.chain("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	fromPod := f.ifname(expr.MetaKeyIIFNAME)
	f.rule(guard, fromPod, isVersion(versions[0]), loopbackNet(versions[0].daddr), verdict(expr.VerdictDrop, ""))
	f.rule(guard, fromPod, []expr.Any{
		&expr.Fib{Register: reg, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{0}},
	}, verdict(expr.VerdictDrop, ""))
}

func (f *firewall) addHostPorts() *nftables.Chain {
	chain := f.conn.AddChain(&nftables.Chain{Name: "hostports", Table: f.table})
	for _, v := range versions {
		at := uint32(reg) + v.len/4
		f.rule(chain, isVersion(v), loadAddr(v.daddr, v.len, reg), loadPort(at), dnat(v, f.bound(v)))
		f.rule(chain, isVersion(v), loadPort(reg), dnat(v, f.ports(v)))
	}
	return chain
}

func (f *firewall) addEntrances(hostports *nftables.Chain) {
	toHost := []expr.Any{
		&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
	pre := f.chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	f.rule(pre, toHost, verdict(expr.VerdictJump, hostports.Name))

	out := f.chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	v6 := versions[1]
	f.rule(out, isVersion(v6), loadAddr(v6.daddr, v6.len, reg),
		[]expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: netip.IPv6Loopback().AsSlice()}},
		verdict(expr.VerdictAccept, ""))
	f.rule(out, toHost, verdict(expr.VerdictJump, hostports.Name))
}

func (f *firewall) addPostrouting(l layout) {
	chain := f.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	for _, v := range versions {
		gateway := slices.IndexFunc(l.gateways, func(a netip.Addr) bool { return a.Is4() == v.is4() })
		if gateway < 0 {
			continue
		}
		asHost := snat(v, l.gateways[gateway])
		f.rule(chain, isVersion(v), loadAddr(v.saddr, v.len, reg), loadAddr(v.daddr, v.len, reg+v.len/4), lookup(f.hairpin(v), false), asHost)
		if v.is4() {
			f.rule(chain, f.ifname(expr.MetaKeyOIFNAME), isVersion(v), loopbackNet(v.saddr), asHost)
		}
		f.rule(chain, isVersion(v),
			loadAddr(v.saddr, v.len, reg), lookup(f.subnets(v), false),
			loadAddr(v.daddr, v.len, reg), lookup(f.subnets(v), true),
			[]expr.Any{&expr.Masq{}})
	}
}

func isVersion(v version) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{v.proto}},
	}
}

// ifname matches packets from or to pods.
func (f *firewall) ifname(key expr.MetaKey) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: []byte(f.link + "-")},
	}
}

func loadAddr(offset, length, at uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: at, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}}
}

// loadPort loads the transport protocol and the destination port.
func loadPort(at uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: at},
		&expr.Payload{DestRegister: at + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// loopbackNet matches 127.0.0.0/8.
func loopbackNet(offset uint32) []expr.Any {
	return append(loadAddr(offset, 1, reg), &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{127}})
}

func lookup(s *nftables.Set, invert bool) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: s.Name, Invert: invert}}
}

// dnat sends the connection where the map says, if it says so.
func dnat(v version, m *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: m.Name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(v.proto), RegAddrMin: reg, RegProtoMin: reg + v.len/4},
	}
}

func snat(v version, to netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: reg, Data: to.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(v.proto), RegAddrMin: reg},
	}
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}
