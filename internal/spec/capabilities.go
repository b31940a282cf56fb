package spec

import (
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// allCapabilities stands for every capability in lists of the CRI.
const allCapabilities = "ALL"

// defaultCapabilities are those of a container that asks for nothing: what
// Docker's, containerd's and CRI-O's containers have had for years.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD",
	"CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP",
	"CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// capabilities works out the capability sets of a container.
//
// What is added goes to the bounding, permitted and effective sets; what is
// added as ambient also to the inheritable and ambient sets. Contrary to the
// CRI's comment, a plain addition is not inheritable: files could then give it
// to any user in the container (CVE-2022-24769), and no runtime of today does it.
//
// A capability that the host's processes do not have is left out: the
// container could not get it, and runtimes refuse to try.
func capabilities(in Input) (*specs.LinuxCapabilities, error) {
	sc := in.Container.GetLinux().GetSecurityContext()
	caps, ambient := in.Host.Capabilities, []string(nil)
	if !sc.GetPrivileged() {
		var err error
		if caps, ambient, err = askedCapabilities(sc.GetCapabilities(), in.Host.Capabilities); err != nil {
			return nil, err
		}
	}
	return &specs.LinuxCapabilities{
		Bounding:    onHost(caps, in.Host.Capabilities),
		Permitted:   onHost(caps, in.Host.Capabilities),
		Effective:   onHost(caps, in.Host.Capabilities),
		Inheritable: onHost(ambient, in.Host.Capabilities),
		Ambient:     onHost(ambient, in.Host.Capabilities),
	}, nil
}

// askedCapabilities applies the lists of the CRI to the defaults. Dropping ALL
// leaves what is added by name; otherwise what is dropped is not there, added
// or not.
func askedCapabilities(c *runtimeapi.Capability, all []string) (caps, ambient []string, err error) {
	add, err := capabilityNames("add_capabilities", c.GetAddCapabilities())
	if err != nil {
		return nil, nil, err
	}
	drop, err := capabilityNames("drop_capabilities", c.GetDropCapabilities())
	if err != nil {
		return nil, nil, err
	}
	if ambient, err = capabilityNames("add_ambient_capabilities", c.GetAddAmbientCapabilities()); err != nil {
		return nil, nil, err
	}
	if slices.Contains(ambient, allCapabilities) {
		ambient = slices.Clone(all)
	}
	base := defaultCapabilities
	if slices.Contains(add, allCapabilities) {
		base = all
	}
	if slices.Contains(drop, allCapabilities) {
		base = nil
	}
	dropped := func(name string) bool { return slices.Contains(drop, name) }
	caps = slices.DeleteFunc(slices.Concat(base, add, ambient), dropped)
	return caps, slices.DeleteFunc(ambient, dropped), nil
}

// onHost returns those of host, in host's order, that are in caps.
func onHost(caps, host []string) []string {
	var out []string
	for _, c := range host {
		if slices.Contains(caps, c) {
			out = append(out, c)
		}
	}
	return out
}

// capabilityNames brings a list of the CRI ("net_admin", "CAP_CHOWN", "ALL") to
// the kernel's names.
func capabilityNames(field string, list []string) ([]string, error) {
	out := make([]string, 0, len(list))
	for _, s := range list {
		name := strings.TrimPrefix(strings.ToUpper(s), "CAP_")
		if name == allCapabilities {
			out = append(out, allCapabilities)
			continue
		}
		if !isCapability(name) {
			return nil, invalid("linux.security_context.capabilities."+field, s, "there is no such capability", "use a name as in capabilities(7), e.g. NET_ADMIN, or ALL")
		}
		out = append(out, "CAP_"+name)
	}
	return out, nil
}

func isCapability(name string) bool {
	return slices.ContainsFunc(capability.ListKnown(), func(c capability.Cap) bool {
		return strings.EqualFold(c.String(), name)
	})
}

func validateCapabilities(c *runtimeapi.Capability) error {
	for _, l := range []struct {
		field string
		names []string
	}{
		{"add_capabilities", c.GetAddCapabilities()},
		{"drop_capabilities", c.GetDropCapabilities()},
		{"add_ambient_capabilities", c.GetAddAmbientCapabilities()},
	} {
		if _, err := capabilityNames(l.field, l.names); err != nil {
			return err
		}
	}
	return nil
}
