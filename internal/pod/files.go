package pod

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/spec"
)

// files are what the pod's containers find in /etc.
func (s *Pods) files(p *Pod) spec.Files {
	dir := s.paths.podState(p.ID)
	return spec.Files{
		ResolvConf: filepath.Join(dir, "resolv.conf"),
		Hostname:   filepath.Join(dir, "hostname"),
		Hosts:      filepath.Join(dir, "hosts"),
		Shm:        s.shm(p),
	}
}

func (s *Pods) writeFiles(p *Pod, ips []string, fromNetwork network.DNS) error {
	f := s.files(p)
	resolv, err := resolvConf(p.Config.GetDnsConfig(), fromNetwork)
	if err != nil {
		return err
	}
	hosts, err := hostsFile(p, ips)
	if err != nil {
		return err
	}
	for path, content := range map[string]string{f.ResolvConf: resolv, f.Hosts: hosts, f.Hostname: hostname(p.Config.PodSandboxConfig) + "\n"} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
		// The umask must not keep a non-root container from resolving names.
		if err := os.Chmod(path, 0o644); err != nil {
			return err
		}
		if err := p.giveToRoot(path); err != nil {
			return err
		}
		if err := s.cfg.SELinux.SetLabel(path, p.Labels.Mount); err != nil {
			return err
		}
	}
	return nil
}

// hostname is what the pod is called in its UTS namespace: what the client says,
// else on the host's network the host's name, else the pod's.
func hostname(config *runtimeapi.PodSandboxConfig) string {
	if !spec.NamespacesOf(config).UTS {
		name, err := os.Hostname()
		if err != nil {
			return "localhost"
		}
		return name
	}
	if config.GetHostname() != "" {
		return config.GetHostname()
	}
	name := config.GetMetadata().GetName()
	return strings.Trim(name[:min(63, len(name))], "-.")
}

// resolvConf renders the client's DNS configuration, else the network's, else
// copies the host's.
func resolvConf(dns *runtimeapi.DNSConfig, fromNetwork network.DNS) (string, error) {
	if dns == nil && len(fromNetwork.Nameservers) > 0 {
		dns = &runtimeapi.DNSConfig{Servers: fromNetwork.Nameservers, Searches: fromNetwork.Search, Options: fromNetwork.Options}
	}
	if dns == nil {
		data, err := os.ReadFile("/etc/resolv.conf")
		return string(data), ignoreAbsent(err)
	}
	var b strings.Builder
	if len(dns.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.Searches, " "))
	}
	for _, server := range dns.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(dns.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.Options, " "))
	}
	return b.String(), nil
}

// hostsFile is for clients that mount none; the kubelet does.
func hostsFile(p *Pod, ips []string) (string, error) {
	if p.NetNS == "" {
		data, err := os.ReadFile("/etc/hosts")
		return string(data), ignoreAbsent(err)
	}
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, ip := range ips {
		fmt.Fprintf(&b, "%s\t%s\n", ip, hostname(p.Config.PodSandboxConfig))
	}
	return b.String(), nil
}

func portMappings(from []*runtimeapi.PortMapping) ([]network.PortMapping, error) {
	var to []network.PortMapping
	for i, m := range from {
		if m.GetHostPort() == 0 {
			continue // a declaration, not a mapping
		}
		mapping := network.PortMapping{
			Protocol:      network.Protocol(strings.ToLower(m.GetProtocol().String())),
			ContainerPort: uint16(m.GetContainerPort()), HostPort: uint16(m.GetHostPort()),
		}
		if m.GetHostIp() != "" {
			ip, err := netip.ParseAddr(m.GetHostIp())
			if err != nil {
				return nil, fmt.Errorf("port_mappings[%d].host_ip: %q is no IP address: %w", i, m.GetHostIp(), errdefs.ErrInvalidArgument)
			}
			mapping.HostIP = ip
		}
		to = append(to, mapping)
	}
	return to, nil
}
