package cni

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"sampan.dev/sampan/internal/network"
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
type Network struct{}

var _ network.Network = (*Network)(nil)

var errTODO = errors.New("not there yet")

func Open(cfg Config) (*Network, error) { return nil, errTODO }
func (n *Network) Attach(ctx context.Context, pod network.Pod) (network.Result, error) {
	return network.Result{}, errTODO
}
func (n *Network) Detach(ctx context.Context, podID string) error                { return errTODO }
func (n *Network) Sweep(ctx context.Context, live func(podID string) bool) error { return errTODO }
func (n *Network) Holds(podID string) bool                                       { return false }
func (n *Network) Ready() error                                                  { return errTODO }
func (n *Network) Configured() bool                                              { return false }
func (n *Network) SetPodCIDR(cidrs []netip.Prefix) error                         { return errTODO }
func (n *Network) Close() error                                                  { return nil }
