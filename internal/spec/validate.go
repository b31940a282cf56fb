package spec

import (
	"fmt"
	"math"
	"net/netip"
	"path"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxHostname is the longest name sethostname(2) takes.
const maxHostname = 64

// ValidatePod checks all of a pod's configuration that can be checked without
// looking at the host.
func ValidatePod(pod *runtimeapi.PodSandboxConfig) error {
	if pod == nil {
		return invalid("config", nil, "a pod needs a configuration", "")
	}
	if err := checkAll(
		required("metadata.name", pod.GetMetadata().GetName()),
		required("metadata.namespace", pod.GetMetadata().GetNamespace()),
		validateHostname(pod.GetHostname()),
		absoluteOrEmpty("log_directory", pod.GetLogDirectory()),
		validateDNS(pod.GetDnsConfig()),
		validatePorts(pod.GetPortMappings()),
		validateCgroupParent(pod.GetLinux().GetCgroupParent()),
		validatePodNamespaces(podNamespaceOptions(pod)),
		validatePodSecurity(pod.GetLinux().GetSecurityContext()),
	); err != nil {
		return err
	}
	if pod.GetWindows() != nil {
		return invalid("windows", nil, "this is a Linux node", "")
	}
	_, err := Sysctls(pod)
	return err
}

// ValidateContainer checks all of a container's configuration that can be
// checked without looking at the host or the image. The pod has passed
// ValidatePod.
func ValidateContainer(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) error {
	if c == nil {
		return invalid("config", nil, "a container needs a configuration", "")
	}
	if c.GetWindows() != nil {
		return invalid("windows", nil, "this is a Linux node", "")
	}
	for i, kv := range c.GetEnvs() {
		if err := checkVariable(i, kv); err != nil {
			return err
		}
	}
	sc := c.GetLinux().GetSecurityContext()
	return checkAll(
		required("metadata.name", c.GetMetadata().GetName()),
		required("image.image", c.GetImage().GetImage()),
		checkStrings("command", c.GetCommand()),
		checkStrings("args", c.GetArgs()),
		absoluteOrEmpty("working_dir", c.GetWorkingDir()),
		validateLogPath(pod, c),
		validateMounts(c.GetMounts()),
		validateMountsInUserNamespace(pod, c.GetMounts()),
		validateDevices(c.GetDevices()),
		validateCDI(c.GetCDIDevices()),
		validateStopSignal(c.GetStopSignal()),
		validateResources(c.GetLinux().GetResources()),
		validateContainerNamespaces(pod, sc.GetNamespaceOptions()),
		validateContainerSecurity(pod, sc),
	)
}

// checkAll returns the first error.
func checkAll(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func required(field, value string) error {
	if value == "" {
		return invalid(field, nil, "it is required", "")
	}
	return nil
}

func absoluteOrEmpty(field, p string) error {
	if p != "" && !path.IsAbs(p) {
		return invalid(field, p, "the path is not absolute", "let it begin with /")
	}
	return checkStrings(field, []string{p})
}

// validateHostname takes an empty name also where the CRI demands one: the
// runtime has names to choose from.
func validateHostname(name string) error {
	if len(name) > maxHostname {
		return invalid("hostname", name, fmt.Sprintf("it has %d bytes, a host name at most %d", len(name), maxHostname), "shorten it")
	}
	if strings.ContainsAny(name, "\x00\n\r\t /") {
		return invalid("hostname", name, "a host name has no white space and no slash", "")
	}
	return nil
}

// validateDNS keeps out of resolv.conf what would be lines of its own.
func validateDNS(d *runtimeapi.DNSConfig) error {
	for _, l := range []struct {
		field string
		list  []string
	}{
		{"dns_config.servers", d.GetServers()},
		{"dns_config.searches", d.GetSearches()},
		{"dns_config.options", d.GetOptions()},
	} {
		for _, s := range l.list {
			if s == "" || strings.ContainsAny(s, "\x00\n\r\t ") {
				return invalid(l.field, s, "an entry is one word", "")
			}
		}
	}
	return nil
}

func validatePorts(ports []*runtimeapi.PortMapping) error {
	type hostPort struct {
		protocol runtimeapi.Protocol
		ip       netip.Addr
		port     int32
	}
	seen := make(map[hostPort]int)
	for i, p := range ports {
		field := fmt.Sprintf("port_mappings[%d].", i)
		if _, ok := runtimeapi.Protocol_name[int32(p.GetProtocol())]; !ok {
			return invalid(field+"protocol", p.GetProtocol(), "there is no such protocol", "use TCP, UDP or SCTP")
		}
		if port := p.GetContainerPort(); port < 1 || port > math.MaxUint16 {
			return invalid(field+"container_port", port, "a port is between 1 and 65535", "")
		}
		if port := p.GetHostPort(); port < 0 || port > math.MaxUint16 {
			return invalid(field+"host_port", port, "a port is between 1 and 65535", "use 0 for none")
		}
		var ip netip.Addr
		if s := p.GetHostIp(); s != "" {
			var err error
			if ip, err = netip.ParseAddr(s); err != nil {
				return invalid(field+"host_ip", s, "it is no IP address", "leave it empty for all addresses")
			}
		}
		if p.GetHostPort() == 0 {
			continue
		}
		key := hostPort{p.GetProtocol(), ip, p.GetHostPort()}
		if first, dup := seen[key]; dup {
			return invalid(field+"host_port", p.GetHostPort(), fmt.Sprintf("port_mappings[%d] takes the same port", first), "use another one")
		}
		seen[key] = i
	}
	return nil
}

// validateCgroupParent: the parent is a path below the root of the cgroup file
// system, or the name of a systemd slice.
func validateCgroupParent(parent string) error {
	if slices.Contains(strings.Split(parent, "/"), "..") || strings.ContainsRune(parent, 0) {
		return invalid("linux.cgroup_parent", parent, "it leaves the cgroup file system", "")
	}
	return nil
}

func validatePodNamespaces(o *runtimeapi.NamespaceOption) error {
	const in = "linux.security_context.namespace_options."
	if m := o.GetNetwork(); m != runtimeapi.NamespaceMode_POD && m != runtimeapi.NamespaceMode_NODE {
		return invalid(in+"network", m, "a pod's network is its own or the node's", "use POD or NODE")
	}
	if m := o.GetIpc(); m != runtimeapi.NamespaceMode_POD && m != runtimeapi.NamespaceMode_NODE {
		return invalid(in+"ipc", m, "a pod's IPC namespace is its own or the node's", "use POD or NODE")
	}
	if m := o.GetPid(); m != runtimeapi.NamespaceMode_POD && m != runtimeapi.NamespaceMode_CONTAINER && m != runtimeapi.NamespaceMode_NODE {
		return invalid(in+"pid", m, "a pod has no container to target", "use POD, CONTAINER or NODE")
	}
	if usesUserNamespace(o.GetUsernsOptions()) {
		// The kernel gives away neither the host's processes nor its IPC to a user
		// namespace; Kubernetes refuses both.
		if o.GetPid() == runtimeapi.NamespaceMode_NODE {
			return invalid(in+"pid", o.GetPid(), "the pod has a user namespace of its own", "use POD or CONTAINER, or the node's user namespace")
		}
		if o.GetIpc() == runtimeapi.NamespaceMode_NODE {
			return invalid(in+"ipc", o.GetIpc(), "the pod has a user namespace of its own", "use POD, or the node's user namespace")
		}
	}
	return validateUserNamespace(in+"userns_options", o.GetUsernsOptions())
}

// validateUserNamespace asks for one mapping of a range that begins with id 0,
// as Kubernetes gives it.
func validateUserNamespace(field string, u *runtimeapi.UserNamespace) error {
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return invalid(field, nil, "the node's user namespace takes no mappings", "leave them out, or use mode POD")
		}
		return nil
	case runtimeapi.NamespaceMode_POD:
		if !usesUserNamespace(u) {
			return nil
		}
		return checkAll(validateIDMapping(field+".uids", u.GetUids()), validateIDMapping(field+".gids", u.GetGids()))
	}
	return invalid(field+".mode", u.GetMode(), "a user namespace is the pod's or the node's", "use POD or NODE")
}

