// Package builtin is the pod network that needs nothing installed: netlink for
// links, addresses and routes, nftables for host ports and masquerading,
// records on disk for who has what.
//
// A pod's eth0 is one end of a veth pair; the host routes the pod's address to
// the other end. The package owns the links called LINK and LINK-*, the routes
// of its routing protocol number, and the nftables table LINK; it touches no
// others. It runs no programs.
package builtin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/state"
)

// Config says how the network is laid out.
type Config struct {
	Dir     string         // where the kubelet's subnets are kept; created if absent
	State   string         // where the records of pods are kept, which end with the boot; created if absent
	Subnets []netip.Prefix // addresses for pods: one IPv4 or one IPv6 subnet, or one of each
	Link    string         // name of the link that holds the gateway addresses, at most 8 letters; "sampan0" if empty
	NetNS   string         // the namespace that plays the host; the process's own if empty
	Logger  *slog.Logger
}

// Network is the built-in network. The host is left untouched until the first
// pod is attached.
type Network struct {
	log   *slog.Logger
	host  *hostSide
	shelf shelf
	locks network.Locks

	mu    sync.Mutex // guards what follows; not held while the kernel or the disk is asked
	pools []*pool    // of the subnets for new pods
	pods  map[string]*record
	used  map[netip.Addr]string // address to pod ID, also of leaving pods

	setUpMu sync.Mutex // one preparation at a time
	setUp   *setUp     // guarded by mu; nil until the host is prepared
	trouble error      // guarded by mu: why the last preparation failed

	caretaker *caretaker
}

// setUp is what the host was prepared for.
type setUp struct {
	layout layout
	mtu    uint32
}

var _ network.Network = (*Network)(nil)

// Open reads the records and takes up what an earlier process left: pods that
// are attached stay so, pods that were leaving go on leaving.
func Open(cfg Config) (*Network, error) {
	link := cfg.Link
	if link == "" {
		link = defaultLink
	}
	if len(link) > maxLink {
		return nil, fmt.Errorf("network link name %q: %w: longer than %d letters", link, errdefs.ErrInvalidArgument, maxLink)
	}
	shelf, err := openShelf(cfg.Dir, cfg.State)
	if err != nil {
		return nil, fmt.Errorf("open network records: %w", err)
	}
	subnets, err := shelf.subnets()
	if errors.Is(err, state.ErrDamaged) {
		cfg.Logger.Warn("the kubelet's pod subnets are lost until it tells them again", "err", err)
	} else if err != nil {
		return nil, err
	}
	if len(subnets) == 0 {
		subnets = cfg.Subnets
	}
	if err := network.ValidateCIDRs(subnets); err != nil {
		return nil, err
	}
	pods, damaged, err := shelf.load(host.BootID())
	if err != nil {
		return nil, fmt.Errorf("open network records: %w", err)
	}
	h, err := openHostSide(cfg.NetNS, link)
	if err != nil {
		return nil, err
	}
	for _, id := range damaged {
		if err := salvage(h, shelf, id, subnets, pods); err != nil {
			return nil, errors.Join(fmt.Errorf("salvage damaged record of pod %s: %w", id, err), h.Close())
		}
		cfg.Logger.Warn("network record was damaged, made again from what the kernel knows; host ports are lost", "pod", id)
	}
	n := &Network{log: cfg.Logger, host: h, shelf: shelf, pods: pods, used: make(map[netip.Addr]string)}
	for _, r := range pods {
		for _, ip := range r.IPs {
			n.used[ip.Addr] = r.Pod
		}
	}
	n.setPools(subnets)
	if len(pods) > 0 {
		if _, err := n.prepare(); err != nil {
			cfg.Logger.Warn("network set-up is incomplete", "err", err)
		}
	}
	n.caretaker = startCaretaker(n, leaving(pods))
	return n, nil
}

