package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/spec"
)

// startInit runs PID 1 of a pod whose containers share a PID namespace, and pins
// that namespace. To the keeper it is a container with the pod's id.
func (s *Pods) startInit(ctx context.Context, p *Pod) error {
	bundle := filepath.Join(s.paths.podState(p.ID), "init")
	rootfs := filepath.Join(bundle, "rootfs")
	for _, dir := range []string{"proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return err
		}
	}
	program, err := os.ReadFile(s.cfg.Init)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(rootfs, "init"), program, 0o755); err != nil {
		return err
	}
	pins := s.namespaces(p)
	oci, err := spec.BuildInit(spec.Input{
		PodID: p.ID, ContainerID: p.ID, Pod: p.Config.PodSandboxConfig, Rootfs: rootfs,
		Hostname: hostname(p.Config.PodSandboxConfig), CgroupsPath: path.Join(p.Cgroup, p.ID),
		Namespaces: spec.Namespaces{Network: pins.Net, IPC: pins.IPC, UTS: pins.UTS, User: pins.User}, Host: s.cfg.Facts,
	}, "/init")
	if err != nil {
		return err
	}
	if err := writeBundle(bundle, oci); err != nil {
		return err
	}
	fault.Point("pod.init-bundle-written")
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	resp, err := k.Create(ctx, keeper.CreateRequest{
		ID: p.ID, PodID: p.ID, Bundle: bundle, Handler: s.cfg.Handlers[p.Runtime],
		ExitRecord: filepath.Join(s.paths.podState(p.ID), "init-exit"),
	})
	if err != nil {
		return fmt.Errorf("init of the pod's PID namespace: %w", err)
	}
	fault.Point("pod.init-created")
	if err := host.Pin(fmt.Sprintf("/proc/%d/ns/pid", resp.Process.Pid), s.pinned(p.ID, "pid")); err != nil {
		return err
	}
	fault.Point("pod.init-pinned")
	if _, err := k.Start(ctx, p.ID); err != nil {
		return fmt.Errorf("init of the pod's PID namespace: %w", err)
	}
	return nil
}

// stopInit ends the pod's init and unpins its namespace.
func (s *Pods) stopInit(ctx context.Context, p *Pod) error {
	return errors.Join(s.deleteFromKeeper(ctx, p, p.ID), host.Unpin(s.pinned(p.ID, "pid")))
}
