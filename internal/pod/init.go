package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/spec"
)

// startInit runs PID 1 of a pod whose containers share a PID namespace, and pins
// that namespace. To the keeper it is a container with the pod's id.
func (s *Pods) startInit(ctx context.Context, p *Pod) error {
	bundle := filepath.Join(s.paths.podState(p.ID), "init")
	rootfs := filepath.Join(bundle, "rootfs")
	for _, dir := range []string{"proc", "dev", "sys"} {
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
	if err := writeBundle(bundle, s.initSpec(p, rootfs)); err != nil {
		return err
	}
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
	if err := host.Pin(fmt.Sprintf("/proc/%d/ns/pid", resp.Process.Pid), s.pinned(p.ID, "pid")); err != nil {
		return err
	}
	if _, err := k.Start(ctx, p.ID); err != nil {
		return fmt.Errorf("init of the pod's PID namespace: %w", err)
	}
	return nil
}

// initSpec gives the init nothing but its namespaces: no capability, no device,
// a read-only root with one program.
func (s *Pods) initSpec(p *Pod, rootfs string) *specs.Spec {
	pins := s.namespaces(p)
	namespaces := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}
	for _, ns := range []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: pins.Net}, {Type: specs.IPCNamespace, Path: pins.IPC}, {Type: specs.UTSNamespace, Path: pins.UTS},
	} {
		if ns.Path != "" {
			namespaces = append(namespaces, ns)
		}
	}
	adjust := max(-998, s.cfg.Facts.MinOOMScoreAdj)
	shares := uint64(2)
	return &specs.Spec{
		Version: spec.Version,
		Root:    &specs.Root{Path: rootfs, Readonly: true},
		Process: &specs.Process{
			Args: []string{"/init"}, Cwd: "/", Env: []string{"PATH=/"}, NoNewPrivileges: true,
			User: specs.User{UID: 65535, GID: 65535}, OOMScoreAdj: &adjust,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type": "sandbox",
			"io.kubernetes.cri.sandbox-id":     p.ID,
		},
		Linux: &specs.Linux{
			CgroupsPath: s.cgroupsPath(p, p.ID),
			Namespaces:  namespaces,
			Resources: &specs.LinuxResources{
				CPU:     &specs.LinuxCPU{Shares: &shares},
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
		},
	}
}

// stopInit ends the pod's init and unpins its namespace.
func (s *Pods) stopInit(ctx context.Context, p *Pod) error {
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	if err := k.Signal(ctx, p.ID, unix.SIGKILL, true); err != nil && !isGone(err) {
		return err
	}
	return errors.Join(k.Delete(ctx, p.ID), host.Unpin(s.pinned(p.ID, "pid")))
}
