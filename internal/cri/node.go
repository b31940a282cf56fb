package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/handler"
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
func (s *runtimeService) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.cfg.Network.Ready(); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	reports, err := s.reports(ctx)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true}, network,
		}},
		RuntimeHandlers: s.handlers(reports),
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: true},
	}
	if s.cfg.Facts.AppArmor {
		resp.Status.Conditions = append(resp.Status.Conditions, s.apparmor())
	}
	if r.GetVerbose() {
		if resp.Info, err = s.info(ctx, reports); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// apparmor is a condition that only informs: the kubelet does not know it.
func (s *runtimeService) apparmor() *runtimeapi.RuntimeCondition {
	c := &runtimeapi.RuntimeCondition{Type: "AppArmorReady", Status: true}
	if err := s.cfg.AppArmor(); err != nil {
		c.Status, c.Reason, c.Message = false, "DefaultProfileNotLoaded", err.Error()
	}
	return c
}

// reports tells what is known of each handler.
func (s *runtimeService) reports(ctx context.Context) (map[string]handler.Report, error) {
	all := make(map[string]handler.Report)
	for _, name := range s.cfg.Handlers.Names() {
		var err error
		if all[name], err = s.cfg.Handlers.Last(ctx, name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// handlers lists the handlers by name, "" being the default one.
func (s *runtimeService) handlers(reports map[string]handler.Report) []*runtimeapi.RuntimeHandler {
	features := func(name string) *runtimeapi.RuntimeHandlerFeatures {
		can := reports[name].Features
		return &runtimeapi.RuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: can.RecursiveReadOnly && s.cfg.Facts.RecursiveReadOnly,
			UserNamespaces:          can.UserNamespacedPods() && s.cfg.Pods.HostUserNamespaces() == nil,
		}
	}
	list := []*runtimeapi.RuntimeHandler{{Name: "", Features: features(s.cfg.DefaultHandler)}}
	for _, name := range s.cfg.Handlers.Names() {
		list = append(list, &runtimeapi.RuntimeHandler{Name: name, Features: features(name)})
	}
	return list
}

func (s *runtimeService) info(ctx context.Context, reports map[string]handler.Report) (map[string]string, error) {
	userNamespaces := "yes"
	if err := s.cfg.Pods.HostUserNamespaces(); err != nil {
		userNamespaces = "no: " + err.Error()
	}
	checkpoints := "no: "
	if criu, err := s.cfg.Pods.Checkpoints(ctx); err != nil {
		checkpoints += err.Error()
	} else {
		checkpoints = fmt.Sprintf("yes, with %s %s", criu.Path, criu.Version)
	}
	config, err := json.Marshal(map[string]any{
		"rootDir": s.cfg.Root, "stateDir": s.cfg.State, "defaultHandler": s.cfg.DefaultHandler,
		"handlers": s.cfg.Handlers.Names(), "cgroupDriver": s.driver().String(), "cgroups": s.cfg.Facts.Cgroup.String(),
		"userNamespaces": userNamespaces, "checkpoints": checkpoints,
	})
	if err != nil {
		return nil, err
	}
	facts, err := json.Marshal(s.cfg.Facts)
	if err != nil {
		return nil, err
	}
	handlers, err := json.Marshal(reports)
	if err != nil {
		return nil, err
	}
	return map[string]string{"config": string(config), "facts": string(facts), "handlers": string(handlers), "golang": fmt.Sprintf("%q", runtime.Version())}, nil
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
