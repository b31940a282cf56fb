package spec

import (
	"path"
	"slices"
	"strings"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultMasked and defaultReadonly hide what a container has no business with.
// The kubelet sends the same lists itself.
var (
	defaultMasked = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
		"/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	defaultReadonly = []string{
		"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
	}
)

// confine adds what limits the container's process: capabilities, seccomp,
// AppArmor, SELinux, no_new_privs, masked and read-only paths.
func confine(s *specs.Spec, in Input) error {
	sc := in.Container.GetLinux().GetSecurityContext()
	var err error
	if s.Process.Capabilities, err = capabilities(in); err != nil {
		return err
	}
	if s.Linux.Seccomp, err = seccompFilter(in, s); err != nil {
		return err
	}
	if s.Process.ApparmorProfile, err = apparmor(in); err != nil {
		return err
	}
	if s.Process.SelinuxLabel, s.Linux.MountLabel, err = selinuxLabels(in); err != nil {
		return err
	}
	s.Process.NoNewPrivileges = sc.GetNoNewPrivs()
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = hiddenPaths(in)
	return nil
}

// SELinuxField is the field that asks for a label, for errors.
const SELinuxField = "linux.security_context.selinux_options"

// Unlabelled reports whether SELinux must not confine a container: one that is
// privileged, or one that works in a namespace of the host and does not say what
// label to have there.
func Unlabelled(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) bool {
	sc := c.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() {
		return true
	}
	own := NamespacesOf(pod)
	hosts := !own.Network || !own.IPC || sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_NODE
	return hosts && !AsksForLabel(sc.GetSelinuxOptions())
}

// AsksForLabel reports whether options ask for anything.
func AsksForLabel(o *runtimeapi.SELinuxOption) bool {
	return o.GetUser() != "" || o.GetRole() != "" || o.GetType() != "" || o.GetLevel() != ""
}

// selinuxLabels returns the labels of a spec, none if the handler has no use for
// them.
func selinuxLabels(in Input) (process, mount string, err error) {
	switch {
	case in.Handler.SELinux:
		return in.ProcessLabel, in.MountLabel, nil
	case in.ProcessLabel != "" && AsksForLabel(in.Container.GetLinux().GetSecurityContext().GetSelinuxOptions()):
		return "", "", impossible(SELinuxField, in.ProcessLabel, "the handler's OCI runtime knows no SELinux", "use another handler, or leave the field out")
	}
	return "", "", nil
}

// hiddenPaths returns the lists the container asks for. The wire cannot tell
// an empty list from none: a container that gives neither list gets the
// defaults, unless it is privileged or in a user namespace, where the kubelet
// sends empty lists to say "unmasked".
func hiddenPaths(in Input) (masked, readonly []string) {
	sc := in.Container.GetLinux().GetSecurityContext()
	masked, readonly = sc.GetMaskedPaths(), sc.GetReadonlyPaths()
	switch {
	case sc.GetPrivileged():
		return nil, nil
	case len(masked)+len(readonly) == 0 && !NamespacesOf(in.Pod).User:
		masked, readonly = defaultMasked, defaultReadonly
	}
	// The spec is the caller's to edit.
	return slices.Clone(masked), slices.Clone(readonly)
}

// SeccompFile returns the path of the seccomp profile that a container needs
// as Input.SeccompProfile, or "" if it needs none.
func SeccompFile(c *runtimeapi.ContainerConfig) (string, error) {
	p, err := seccompProfile(c.GetLinux().GetSecurityContext())
	if err != nil || p == nil || p.ProfileType != runtimeapi.SecurityProfile_Localhost {
		return "", err
	}
	return p.LocalhostRef, nil
}

func seccompFilter(in Input, s *specs.Spec) (*specs.LinuxSeccomp, error) {
	const field = "linux.security_context.seccomp"
	p, err := seccompProfile(in.Container.GetLinux().GetSecurityContext())
	if err != nil || p == nil || p.ProfileType == runtimeapi.SecurityProfile_Unconfined {
		return nil, err
	}
	if !in.Host.Seccomp {
		return nil, impossible(field, p.ProfileType, "this kernel has no seccomp filters", "use Unconfined, or a kernel with CONFIG_SECCOMP_FILTER")
	}
	if p.ProfileType == runtimeapi.SecurityProfile_RuntimeDefault {
		filter, err := seccomp.GetDefaultProfile(s)
		if err != nil {
			return nil, impossible(field, p.ProfileType, err.Error(), "")
		}
		return filter, nil
	}
	filter, err := seccomp.LoadProfile(string(in.SeccompProfile), s)
	if err != nil {
		return nil, invalid(field+".localhost_ref", p.LocalhostRef, "the file is no seccomp profile: "+err.Error(), "")
	}
	return filter, nil
}

