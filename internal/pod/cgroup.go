package pod

import (
	"context"
	"errors"
	"path"
	"path/filepath"
	"strings"

	"sampan.dev/sampan/internal/host"
)

// Units are the units of systemd, as far as pods need them.
type Units interface {
	// Delegate makes a unit in a slice, whose cgroup is then for the caller to work
	// in. It may have a process. It stays until it is stopped, or its slice is. One of that name
	// that is there is the answer.
	Delegate(ctx context.Context, unit, slice, description string) error
	// Stop ends a unit, with all processes it has. One that is not there is no
	// error.
	Stop(ctx context.Context, unit string) error
}

// ownSlice is the slice of the pods whose client names none.
const ownSlice = "sampan.slice"

// ownCgroup is the parent of the containers' cgroups in a pod whose client names
// none. It is at the top, so that no two pods share a directory that one of them
// would have to remove under the other.
func ownCgroup(podID string) string { return "/sampan-" + podID[:min(16, len(podID))] }

// UnitPattern matches the names of pods' units.
const UnitPattern = "sampan-pod-*.service"

// podUnit is the name of a pod's unit.
func podUnit(podID string) string { return "sampan-pod-" + podID[:min(16, len(podID))] + ".service" }

// placeCgroup decides where the containers of a new pod have their cgroups. With
// systemd that is below a delegated unit of the pod's own in the client's slice,
// so that systemd is asked once for a pod, and never for a container.
func (s *Pods) placeCgroup(id, parent string) (cgroup, unit string) {
	switch {
	case s.cfg.Units != nil && strings.HasSuffix(parent, ".slice"):
		return path.Join(slicePath(path.Base(parent)), podUnit(id)), podUnit(id)
	case s.cfg.Units != nil && parent == "":
		return path.Join(slicePath(ownSlice), podUnit(id)), podUnit(id)
	case parent == "":
		return ownCgroup(id), ""
	}
	return path.Join("/", parent), ""
}

// makeUnit makes the pod's unit, if it has one.
func (s *Pods) makeUnit(ctx context.Context, p *Pod) error {
	if p.Unit == "" {
		return nil
	}
	m := p.Config.GetMetadata()
	slice := path.Base(path.Dir(p.Cgroup))
	if err := s.cfg.Units.Delegate(ctx, p.Unit, slice, "Containers of pod "+m.GetNamespace()+"/"+m.GetName()); err != nil {
		return err
	}
	if host.CgroupMode() != host.CgroupV2 {
		return nil
	}
	return host.Vacate("/sys/fs/cgroup"+p.Cgroup, "init")
}

// removeCgroup removes the cgroup, or the unit, that was made for a pod. Those of
// its containers are gone with them.
func (s *Pods) removeCgroup(ctx context.Context, p *Pod) error {
	switch {
	case p.Unit != "" && s.cfg.Units != nil:
		// Of a unit that is stopped while its containers are being removed, or
		// that was stopped by another, the directory may be left.
		return errors.Join(s.cfg.Units.Stop(ctx, p.Unit), removeCgroupAt(ctx, p.Cgroup))
	case p.Cgroup == ownCgroup(p.ID):
		return removeCgroupAt(ctx, p.Cgroup)
	}
	return nil
}

// removeCgroupsOf removes whatever a pod of which nothing is known but its id may
// have.
func (s *Pods) removeCgroupsOf(ctx context.Context, id string) error {
	err := removeCgroupAt(ctx, ownCgroup(id))
	if s.cfg.Units != nil {
		err = errors.Join(err, s.cfg.Units.Stop(ctx, podUnit(id)))
	}
	return err
}

func removeCgroupAt(ctx context.Context, cgroup string) error {
	cg, err := cgroupAt(cgroup)
	if err != nil {
		return err
	}
	return cg.Remove(ctx)
}

// killCgroupAt removes a cgroup with the processes that it has.
func killCgroupAt(cgroup string) error {
	ctx, cancel := context.WithTimeout(context.Background(), maxKill)
	defer cancel()
	cg, err := cgroupAt(cgroup)
	if err != nil {
		return err
	}
	return errors.Join(cg.Kill(ctx), cg.Remove(ctx))
}

func cgroupAt(cgroup string) (host.Cgroup, error) {
	roots, err := host.CgroupRoots()
	cg := make(host.Cgroup)
	for controller, root := range roots {
		cg[controller] = filepath.Join(root, cgroup)
	}
	return cg, err
}
