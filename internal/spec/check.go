package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/host"
)

// Check tells what is wrong with a spec of Build that others have edited since:
// CDI files and plugins can ask for what no runtime can do, and runtimes tell late
// and in few words. The fields of its errors are the spec's.
func Check(s *specs.Spec, facts host.Facts) error {
	return checkAll(
		checkProcess(s.Process, facts), checkSpecMounts(s.Mounts), checkLinux(s.Linux), checkHooks(s.Hooks))
}

func checkProcess(p *specs.Process, facts host.Facts) error {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return invalid("process.args", nil, "there is no program to run", "")
	}
	for i, e := range p.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.ContainsRune(e, 0) {
			return invalid(fmt.Sprintf("process.env[%d]", i), e, "it is not NAME=VALUE", "")
		}
	}
	seen := map[string]bool{}
	for i, l := range p.Rlimits {
		field := fmt.Sprintf("process.rlimits[%d]", i)
		switch {
		case !strings.HasPrefix(l.Type, "RLIMIT_"):
			return invalid(field, l.Type, "there is no such limit", `names begin with "RLIMIT_"`)
		case seen[l.Type]:
			return invalid(field, l.Type, "it is set twice", "")
		case l.Soft > l.Hard:
			return invalid(field, l.Type, fmt.Sprintf("the soft limit %d is above the hard limit %d", l.Soft, l.Hard), "")
		}
		seen[l.Type] = true
	}
	if s := p.OOMScoreAdj; s != nil && (*s > 1000 || *s < facts.MinOOMScoreAdj) {
		return impossible("process.oomScoreAdj", *s, fmt.Sprintf("this host allows %d to 1000", facts.MinOOMScoreAdj), "")
	}
	return nil
}

func checkSpecMounts(mounts []specs.Mount) error {
	for i, m := range mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
		switch {
		case !path.IsAbs(m.Destination):
			return invalid(field+".destination", m.Destination, "it is not an absolute path", "")
		case bind && !path.IsAbs(m.Source):
			return invalid(field+".source", m.Source, "it is not an absolute path", "")
		}
	}
	return nil
}

func checkLinux(l *specs.Linux) error {
	if l.CgroupsPath == "" {
		return invalid("linux.cgroupsPath", nil, "it is empty", "")
	}
	seen := map[specs.LinuxNamespaceType]bool{}
	for i, n := range l.Namespaces {
		field := fmt.Sprintf("linux.namespaces[%d]", i)
		switch {
		case seen[n.Type]:
			return invalid(field+".type", string(n.Type), "it is there twice", "")
		case n.Path != "" && !path.IsAbs(n.Path):
			return invalid(field+".path", n.Path, "it is not an absolute path", "")
		}
		seen[n.Type] = true
	}
	for i, d := range l.Devices {
		field := fmt.Sprintf("linux.devices[%d]", i)
		switch {
		case !path.IsAbs(d.Path):
			return invalid(field+".path", d.Path, "it is not an absolute path", "")
		case !slices.Contains([]string{"c", "b", "u", "p"}, d.Type):
			return invalid(field+".type", d.Type, "there is no such type", "use c, b, u or p")
		}
	}
	return checkCPU(l.Resources)
}

func checkCPU(r *specs.LinuxResources) error {
	if r == nil || r.CPU == nil {
		return nil
	}
	if p := r.CPU.Period; p != nil && *p != 0 && (*p < minPeriod || *p > maxPeriod) {
		return invalid("linux.resources.cpu.period", *p, "the kernel takes 1000 to 1000000 µs", "")
	}
	if q := r.CPU.Quota; q != nil && *q > 0 && *q < minQuota {
		return invalid("linux.resources.cpu.quota", *q, "the kernel takes no less than 1000 µs", "")
	}
	return nil
}

func checkHooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	//lint:ignore SA1019 whoever may edit a spec may still use it
	for _, list := range [][]specs.Hook{h.Prestart, h.CreateRuntime, h.CreateContainer, h.StartContainer, h.Poststart, h.Poststop} {
		for _, hook := range list {
			if !path.IsAbs(hook.Path) {
				return invalid("hooks.path", hook.Path, "it is not an absolute path", "")
			}
		}
	}
	return nil
}