func validateIDMapping(field string, list []*runtimeapi.IDMapping) error {
	if len(list) != 1 {
		return invalid(field, nil, fmt.Sprintf("there are %d mappings", len(list)), "give exactly one")
	}
	switch m := list[0]; {
	case m.GetContainerId() != 0:
		return invalid(field+"[0].container_id", m.GetContainerId(), "id 0 is not mapped", "let the mapping begin with 0")
	case m.GetLength() == 0:
		return invalid(field+"[0].length", m.GetLength(), "the range is empty", "Kubernetes gives 65536 ids")
	case uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
		return invalid(field+"[0].length", m.GetLength(), "the range ends above the highest id, 4294967294", "")
	}
	return nil
}

func validatePodSecurity(sc *runtimeapi.LinuxSandboxSecurityContext) error {
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return groupWithoutUser(sc.RunAsGroup.Value)
	}
	return validateIDs(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
}

func validateContainerSecurity(pod *runtimeapi.PodSandboxConfig, sc *runtimeapi.LinuxContainerSecurityContext) error {
	const in = "linux.security_context."
	switch {
	case sc.GetPrivileged() && !pod.GetLinux().GetSecurityContext().GetPrivileged():
		return invalid(in+"privileged", true, "the pod was not made for privileged containers", "set privileged in the pod's security context")
	case sc.GetRunAsUser() != nil && sc.GetRunAsUsername() != "":
		return invalid(in+"run_as_username", sc.RunAsUsername, "run_as_user is set as well", "set one of the two")
	case sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && sc.GetRunAsUsername() == "":
		return groupWithoutUser(sc.RunAsGroup.Value)
	}
	if _, err := seccompProfile(sc); err != nil {
		return err
	}
	if _, err := apparmorProfile(sc); err != nil {
		return err
	}
	return checkAll(
		validateIDs(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy()),
		validateCapabilities(sc.GetCapabilities()),
		absolutePaths(in+"masked_paths", sc.GetMaskedPaths()),
		absolutePaths(in+"readonly_paths", sc.GetReadonlyPaths()),
	)
}

