package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/spec"
)

// A pod with a user namespace has it pinned beside its other namespaces, which it owns. Its
// containers see all files with the ids of the namespace, and on no disk is anybody's
// file given to somebody else: layers and volumes are mounted with mapped ids. What
// Sampan itself makes for the pod belongs to the pod's root.

// HostUserNamespaces is nil, or why no pod can have a user namespace on this host,
// whatever its handler. The first call tries it out, which takes some milliseconds.
func (s *Pods) HostUserNamespaces() error { return s.hostUserNamespaces() }

// admitUserNamespace is nil if a pod of this runtime can have a user namespace.
func (s *Pods) admitUserNamespace(ctx context.Context, runtime string) error {
	const field = "linux.security_context.namespace_options.userns_options"
	can, err := s.cfg.Features(ctx, runtime)
	if err != nil {
		return err
	}
	if !can.UserNamespacedPods() {
		return fmt.Errorf("%s: handler %q: its OCI runtime does not say that it can have user namespaces and mount volumes with their ids; use another handler, or the node's user namespace: %w", field, runtime, errdefs.ErrFailedPrecondition)
	}
	if err := s.HostUserNamespaces(); err != nil {
		return fmt.Errorf("%s: this host has none to give: %w; use the node's user namespace: %w", field, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// checkMappable tries what the OCI runtime is going to do with volumes, and could not say
// as well what is wrong with one. There is no other way to give a volume to a user
// namespace: whose its files are is not ours to change.
func (s *Pods) checkMappable(ctx context.Context, p *Pod, mounts []*runtimeapi.Mount, sources []spec.Source) error {
	var paths, fields []string
	for i, m := range mounts {
		if m.GetImage().GetImage() == "" && len(m.GetUidMappings()) > 0 {
			paths, fields = append(paths, sources[i].Path), append(fields, fmt.Sprintf("mounts[%d].host_path", i))
		}
	}
	err := s.cfg.VolumePaths.MapIDs(ctx, s.namespaces(p).User, paths...)
	var at *os.PathError
	if !errors.As(err, &at) {
		return err
	}
	field := fields[max(0, slices.Index(paths, at.Path))]
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%s: %w: its file system cannot be mounted with the ids of a user namespace; use a volume on another one, or the node's user namespace: %w", field, err, errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: it is mounted with other ids already; use another volume, or the node's user namespace: %w", field, err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s: %w", field, err)
}

// giveToRoot gives a file of ours to the root of the pod's containers.
func (p *Pod) giveToRoot(path string) error {
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).User {
		return nil
	}
	uid, gid := spec.RootOf(p.Config.PodSandboxConfig)
	return os.Lchown(path, int(uid), int(gid))
}
