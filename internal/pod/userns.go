package pod

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
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

// checkMappable tries what the OCI runtime is going to do with a volume, and could not say
// as well what is wrong with it. There is no other way to give a volume to a user
// namespace: whose its files are is not ours to change.
func checkMappable(path, userns string) error {
	tree, err := host.IDMapped(path, userns, 0)
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: its file system cannot be mounted with the ids of a user namespace; use a volume on another one, or the node's user namespace: %w", err, errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: it is mounted with other ids already; use another volume, or the node's user namespace: %w", err, errdefs.ErrFailedPrecondition)
	case err != nil:
		return err
	}
	return tree.Close()
}

// giveToRoot gives a file of ours to the root of the pod's containers.
func (p *Pod) giveToRoot(path string) error {
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).User {
		return nil
	}
	uid, gid := spec.RootOf(p.Config.PodSandboxConfig)
	return os.Lchown(path, int(uid), int(gid))
}
