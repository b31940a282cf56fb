package spec

import (
	"maps"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ipcSysctls belong to the IPC namespace, written as paths below /proc/sys.
var ipcSysctls = []string{
	"kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/msg_next_id",
	"kernel/sem", "kernel/sem_next_id",
	"kernel/shmall", "kernel/shmmax", "kernel/shmmni", "kernel/shm_next_id", "kernel/shm_rmid_forced",
}

// Sysctls returns the pod's sysctls by their path below /proc/sys
// ("net/ipv4/ip_forward"). They are applied when the pod's namespaces are made:
// those below net to its network namespace, all others to its IPC namespace. A
// sysctl that is not the pod's own to set is an error.
func Sysctls(pod *runtimeapi.PodSandboxConfig) (map[string]string, error) {
	own := NamespacesOf(pod)
	out := make(map[string]string)
	for _, name := range slices.Sorted(maps.Keys(pod.GetLinux().GetSysctls())) {
		value := pod.GetLinux().GetSysctls()[name]
		p, err := sysctlPath(name)
		if err != nil {
			return nil, err
		}
		const field = "linux.sysctls"
		isNet := strings.HasPrefix(p, "net/")
		switch {
		case !isNet && !strings.HasPrefix(p, "fs/mqueue/") && !slices.Contains(ipcSysctls, p):
			return nil, invalid(field, name, "it would change the whole node, not only the pod", "set it on the node")
		case isNet && !own.Network:
			return nil, invalid(field, name, "the pod uses the node's network", "set it on the node, or give the pod a network of its own")
		case !isNet && !own.IPC:
			return nil, invalid(field, name, "the pod uses the node's IPC", "set it on the node, or give the pod an IPC namespace of its own")
		case strings.ContainsAny(value, "\x00\n"):
			return nil, invalid(field+"["+name+"]", value, "a value is one line of text", "")
		}
		if _, dup := out[p]; dup {
			return nil, invalid(field, name, "it is set twice, with dots and with slashes", "")
		}
		out[p] = value
	}
	return out, nil
}

// sysctlPath turns a name into a path below /proc/sys. As in sysctl.d(5), the
// first separator tells which of the two, dot or slash, separates; the other
// one is part of a component, as in net/ipv4/conf/eth0.100/forwarding.
func sysctlPath(name string) (string, error) {
	p := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		p = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == "" || part == "." || part == ".." || strings.ContainsRune(part, 0) {
			return "", invalid("linux.sysctls", name, "it is no name of a sysctl", "write it like net.ipv4.ip_forward")
		}
	}
	return p, nil
}
