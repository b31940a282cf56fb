// Package cni is the pod network made by CNI plugins, through libcni.
//
// The package owns its records and libcni's cache below its directory; what a
// plugin sets up belongs to the plugin. It sets up nothing itself but the
// loopback device of pods.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/state"
)

// Config says where configurations, plugins and records are.
type Config struct {
	Dir     string   // where the records of pods are kept; created if absent
	ConfDir string   // network configurations; need not exist yet
	BinDirs []string // searched in order for plugins
	NetNS   string   // the namespace plugins run in; the process's own if empty
	Logger  *slog.Logger
}

// Network attaches pods by CNI plugins.
//
// A pod is detached with the configuration it was attached with, whatever is in
// the configuration directory by then.
type Network struct {
	log     *slog.Logger
	conf    confDir
	plugins *plugins
	libcni  *libcni.CNIConfig
	shelf   shelf
	locks   network.Locks
	status  status

	// adding is held for reading while a plugin adds, and for writing while one
	// collects garbage: what is just being added would be garbage to it.
	adding sync.RWMutex

	ctx    context.Context // of the background work
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex // guards what follows
	pods     map[string]*record
	retrying map[string]bool
	cidrs    []netip.Prefix
}

var _ network.Network = (*Network)(nil)

// How long plugins may take. The kubelet waits four minutes for a pod.
const (
	addTimeout = 2 * time.Minute
	delTimeout = 1 * time.Minute
	gcTimeout  = 10 * time.Second
)

// podLink is the name of a pod's interface.
const podLink = "eth0"

// Open reads the records and goes on detaching what an earlier process could
// not.
func Open(cfg Config) (*Network, error) {
	shelf, err := openShelf(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("open cni records: %w", err)
	}
	cidrs, err := shelf.cidrs()
	if errors.Is(err, state.ErrDamaged) {
		cfg.Logger.Warn("the kubelet's pod subnets are lost until it tells them again", "err", err)
	} else if err != nil {
		return nil, err
	}
	pods, damaged, err := shelf.load()
	if err != nil {
		return nil, fmt.Errorf("open cni records: %w", err)
	}
	plugins := &plugins{netns: cfg.NetNS, dirs: cfg.BinDirs}
	n := &Network{
		log:      cfg.Logger,
		conf:     confDir{cfg.ConfDir},
		plugins:  plugins,
		libcni:   libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, filepath.Join(cfg.Dir, "cache"), plugins),
		shelf:    shelf,
		pods:     pods,
		retrying: make(map[string]bool),
		cidrs:    cidrs,
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	for _, id := range damaged {
		n.salvage(id)
	}
	for _, r := range pods {
		if r.Leaving {
			n.retry(r.Pod)
		}
	}
	return n, nil
}

// salvage makes a damaged record again from what libcni remembers of a finished
// ADD. Of an unfinished one nothing is known but the pod's ID; the plugins'
// garbage collection is left to find it.
func (n *Network) salvage(podID string) {
	attachments, err := n.libcni.GetCachedAttachments(podID)
	if err != nil || len(attachments) == 0 {
		n.log.Warn("cni record is damaged and libcni knows nothing of the pod", "pod", podID, "err", err)
		return
	}
	r, err := fromAttachment(attachments[0])
	if err == nil {
		err = n.shelf.store(r)
	}
	if err != nil {
		n.log.Warn("cni record is damaged and cannot be made again", "pod", podID, "err", err)
		return
	}
	n.log.Warn("cni record was damaged, made again from libcni's cache", "pod", podID)
	n.pods[podID] = r
}

// Close implements network.Network.
func (n *Network) Close() error {
	n.cancel()
	n.work.Wait()
	return nil
}

// Configured reports whether there is a configuration, good or bad.
func (n *Network) Configured() bool {
	files, err := n.conf.files()
	return err == nil && len(files) > 0
}

// Ready implements network.Network. Plugins that know the STATUS verb are asked
// in the background; Ready has their last answer.
func (n *Network) Ready() error {
	list, err := n.conf.load()
	if err != nil {
		return err
	}
	for _, p := range list.Plugins {
		if _, err := n.plugins.FindInPath(p.Network.Type, n.plugins.dirs); err != nil {
			return fmt.Errorf("cni network %s: %w: %w", list.Name, errdefs.ErrUnavailable, err)
		}
	}
	return n.status.last(n, list)
}

// Holds implements network.Network.
func (n *Network) Holds(podID string) bool { return n.get(podID) != nil }

func (n *Network) get(podID string) *record {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[podID]
}