// salvage makes a damaged record again from the kernel: its link bears the name
// the pod gets when no other has it, and has the routes to its addresses. After
// a power loss there is no link, and nothing to keep.
func salvage(h *hostSide, shelf shelf, podID string, subnets []netip.Prefix, pods map[string]*record) error {
	r := &record{Pod: podID, Name: "unknown", Boot: host.BootID(), Link: h.podLink(podID, 0)}
	var err error
	if r.IPs, err = h.routedTo(r.Link, subnets); err != nil {
		return err
	}
	if len(r.IPs) == 0 {
		return shelf.forget(podID)
	}
	pods[podID] = r
	return shelf.store(r)
}

func leaving(pods map[string]*record) []*record {
	var out []*record
	for _, r := range pods {
		if r.Leaving {
			out = append(out, r)
		}
	}
	return out
}

// maxLink leaves room for a pod's part in a link name of 15 letters.
const maxLink = 15 - 1 - linkDigits

const linkDigits = 6

func (n *Network) setPools(subnets []netip.Prefix) {
	n.pools = nil
	for _, s := range subnets {
		n.pools = append(n.pools, newPool(s))
	}
}

// Close implements network.Network. When there are no pods, the host is left as
// it was found.
func (n *Network) Close() error {
	n.caretaker.stop()
	n.mu.Lock()
	idle := n.setUp != nil && len(n.pods) == 0
	n.mu.Unlock()
	if idle {
		return errors.Join(n.host.dismantle(), n.host.Close())
	}
	return n.host.Close()
}

// Remove takes the built-in network off a host, pods' links included. It is for
// uninstalling: nobody may use the network any more. Netns and link are those of
// Config.
func Remove(netns, link string) error {
	if link == "" {
		link = defaultLink
	}
	h, err := openHostSide(netns, link)
	if err != nil {
		return err
	}
	links, err := h.podLinks()
	errs := []error{err}
	for _, name := range links {
		errs = append(errs, h.rt.do(delLink(name)))
	}
	return errors.Join(append(errs, h.dismantle(), h.Close())...)
}

const defaultLink = "sampan0"

// Holds implements network.Network.
func (n *Network) Holds(podID string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[podID] != nil
}

// Ready implements network.Network.
func (n *Network) Ready() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pools) == 0 {
		return fmt.Errorf("built-in network: %w", errNoSubnet)
	}
	if n.trouble != nil {
		return fmt.Errorf("built-in network: %w", n.trouble)
	}
	return nil
}

var errNoSubnet = fmt.Errorf("%w: no subnet for pods: set network.subnet", errdefs.ErrUnavailable)

// SetPodCIDR implements network.Network. The subnets are remembered: the
// kubelet does not repeat itself when only this process restarts.
func (n *Network) SetPodCIDR(cidrs []netip.Prefix) error {
	if len(cidrs) == 0 {
		return nil
	}
	if err := network.ValidateCIDRs(cidrs); err != nil {
		return err
	}
	n.mu.Lock()
	same := slices.EqualFunc(n.pools, cidrs, func(p *pool, c netip.Prefix) bool { return p.subnet == c })
	n.mu.Unlock()
	if same {
		return nil
	}
	if err := n.shelf.storeSubnets(cidrs); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.setPools(cidrs) // the next Attach prepares the host for them
	return nil
}

// Attach implements network.Network.
func (n *Network) Attach(ctx context.Context, pod network.Pod) (network.Result, error) {
	if err := pod.Validate(); err != nil {
		return network.Result{}, err
	}
	unlock, err := n.locks.Lock(ctx, pod.ID)
	if err != nil {
		return network.Result{}, err
	}
	defer unlock()
	r, err := n.attach(ctx, pod)
	if err != nil {
		return network.Result{}, fmt.Errorf("attach pod %s: %w", pod.ID, err)
	}
	return r.result(), nil
}

func (n *Network) attach(ctx context.Context, pod network.Pod) (*record, error) {
	ready, err := n.prepare()
	if err != nil {
		return nil, err
	}
	r, err := n.claim(pod)
	if err != nil {
		return nil, err
	}
	if err := n.shelf.store(r); err != nil {
		n.release(r)
		return nil, err
	}
	if err := n.host.plug(ctx, r, pod.NetNS, ready.mtu); err != nil {
		return nil, errors.Join(err, n.undo(r))
	}
	return r, nil
}