func groupWithoutUser(gid int64) error {
	return invalid("linux.security_context.run_as_group", gid, "a group is set without a user", "set run_as_user as well")
}

func validateIDs(user, group *runtimeapi.Int64Value, groups []int64, policy runtimeapi.SupplementalGroupsPolicy) error {
	const in = "linux.security_context."
	if user != nil {
		if _, err := checkID(in+"run_as_user", user.Value); err != nil {
			return err
		}
	}
	if group != nil {
		if _, err := checkID(in+"run_as_group", group.Value); err != nil {
			return err
		}
	}
	for _, g := range groups {
		if _, err := checkID(in+"supplemental_groups", g); err != nil {
			return err
		}
	}
	if _, ok := runtimeapi.SupplementalGroupsPolicy_name[int32(policy)]; !ok {
		return invalid(in+"supplemental_groups_policy", policy, "there is no such policy", "use Merge or Strict")
	}
	return nil
}

func absolutePaths(field string, list []string) error {
	for _, p := range list {
		if !path.IsAbs(p) {
			return invalid(field, p, "the path is not absolute", "let it begin with /")
		}
	}
	return checkStrings(field, list)
}

// validateContainerNamespaces: network, IPC and user namespaces are the pod's.
// A container repeats what the pod says or says nothing, which is POD.
func validateContainerNamespaces(pod *runtimeapi.PodSandboxConfig, o *runtimeapi.NamespaceOption) error {
	const in = "linux.security_context.namespace_options."
	p := podNamespaceOptions(pod)
	if m := o.GetNetwork(); m != runtimeapi.NamespaceMode_POD && m != p.GetNetwork() {
		return invalid(in+"network", m, "the containers of a pod share its network, which is "+p.GetNetwork().String(), "use the pod's mode")
	}
	if m := o.GetIpc(); m != runtimeapi.NamespaceMode_POD && m != p.GetIpc() {
		return invalid(in+"ipc", m, "the containers of a pod share its IPC namespace, which is "+p.GetIpc().String(), "use the pod's mode")
	}
	switch m := o.GetPid(); m {
	case runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_CONTAINER:
	case runtimeapi.NamespaceMode_NODE:
		if NamespacesOf(pod).User {
			return invalid(in+"pid", m, "the pod has a user namespace of its own", "use POD or CONTAINER")
		}
	case runtimeapi.NamespaceMode_TARGET:
		if o.GetTargetId() == "" {
			return invalid(in+"target_id", nil, "a PID namespace of mode TARGET needs a container to target", "")
		}
	default:
		return invalid(in+"pid", m, "there is no such mode", "use POD, CONTAINER, NODE or TARGET")
	}
	if !sameUserNamespace(o.GetUsernsOptions(), p.GetUsernsOptions()) {
		return invalid(in+"userns_options", nil, "the containers of a pod share its user namespace", "repeat the pod's options, or leave them out")
	}
	return nil
}