// SetPodCIDR implements network.Network: plugins with the ipRanges capability
// get the subnets. They are remembered, as the kubelet does not repeat itself
// when only this process restarts.
func (n *Network) SetPodCIDR(cidrs []netip.Prefix) error {
	if len(cidrs) == 0 {
		return nil
	}
	if err := network.ValidateCIDRs(cidrs); err != nil {
		return err
	}
	if err := n.shelf.storeCIDRs(cidrs); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cidrs = cidrs
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
	r := n.get(pod.ID)
	switch {
	case r == nil:
	case r.Leaving:
		return network.Result{}, fmt.Errorf("attach pod %s: %w: the pod is leaving the network", pod.ID, errdefs.ErrFailedPrecondition)
	case r.attachedTo(pod.NetNS):
		return r.result()
	default:
		// An ADD that did not finish, or that was for another namespace.
		if err := n.leave(ctx, r); err != nil {
			return network.Result{}, fmt.Errorf("attach pod %s: detach it first: %w", pod.ID, err)
		}
	}
	if r, err = n.attach(ctx, pod); err != nil {
		return network.Result{}, fmt.Errorf("attach pod %s: %w", pod.ID, err)
	}
	return r.result()
}

func (n *Network) attach(ctx context.Context, pod network.Pod) (*record, error) {
	list, err := n.conf.load()
	if err != nil {
		return nil, err
	}
	r, err := n.claim(pod, list)
	if err != nil {
		return nil, err
	}
	if err := n.shelf.store(r); err != nil {
		return nil, errors.Join(err, n.forget(r.Pod))
	}
	added, err := n.add(ctx, r)
	if err != nil {
		if undoErr := n.leave(context.WithoutCancel(ctx), r); undoErr != nil {
			err = fmt.Errorf("%w (and undo: %w)", err, undoErr)
		}
		return nil, err
	}
	return added, nil
}

// claim takes the pod's place and host ports in memory.
func (n *Network) claim(pod network.Pod, list *libcni.NetworkConfigList) (*record, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := newRecord(pod, list, n.cidrs)
	if err != nil {
		return nil, err
	}
	for _, other := range n.pods {
		if port, taken := network.FirstConflict(r.Ports, other.Ports); taken {
			return nil, fmt.Errorf("host port %s: %w: pod %s (%s) holds it", port, errdefs.ErrAlreadyExists, other.Name, other.Pod)
		}
	}
	n.pods[r.Pod] = r
	return r, nil
}

// add runs the plugins and returns the record with their result.
func (n *Network) add(ctx context.Context, r *record) (*record, error) {
	if err := host.InNetNS(r.NetNS, loopbackUp); err != nil {
		return nil, err
	}
	list, err := r.list()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	n.adding.RLock()
	result, err := n.libcni.AddNetworkList(ctx, list, r.runtime())
	n.adding.RUnlock()
	if err != nil {
		return nil, err
	}
	fault.Point("cni.added")
	added := *r
	if added.Result, err = json.Marshal(result); err != nil {
		return nil, fmt.Errorf("encode result: %w", err)
	}
	if _, err := added.result(); err != nil {
		return nil, err
	}
	if err := n.shelf.store(&added); err != nil {
		return nil, err
	}
	n.set(&added)
	return &added, nil
}

func (n *Network) set(r *record) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[r.Pod] = r
}

func (n *Network) forget(podID string) error {
	if err := n.shelf.forget(podID); err != nil {
		return fmt.Errorf("forget pod %s: %w", podID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pods, podID)
	return nil
}

// Detach implements network.Network.
func (n *Network) Detach(ctx context.Context, podID string) error {
	unlock, err := n.locks.Lock(ctx, podID)
	if err != nil {
		return err
	}
	defer unlock()
	r := n.get(podID)
	if r == nil {
		return nil
	}
	if err := n.leave(ctx, r); err != nil {
		return fmt.Errorf("detach pod %s: %w", podID, err)
	}
	return nil
}

// leave runs the plugins' DEL and forgets the pod. When a plugin fails, the
// record says that the pod is leaving, and DEL is tried again in the
// background. The caller holds the pod's lock.
func (n *Network) leave(ctx context.Context, r *record) error {
	if !r.Leaving {
		left := *r
		left.Leaving = true
		if err := n.shelf.store(&left); err != nil {
			// The disk is full, say. The next process finds the pod attached,
			// and its Detach or Sweep comes here again.
			n.log.Warn("cni record not written", "pod", r.Pod, "err", err)
		}
		n.set(&left)
		r = &left
	}
	err := n.del(ctx, r)
	fault.Point("cni.deleted")
	if err == nil {
		err = n.forget(r.Pod)
	}
	if err != nil {
		n.retry(r.Pod)
	}
	return err
}

func (n *Network) del(ctx context.Context, r *record) error {
	list, err := r.list()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, delTimeout)
	defer cancel()
	rt := r.runtime()
	if !host.Pinned(rt.NetNS) {
		rt.NetNS = "" // so a plugin knows that what was in there is gone
	}
	return n.libcni.DelNetworkList(ctx, list, rt)
}

// retry detaches a leaving pod in the background, once and again until it
// works or the network is closed.
func (n *Network) retry(podID string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.retrying[podID] || n.ctx.Err() != nil {
		return
	}
	n.retrying[podID] = true
	n.work.Go(func() {
		n.retryUntilGone(podID)
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.retrying, podID)
	})
}