// claim finds the pod's record, or makes one with everything the pod gets. All
// or nothing is taken, in memory.
func (n *Network) claim(pod network.Pod) (*record, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if r := n.pods[pod.ID]; r != nil {
		if r.Leaving {
			return nil, fmt.Errorf("%w: the pod is leaving the network", errdefs.ErrFailedPrecondition)
		}
		return r, nil
	}
	r := &record{Pod: pod.ID, Name: pod.Namespace + "/" + pod.Name, Boot: host.BootID(), Ports: pod.Mapped()}
	if holder, port := n.holder(r.Ports); holder != nil {
		return nil, fmt.Errorf("host port %s: %w: pod %s (%s) holds it", port, errdefs.ErrAlreadyExists, holder.Name, holder.Pod)
	}
	var err error
	if r.Link, err = n.freeLink(pod.ID); err != nil {
		return nil, err
	}
	for _, p := range n.pools {
		addr, ok := p.take(n.used)
		if !ok {
			return nil, fmt.Errorf("%w: no address is free in %s", errdefs.ErrResourceExhausted, p.subnet)
		}
		r.IPs = append(r.IPs, podIP{Addr: addr, Subnet: p.subnet, Gateway: p.gateway})
	}
	for _, ip := range r.IPs {
		n.used[ip.Addr] = r.Pod
	}
	n.pods[r.Pod] = r
	return r, nil
}

// holder returns the pod that has one of the ports. A pod that left has none.
func (n *Network) holder(ports []network.PortMapping) (*record, network.PortMapping) {
	if len(ports) == 0 {
		return nil, network.PortMapping{}
	}
	for _, r := range n.pods {
		if port, taken := network.FirstConflict(ports, r.Ports); taken {
			return r, port
		}
	}
	return nil, network.PortMapping{}
}

// freeLink picks the name of the pod's link on the host: some digits of its ID,
// the first if they are free.
func (n *Network) freeLink(podID string) (string, error) {
	for skip := range len(podID) - linkDigits + 1 {
		if name := n.host.podLink(podID, skip); !n.linkInUse(name) {
			return name, nil
		}
	}
	return "", fmt.Errorf("%w: no free link name", errdefs.ErrResourceExhausted)
}

// release forgets the pod in memory.
func (n *Network) release(r *record) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pods, r.Pod)
	for _, ip := range r.IPs {
		delete(n.used, ip.Addr)
	}
}

// undo takes back a failed Attach at once, or leaves the rest to the caretaker.
func (n *Network) undo(r *record) error {
	err := n.remove(r)
	if err == nil {
		return nil
	}
	return fmt.Errorf("undo: %w", errors.Join(err, n.leave(r)))
}

// remove takes everything of the pod out of the kernel and forgets it.
func (n *Network) remove(r *record) error {
	if err := errors.Join(n.host.cut(r), n.host.unplug(r)); err != nil {
		return err
	}
	fault.Point("network.unplugged")
	if err := n.shelf.forget(r.Pod); err != nil {
		return err
	}
	fault.Point("network.forgotten")
	n.release(r)
	return nil
}

// Detach implements network.Network.
func (n *Network) Detach(ctx context.Context, podID string) error {
	unlock, err := n.locks.Lock(ctx, podID)
	if err != nil {
		return err
	}
	defer unlock()
	n.mu.Lock()
	r := n.pods[podID]
	n.mu.Unlock()
	if r == nil || r.Leaving {
		return nil
	}
	if err := n.leave(r); err != nil {
		return fmt.Errorf("detach pod %s: %w", podID, err)
	}
	return nil
}

// leave cuts the pod off, marks it as leaving and gives it to the caretaker. A
// record that cannot be written (the disk is full) changes nothing: the next
// process finds the pod attached, and its Detach or Sweep comes here again.
func (n *Network) leave(r *record) error {
	left := *r
	left.Leaving = true
	cutErr := n.host.cut(r)
	fault.Point("network.cut")
	if cutErr == nil {
		left.Ports = nil // free for others
	}
	if err := n.shelf.store(&left); err != nil {
		n.log.Warn("network record not written", "pod", r.Pod, "err", err)
	}
	n.mu.Lock()
	n.pods[r.Pod] = &left
	n.mu.Unlock()
	n.caretaker.add(&left)
	return cutErr
}