// sameUserNamespace reports whether a container's options mean the namespace
// the pod has.
func sameUserNamespace(container, pod *runtimeapi.UserNamespace) bool {
	switch {
	case container.GetMode() == runtimeapi.NamespaceMode_POD && !usesUserNamespace(container):
		return true // it says nothing
	case container.GetMode() == runtimeapi.NamespaceMode_NODE && len(container.GetUids())+len(container.GetGids()) == 0:
		return !usesUserNamespace(pod)
	}
	return proto.Equal(container, pod)
}

// validateLogPath keeps the log inside the pod's log directory.
func validateLogPath(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) error {
	p := c.GetLogPath()
	if p == "" || pod.GetLogDirectory() == "" {
		return nil
	}
	clean := path.Clean(p)
	if path.IsAbs(p) || clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return invalid("log_path", p, "it is not inside the pod's log directory", "give a path relative to log_directory")
	}
	return checkStrings("log_path", []string{p})
}

// bindOptions are the mount options that only restrict a bind mount or say how
// it keeps time stamps.
var bindOptions = []string{
	"exec", "noexec", "dev", "nodev", "suid", "nosuid", "symfollow", "nosymfollow",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
}

func validateMounts(list []*runtimeapi.Mount) error {
	for i, m := range list {
		if err := validateMount(mountField(i)+".", m); err != nil {
			return err
		}
	}
	return nil
}

// validateMountsInUserNamespace: the ids of a mount are those of the pod's user namespace,
// or are left as they are, and it does not promise what cannot be.
func validateMountsInUserNamespace(pod *runtimeapi.PodSandboxConfig, list []*runtimeapi.Mount) error {
	own := podNamespaceOptions(pod).GetUsernsOptions()
	for i, m := range list {
		if NamespacesOf(pod).User && m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
			// The kernel makes it HOST_TO_CONTAINER without a word.
			return invalid(mountField(i)+".propagation", m.GetPropagation(), "no mount gets out of a user namespace", "use HOST_TO_CONTAINER, or the node's user namespace")
		}
		if len(m.GetUidMappings())+len(m.GetGidMappings()) == 0 {
			continue
		}
		if !NamespacesOf(pod).User {
			return invalid(mountField(i)+".uidMappings", nil, "the pod has no user namespace", "leave out uidMappings and gidMappings")
		}
		if !sameIDs(m.GetUidMappings(), own.GetUids()) {
			return invalid(mountField(i)+".uidMappings", nil, "they are not those of the pod's user namespace", "repeat the pod's uids, or leave out uidMappings and gidMappings")
		}
		if !sameIDs(m.GetGidMappings(), own.GetGids()) {
			return invalid(mountField(i)+".gidMappings", nil, "they are not those of the pod's user namespace", "repeat the pod's gids, or leave out uidMappings and gidMappings")
		}
	}
	return nil
}

