package lifecycle

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/host"
)

// confined refuses restored processes that are less confined than the spec says.
// A checkpoint tells CRIU everything about a process, its capabilities and
// namespaces too, and CRIU believes it. The processes have not run yet.
func confined(cgroup host.Cgroup, spec *specs.Spec) error {
	pids, err := cgroup.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := confinedProcess(pid, spec); err != nil {
			return fmt.Errorf("the checkpoint does not fit the container: process %d: %w: %w", pid, err, errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

func confinedProcess(pid int, spec *specs.Spec) error {
	status, err := readStatus(pid)
	if err != nil {
		return err
	}
	allowed := allowedCapabilities(spec.Process.Capabilities)
	for _, set := range []string{"CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"} {
		has, err := strconv.ParseUint(status[set], 16, 64)
		if err != nil {
			return fmt.Errorf("%s is %q", set, status[set])
		}
		if extra := has &^ allowed; extra != 0 {
			return fmt.Errorf("%s has %#x beyond what the container may have", set, extra)
		}
	}
	if spec.Process.NoNewPrivileges && status["NoNewPrivs"] != "1" {
		return fmt.Errorf("it could gain privileges")
	}
	if spec.Linux.Seccomp != nil && status["Seccomp"] != "2" {
		return fmt.Errorf("it has no seccomp filter")
	}
	return ownNamespaces(pid, spec.Linux.Namespaces)
}

// readStatus returns /proc/PID/status by key.
func readStatus(pid int) (map[string]string, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return nil, err
	}
	status := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status, nil
}

// allowedCapabilities is the bounding set as a mask.
func allowedCapabilities(caps *specs.LinuxCapabilities) uint64 {
	if caps == nil {
		return 0
	}
	names := make(map[string]bool, len(caps.Bounding))
	for _, name := range caps.Bounding {
		names[name] = true
	}
	var mask uint64
	for _, c := range capability.ListKnown() {
		if names["CAP_"+strings.ToUpper(c.String())] {
			mask |= 1 << uint(c)
		}
	}
	return mask
}

// namespaceFiles are the names of namespaces below /proc/PID/ns.
var namespaceFiles = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.MountNamespace: "mnt", specs.IPCNamespace: "ipc",
	specs.UTSNamespace: "uts", specs.UserNamespace: "user", specs.CgroupNamespace: "cgroup",
}

// ownNamespaces makes sure that a process is in the namespaces that the spec
// names, and not in this process' where the container has one of its own.
func ownNamespaces(pid int, namespaces []specs.LinuxNamespace) error {
	for _, ns := range namespaces {
		file, ok := namespaceFiles[ns.Type]
		if !ok {
			continue
		}
		has, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, file))
		if err != nil {
			return err
		}
		other, same := "/proc/self/ns/"+file, false
		if ns.Path != "" {
			other, same = ns.Path, true
		}
		want, err := os.Stat(other)
		if err != nil {
			return err
		}
		if os.SameFile(has, want) != same {
			return fmt.Errorf("its %s namespace is not the container's", ns.Type)
		}
	}
	return nil
}