// Sweep implements network.Network. Links that no record knows are removed too.
func (n *Network) Sweep(ctx context.Context, live func(podID string) bool) error {
	n.mu.Lock()
	records := slices.Collect(maps.Values(n.pods))
	n.mu.Unlock()
	var errs []error
	for _, r := range records {
		if !live(r.Pod) {
			errs = append(errs, n.Detach(ctx, r.Pod))
		}
	}
	links, err := n.host.podLinks()
	errs = append(errs, err)
	for _, name := range links {
		n.mu.Lock()
		inUse := n.linkInUse(name)
		n.mu.Unlock()
		if !inUse {
			errs = append(errs, n.host.rt.do(delLink(name)))
		}
	}
	return errors.Join(errs...)
}

// linkInUse reports whether a pod has the link.
func (n *Network) linkInUse(name string) bool {
	for _, r := range n.pods {
		if r.Link == name {
			return true
		}
	}
	return false
}

// prepare makes the host ready for pods and repairs what others destroyed. When
// it fails the caretaker and every Attach try again.
func (n *Network) prepare() (*setUp, error) {
	n.setUpMu.Lock()
	defer n.setUpMu.Unlock()
	n.mu.Lock()
	ready, l, pods, room := n.setUp, n.layout(), n.attached(), len(n.pools) > 0
	n.mu.Unlock()
	if !room {
		return nil, errNoSubnet
	}
	var err error
	if ready == nil || !ready.layout.equal(l) {
		ready, err = n.prepareHost(l, pods)
	} else {
		err = n.repairFirewall(l, pods)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		n.trouble = fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		return nil, n.trouble
	}
	n.trouble, n.setUp = nil, ready
	return ready, nil
}

func (n *Network) prepareHost(l layout, pods []*record) (*setUp, error) {
	if err := n.host.prepare(l); err != nil {
		return nil, err
	}
	fault.Point("network.host-prepared")
	if err := n.host.firewall.rebuild(l, pods); err != nil {
		return nil, err
	}
	fault.Point("network.firewall-built")
	n.warnOfBlockers()
	return &setUp{layout: l, mtu: n.host.mtu()}, nil
}

// warnOfBlockers tells the operator what to do where the host's own firewall
// stands between pods and the world. Whether it does depends on rules that are
// not ours to understand.
func (n *Network) warnOfBlockers() {
	chains, err := n.host.firewall.blockers()
	if err != nil {
		n.log.Warn("host firewall not examined", "err", err)
	}
	for _, c := range chains {
		n.log.Warn("the host's firewall drops forwarded traffic by default; if pods have no network, let them pass",
			"chain", c,
			"remedy", fmt.Sprintf(`nft insert rule %s iifname "%s-*" accept; nft insert rule %s oifname "%s-*" accept`, c, n.host.link, c, n.host.link))
	}
}

// repairFirewall brings the table back after somebody flushed the whole rule
// set, as the restart of a host's own firewall does.
func (n *Network) repairFirewall(l layout, pods []*record) error {
	present, err := n.host.firewall.present()
	if err != nil || present {
		return err
	}
	n.log.Warn("network firewall table was removed, making it again")
	return n.host.firewall.rebuild(l, pods)
}

// layout covers the subnets for new pods and those that old pods are still in.
func (n *Network) layout() layout {
	var l layout
	for _, p := range n.pools {
		l.add(p.subnet, p.gateway)
	}
	for _, r := range n.pods {
		for _, ip := range r.IPs {
			l.add(ip.Subnet, ip.Gateway)
		}
	}
	return l
}

func (n *Network) attached() []*record {
	var pods []*record
	for _, r := range n.pods {
		if !r.Leaving {
			pods = append(pods, r)
		}
	}
	return pods
}