func sameIDs(a, b []*runtimeapi.IDMapping) bool {
	return slices.EqualFunc(a, b, func(a, b *runtimeapi.IDMapping) bool { return proto.Equal(a, b) })
}

func validateMount(field string, m *runtimeapi.Mount) error {
	switch p := m.GetContainerPath(); {
	case !path.IsAbs(p):
		return invalid(field+"container_path", p, "the path is not absolute", "let it begin with /")
	case path.Clean(p) == "/":
		return invalid(field+"container_path", p, "it would hide the container's whole root", "mount below /")
	}
	for _, option := range m.GetMountOptions() {
		if !slices.Contains(bindOptions, option) {
			return invalid(field+"mount_options", option, "it is no option of a bind mount", "use one of "+strings.Join(bindOptions, ", "))
		}
	}
	if _, ok := runtimeapi.MountPropagation_name[int32(m.GetPropagation())]; !ok {
		return invalid(field+"propagation", m.GetPropagation(), "there is no such propagation", "")
	}
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid(field+"recursive_read_only", true, "the mount is not read-only", "set readonly as well")
		}
		if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			return invalid(field+"recursive_read_only", true, "later mounts would not be read-only", "use propagation PRIVATE")
		}
	}
	return checkAll(
		validateMountSource(field, m),
		checkStrings(field+"container_path", []string{m.GetContainerPath()}),
	)
}

// validateMountSource: a mount is of a path on the host or of an image.
func validateMountSource(field string, m *runtimeapi.Mount) error {
	if m.GetImage().GetImage() == "" {
		switch {
		case m.GetImage() != nil:
			return invalid(field+"image.image", nil, "it is required", "")
		case m.GetImageSubPath() != "":
			return invalid(field+"image_sub_path", m.GetImageSubPath(), "the mount is not of an image", "set image")
		case m.GetHostPath() == "":
			return invalid(field+"host_path", nil, "a mount needs a source", "set host_path or image")
		}
		return absoluteOrEmpty(field+"host_path", m.GetHostPath())
	}
	if m.GetHostPath() != "" {
		return invalid(field+"host_path", m.GetHostPath(), "image is set as well", "set one of the two")
	}
	if sub := m.GetImageSubPath(); path.IsAbs(sub) || slices.Contains(strings.Split(sub, "/"), "..") {
		return invalid(field+"image_sub_path", sub, "it is not inside the image", "give a relative path without ..")
	}
	return checkStrings(field+"image_sub_path", []string{m.GetImageSubPath()})
}

func validateCDI(list []*runtimeapi.CDIDevice) error {
	for i, d := range list {
		vendor, rest, ok := strings.Cut(d.GetName(), "/")
		class, name, ok2 := strings.Cut(rest, "=")
		if !ok || !ok2 || vendor == "" || class == "" || name == "" {
			return invalid(fmt.Sprintf("CDI_devices[%d].name", i), d.GetName(), "it is no fully qualified CDI device", "write it like vendor.com/class=name")
		}
	}
	return nil
}

func validateStopSignal(s runtimeapi.Signal) error {
	if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return nil
	}
	if _, ok := signalByCRI(s); !ok {
		return invalid("stop_signal", s, "there is no such signal", "")
	}
	return nil
}