// seccompProfile returns the profile a container asks for, by the field or by
// the deprecated string, nil for unconfined.
func seccompProfile(sc *runtimeapi.LinuxContainerSecurityContext) (*runtimeapi.SecurityProfile, error) {
	if sc.GetPrivileged() {
		return nil, nil
	}
	const field = "linux.security_context.seccomp"
	p := sc.GetSeccomp()
	if p == nil {
		var err error
		//lint:ignore SA1019 kubelets before 1.19 send nothing else
		p, err = profileOf(field+"_profile_path", sc.GetSeccompProfilePath())
		if err != nil || p == nil {
			return nil, err
		}
	}
	if err := checkProfile(field, p); err != nil {
		return nil, err
	}
	if p.ProfileType == runtimeapi.SecurityProfile_Localhost && !path.IsAbs(p.LocalhostRef) {
		return nil, invalid(field+".localhost_ref", p.LocalhostRef, "the profile's path is not absolute", "give the full path of a file on this node")
	}
	return p, nil
}

// AppArmorRequest is what a container asks of AppArmor.
type AppArmorRequest struct {
	Confined bool
	Profile  string // the name of one that is on the node; empty for the runtime's default
	Asked    bool   // in words, so that to run without it would be wrong
}

// AppArmorOf returns what a container asks of AppArmor. Who calls Build finds the
// profile and gives its name as Input.AppArmorProfile.
func AppArmorOf(c *runtimeapi.ContainerConfig) (AppArmorRequest, error) {
	sc := c.GetLinux().GetSecurityContext()
	p, err := apparmorProfile(sc)
	if err != nil || p == nil || p.ProfileType == runtimeapi.SecurityProfile_Unconfined {
		return AppArmorRequest{}, err
	}
	//lint:ignore SA1019 kubelets before 1.20 send nothing else
	asked := sc.GetApparmor() != nil || sc.GetApparmorProfile() != ""
	return AppArmorRequest{Confined: true, Profile: p.LocalhostRef, Asked: asked}, nil
}

// apparmor returns the profile for a spec.
func apparmor(in Input) (string, error) {
	r, err := AppArmorOf(in.Container)
	switch {
	case err != nil || !r.Confined || in.AppArmorProfile == "":
		return "", err
	case in.Handler.AppArmor:
		return in.AppArmorProfile, nil
	case r.Asked:
		return "", impossible(AppArmorField, in.AppArmorProfile, "the handler's OCI runtime knows no AppArmor", "use another handler, or Unconfined")
	}
	return "", nil
}

// AppArmorField is the field that AppArmorOf reads, for errors.
const AppArmorField = "linux.security_context.apparmor"

// apparmorProfile returns the profile a container asks for, nil if privileged.
// The deprecated string means the default when it is empty.
func apparmorProfile(sc *runtimeapi.LinuxContainerSecurityContext) (*runtimeapi.SecurityProfile, error) {
	if sc.GetPrivileged() {
		return nil, nil
	}
	const field = AppArmorField
	p := sc.GetApparmor()
	if p == nil {
		var err error
		//lint:ignore SA1019 kubelets before 1.20 send nothing else
		if p, err = profileOf(field+"_profile", sc.GetApparmorProfile()); err != nil {
			return nil, err
		}
		if p == nil {
			return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
		}
	}
	// Clients that moved from the string to the field leave the prefix on.
	p = &runtimeapi.SecurityProfile{ProfileType: p.ProfileType, LocalhostRef: strings.TrimPrefix(p.LocalhostRef, localhostPrefix)}
	return p, checkProfile(field, p)
}

const localhostPrefix = "localhost/"

// profileOf reads a profile in the deprecated form of a string, nil if empty.
func profileOf(field, s string) (*runtimeapi.SecurityProfile, error) {
	switch {
	case s == "":
		return nil, nil
	case s == "runtime/default" || s == "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case s == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(s, localhostPrefix):
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(s, localhostPrefix)}, nil
	}
	return nil, invalid(field, s, "there is no such kind of profile", "use runtime/default, unconfined or localhost/PROFILE")
}

func checkProfile(field string, p *runtimeapi.SecurityProfile) error {
	switch p.GetProfileType() {
	case runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined:
		if p.LocalhostRef != "" {
			return invalid(field+".localhost_ref", p.LocalhostRef, "only a profile of type Localhost has one", "set profile_type to Localhost")
		}
		return nil
	case runtimeapi.SecurityProfile_Localhost:
		if p.LocalhostRef == "" {
			return invalid(field+".localhost_ref", "", "a profile of type Localhost needs one", "")
		}
		return nil
	}
	return invalid(field+".profile_type", p.GetProfileType(), "there is no such type", "use RuntimeDefault, Unconfined or Localhost")
}
