package lifecycle

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/ociruntime"
)

// give gives the pipes and FIFOs among a process' stdio to its user, if there is a user
// namespace: in there nobody can, because whose they are now has no id there. Without
// one the runtimes do it themselves.
func give(stdio ociruntime.Stdio, user specs.User, uids, gids []host.IDRange) error {
	if len(uids) == 0 {
		return nil
	}
	uid, ok := host.Outside(uids, user.UID)
	if !ok {
		return fmt.Errorf("process.user.uid: the user namespace has no user %d: %w", user.UID, errdefs.ErrInvalidArgument)
	}
	gid, ok := host.Outside(gids, user.GID)
	if !ok {
		return fmt.Errorf("process.user.gid: the user namespace has no group %d: %w", user.GID, errdefs.ErrInvalidArgument)
	}
	for _, f := range []*os.File{stdio.Stdin, stdio.Stdout, stdio.Stderr} {
		if f == nil {
			continue
		}
		info, err := f.Stat()
		if err != nil {
			return fmt.Errorf("stdio %s: %w", f.Name(), err)
		}
		if info.Mode()&os.ModeNamedPipe == 0 {
			continue
		}
		if err := unix.Fchown(int(f.Fd()), int(uid), int(gid)); err != nil {
			return fmt.Errorf("stdio %s: give it to user %d: %w", f.Name(), uid, err)
		}
	}
	return nil
}

// specIDs returns the ids of the user namespace that a container is going to be in, none
// if it is the caller's.
func specIDs(spec *specs.Spec) (uids, gids []host.IDRange, err error) {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type != specs.UserNamespace {
			continue
		}
		if len(spec.Linux.UIDMappings) == 0 || len(spec.Linux.GIDMappings) == 0 {
			return nil, nil, fmt.Errorf("%w: linux.uidMappings and linux.gidMappings do not tell what ids the user namespace has", errdefs.ErrInvalidArgument)
		}
		return ranges(spec.Linux.UIDMappings), ranges(spec.Linux.GIDMappings), nil
	}
	return nil, nil, nil
}

func ranges(list []specs.LinuxIDMapping) (out []host.IDRange) {
	for _, m := range list {
		out = append(out, host.IDRange{Inside: m.ContainerID, Outside: m.HostID, Size: m.Size})
	}
	return out
}