const (
	firstRetry = 1 * time.Second
	lastRetry  = 1 * time.Minute
)

func (n *Network) retryUntilGone(podID string) {
	for pause := firstRetry; ; pause = min(2*pause, lastRetry) {
		select {
		case <-n.ctx.Done():
			return
		case <-time.After(pause):
		}
		err := n.Detach(n.ctx, podID)
		if err == nil {
			return
		}
		n.log.Warn("pod cannot leave the network yet", "pod", podID, "err", err)
	}
}

// Sweep implements network.Network. Afterwards plugins that know the GC verb are
// told which pods are left.
func (n *Network) Sweep(ctx context.Context, live func(podID string) bool) error {
	n.mu.Lock()
	ids := slices.Collect(maps.Keys(n.pods))
	n.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if !live(id) {
			errs = append(errs, n.Detach(ctx, id))
		}
	}
	return errors.Join(append(errs, n.collectGarbage(ctx))...)
}

func (n *Network) collectGarbage(ctx context.Context) error {
	list, err := n.conf.load()
	if err != nil {
		return nil // there is nobody to ask
	}
	ctx, cancel := context.WithTimeout(ctx, gcTimeout)
	defer cancel()
	n.adding.Lock()
	defer n.adding.Unlock()
	// An empty list, not null, when there are none.
	valid := []types.GCAttachment{}
	n.mu.Lock()
	for _, r := range n.pods {
		valid = append(valid, types.GCAttachment{ContainerID: r.Pod, IfName: podLink})
	}
	n.mu.Unlock()
	if err := n.libcni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		return fmt.Errorf("collect garbage of cni network %s: %w", list.Name, err)
	}
	return nil
}

// status is the plugins' last answer to the STATUS verb.
type status struct {
	mu      sync.Mutex
	asking  bool
	network string // the configuration that was asked for
	asked   time.Time
	err     error
}

const statusAge = 5 * time.Second

// last returns the last answer for the configuration, nil before there is one,
// and asks again if it is old.
func (s *status) last(n *Network, list *libcni.NetworkConfigList) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.network != string(list.Bytes) {
		s.network, s.err, s.asked = string(list.Bytes), nil, time.Time{}
	}
	if !s.asking && time.Since(s.asked) > statusAge && n.ctx.Err() == nil {
		s.asking = true
		n.work.Go(func() { s.ask(n, list) })
	}
	return s.err
}

func (s *status) ask(n *Network, list *libcni.NetworkConfigList) {
	ctx, cancel := context.WithTimeout(n.ctx, gcTimeout)
	defer cancel()
	err := n.libcni.GetStatusNetworkList(ctx, list)
	if err != nil {
		err = fmt.Errorf("cni network %s: %w: %w", list.Name, errdefs.ErrUnavailable, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asking = false
	if s.network == string(list.Bytes) {
		s.err, s.asked = err, time.Now()
	}
}

// confDir is the directory of network configurations. It is read whenever a
// configuration is needed: that costs nothing beside running a plugin, and no
// change can be missed, not even of a directory that appears later.
type confDir struct{ path string }

// files lists the configurations in the order of their names.
func (d confDir) files() ([]string, error) {
	files, err := libcni.ConfFiles(d.path, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("read cni configurations: %w", err)
	}
	slices.Sort(files)
	return files, nil
}

// load reads the first configuration, the one to use. Errors wrap
// ErrUnavailable. A bad first configuration is an error: to fall back to the
// next would put pods on another network unasked.
func (d confDir) load() (*libcni.NetworkConfigList, error) {
	files, err := d.files()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%w: no cni configuration in %s yet", errdefs.ErrUnavailable, d.path)
	}
	list, err := readConf(files[0])
	if err != nil {
		return nil, fmt.Errorf("%w: cni configuration %s: %w", errdefs.ErrUnavailable, files[0], err)
	}
	return list, nil
}

func readConf(file string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(file) == ".conflist" {
		list, err := libcni.NetworkConfFromFile(file)
		if err != nil {
			return nil, err
		}
		return inline(list)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	plugin, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	return inline(&libcni.NetworkConfigList{
		Name:       plugin.Network.Name,
		CNIVersion: plugin.Network.CNIVersion,
		Plugins:    []*libcni.PluginConfig{plugin},
	})
}

// inline turns a configuration, parts of which may be in files of their own,
// into one that stands in one record.
func inline(list *libcni.NetworkConfigList) (*libcni.NetworkConfigList, error) {
	plugins := make([]json.RawMessage, 0, len(list.Plugins))
	for _, p := range list.Plugins {
		plugins = append(plugins, p.Bytes)
	}
	data, err := json.Marshal(map[string]any{
		"name":                   list.Name,
		"cniVersion":             list.CNIVersion,
		"disableCheck":           list.DisableCheck,
		"disableGC":              list.DisableGC,
		"loadOnlyInlinedPlugins": true,
		"plugins":                plugins,
	})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(data)
}
