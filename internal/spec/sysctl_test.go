package spec

import (
	"maps"
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func podWithSysctl(name, value string, o *runtimeapi.NamespaceOption) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		Sysctls:         map[string]string{name: value},
		SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: o},
	}}
}

func TestSysctls(t *testing.T) {
	hostNetwork := &runtimeapi.NamespaceOption{Network: modeNode}
	hostIPC := &runtimeapi.NamespaceOption{Ipc: modeNode}
	for _, tt := range []struct {
		name string
		pod  *runtimeapi.NamespaceOption
		want string
		err  string
	}{
		{name: "net.ipv4.ip_forward", want: "net/ipv4/ip_forward"},
		{name: "net/ipv4/ip_forward", want: "net/ipv4/ip_forward"},
		{name: "net/ipv4/conf/eth0.100/forwarding", want: "net/ipv4/conf/eth0.100/forwarding"},
		{name: "net.ipv4.conf.eth0/100.forwarding", want: "net/ipv4/conf/eth0.100/forwarding"},
		{name: "kernel.shm_rmid_forced", want: "kernel/shm_rmid_forced"},
		{name: "kernel.sem", pod: hostNetwork, want: "kernel/sem"},
		{name: "fs.mqueue.msg_max", want: "fs/mqueue/msg_max"},
		{name: "net.core.somaxconn", pod: hostIPC, want: "net/core/somaxconn"},

		{name: "vm.swappiness", err: "it would change the whole node"},
		{name: "kernel.hostname", err: "it would change the whole node"},
		{name: "kernel.shmoo", err: "it would change the whole node"},
		{name: "fs.file-max", err: "it would change the whole node"},
		{name: "network.x", err: "it would change the whole node"},
		{name: "net", err: "it would change the whole node"},
		{name: "net.core.somaxconn", pod: hostNetwork, err: "the pod uses the node's network"},
		{name: "kernel.sem", pod: hostIPC, err: "the pod uses the node's IPC"},
		{name: "fs.mqueue.msg_max", pod: hostIPC, err: "the pod uses the node's IPC"},
		{name: "net/../kernel/core_pattern", err: "no name of a sysctl"},
		{name: "net.//.kernel.core_pattern", err: "no name of a sysctl"},
		{name: "net..x", err: "no name of a sysctl"},
		{name: "/net/x", err: "no name of a sysctl"},
		{name: "", err: "no name of a sysctl"},
	} {
		got, err := Sysctls(podWithSysctl(tt.name, "1", tt.pod))
		if tt.err != "" {
			wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
			continue
		}
		if err != nil || !maps.Equal(got, map[string]string{tt.want: "1"}) {
			t.Errorf("%s: %v, %v, want %s", tt.name, got, err, tt.want)
		}
	}
	_, err := Sysctls(podWithSysctl("net.core.somaxconn", "1\n2", nil))
	wantError(t, err, errdefs.ErrInvalidArgument, "one line")

	pod := podWithSysctl("net.core.somaxconn", "1", nil)
	pod.Linux.Sysctls["net/core/somaxconn"] = "2"
	_, err = Sysctls(pod)
	wantError(t, err, errdefs.ErrInvalidArgument, "set twice")
}

// FuzzSysctls: whatever the name, what comes out is a sysctl of the pod's own.
func FuzzSysctls(f *testing.F) {
	for _, s := range []string{"net.ipv4.ip_forward", "net/../vm/x", "fs.mqueue.msg_max", "kernel.sem", "net.ipv4.conf.eth0/1.x", "./net", "net./.x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		out, err := Sysctls(podWithSysctl(name, "1", nil))
		if err != nil {
			return
		}
		for p := range out {
			if clean := path.Clean("/" + p); clean != "/"+p {
				t.Errorf("%q gives %q, which is %s", name, p, clean)
			}
			if !strings.HasPrefix(p, "net/") && !strings.HasPrefix(p, "fs/mqueue/") && !strings.HasPrefix(p, "kernel/") {
				t.Errorf("%q gives %q", name, p)
			}
		}
	})
}
