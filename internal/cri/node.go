package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version tells who answers; no field may be empty.
func (s *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           "0.1.0", // of the kubelet's runtime API, unchanged since its beginning
		RuntimeName:       "sampan",
		RuntimeVersion:    s.cfg.Version,
		RuntimeApiVersion: "v1",
	}, nil
}

// Status tells whether pods can be run, what the handlers can do and, if verbose,
// how the daemon is set up.
func (s *runtimeService) Status(_ context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.cfg.Network.Ready(); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true}, network,
		}},
		RuntimeHandlers: s.handlers(),
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	if r.GetVerbose() {
		info, err := s.info()
		if err != nil {
			return nil, err
		}
		resp.Info = info
	}
	return resp, nil
}

// handlers lists the handlers by name, "" being the default one.
func (s *runtimeService) handlers() []*runtimeapi.RuntimeHandler {
	features := func(name string) *runtimeapi.RuntimeHandlerFeatures {
		builtin := name == "builtin"
		return &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: builtin && s.cfg.Facts.RecursiveReadOnly}
	}
	list := []*runtimeapi.RuntimeHandler{{Name: "", Features: features(s.cfg.DefaultHandler)}}
	for _, name := range slices.Sorted(slices.Values(s.cfg.Handlers)) {
		list = append(list, &runtimeapi.RuntimeHandler{Name: name, Features: features(name)})
	}
	return list
}

func (s *runtimeService) info() (map[string]string, error) {
	config, err := json.Marshal(map[string]any{
		"rootDir": s.cfg.Root, "stateDir": s.cfg.State, "defaultHandler": s.cfg.DefaultHandler,
		"handlers": s.cfg.Handlers, "cgroupDriver": s.driver().String(), "cgroups": s.cfg.Facts.Cgroup.String(),
	})
	if err != nil {
		return nil, err
	}
	facts, err := json.Marshal(s.cfg.Facts)
	if err != nil {
		return nil, err
	}
	return map[string]string{"config": string(config), "facts": string(facts), "golang": fmt.Sprintf("%q", runtime.Version())}, nil
}

// RuntimeConfig tells the kubelet which cgroup driver to use.
func (s *runtimeService) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: s.driver()}}, nil
}

func (s *runtimeService) driver() runtimeapi.CgroupDriver {
	if s.cfg.SystemdCgroup {
		return runtimeapi.CgroupDriver_SYSTEMD
	}
	return runtimeapi.CgroupDriver_CGROUPFS
}

// UpdateRuntimeConfig takes the node's pod CIDR, which may be one of each IP
// version, separated by a comma.
func (s *runtimeService) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	const field = "runtime_config.network_config.pod_cidr"
	text := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if text == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	var cidrs []netip.Prefix
	for part := range strings.SplitSeq(text, ",") {
		cidr, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("%s: %q is no CIDR such as 10.88.0.0/16: %w", field, part, errdefs.ErrInvalidArgument)
		}
		cidrs = append(cidrs, cidr)
	}
	if err := s.cfg.Network.SetPodCIDR(cidrs); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
