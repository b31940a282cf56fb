package builtin

import (
	"net/netip"
)

// pool hands out the addresses of one subnet, in turn, so that an address that
// was given back rests as long as possible. The first address is the gateway.
// It is not safe for concurrent use.
type pool struct {
	subnet  netip.Prefix
	gateway netip.Addr
	last    netip.Addr // the address handed out most recently
}

func newPool(subnet netip.Prefix) *pool {
	gateway := subnet.Addr().Next()
	return &pool{subnet: subnet, gateway: gateway, last: gateway}
}

// take returns the next address that is not in use, or false when there is none.
// Among used+1 candidates one is free, so the search is short.
func (p *pool) take(used map[netip.Addr]string) (netip.Addr, bool) {
	addr := p.last
	for range len(used) + 1 {
		if addr = addr.Next(); !p.usable(addr) {
			addr = p.gateway.Next()
		}
		if _, taken := used[addr]; !taken {
			p.last = addr
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// usable reports whether the address is in the subnet and, for IPv4, not the
// broadcast address.
func (p *pool) usable(addr netip.Addr) bool {
	return p.subnet.Contains(addr) && (addr.Is6() || p.subnet.Contains(addr.Next()))
}
