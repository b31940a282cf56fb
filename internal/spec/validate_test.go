package spec

//lint:file-ignore SA1019 the deprecated fields are tested as well

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestValidatePod(t *testing.T) {
	type pod = runtimeapi.PodSandboxConfig
	userns := func(p *pod, u *runtimeapi.UserNamespace) {
		p.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u
	}
	mapping := func(container, host, length uint32) *runtimeapi.IDMapping {
		return &runtimeapi.IDMapping{ContainerId: container, HostId: host, Length: length}
	}
	for _, tt := range []struct {
		name string
		edit func(*pod)
		err  string
	}{
		{"as it is", func(p *pod) {}, ""},
		{"no Linux part", func(p *pod) { p.Linux = nil }, ""},
		{"no hostname", func(p *pod) { p.Hostname = "" }, ""},
		{"no name", func(p *pod) { p.Metadata.Name = "" }, "metadata.name: it is required"},
		{"no namespace", func(p *pod) { p.Metadata.Namespace = "" }, "metadata.namespace"},
		{"no metadata", func(p *pod) { p.Metadata = nil }, "metadata.name"},
		{"long hostname", func(p *pod) { p.Hostname = strings.Repeat("h", 65) }, "hostname: "},
		{"hostname of two lines", func(p *pod) { p.Hostname = "a\nb" }, "hostname: "},
		{"relative log directory", func(p *pod) { p.LogDirectory = "logs" }, "log_directory: "},
		{"windows", func(p *pod) { p.Windows = &runtimeapi.WindowsPodSandboxConfig{} }, "windows: "},

		{"DNS", func(p *pod) {
			p.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"ns.svc.cluster.local", "."}, Options: []string{"ndots:5"}}
		}, ""},
		{"DNS that brings a line along", func(p *pod) { p.DnsConfig = &runtimeapi.DNSConfig{Searches: []string{"a\nnameserver 6.6.6.6"}} }, "dns_config.searches"},
		{"empty DNS server", func(p *pod) { p.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{""}} }, "dns_config.servers"},

		{"ports", func(p *pod) {
			p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80}, {ContainerPort: 80}, {ContainerPort: 80, HostPort: 8080}, {ContainerPort: 80, HostPort: 8080, Protocol: runtimeapi.Protocol_UDP}, {ContainerPort: 80, HostPort: 8080, HostIp: "::1"}}
		}, ""},
		{"port 0", func(p *pod) { p.PortMappings = []*runtimeapi.PortMapping{{HostPort: 80}} }, "port_mappings[0].container_port: 0"},
		{"port beyond", func(p *pod) { p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 65536}} }, "port_mappings[0].host_port: 65536"},
		{"protocol", func(p *pod) { p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, Protocol: 9}} }, "port_mappings[0].protocol: 9"},
		{"host IP", func(p *pod) { p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostIp: "localhost"}} }, `port_mappings[0].host_ip: "localhost"`},
		{"port twice", func(p *pod) {
			p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81, HostPort: 8080}}
		}, "port_mappings[1].host_port: 8080: port_mappings[0] takes the same port"},

		{"cgroup parent", func(p *pod) { p.Linux.CgroupParent = "/kubepods/pod..x" }, ""},
		{"systemd slice", func(p *pod) { p.Linux.CgroupParent = "kubepods-podx.slice" }, ""},
		{"cgroup parent elsewhere", func(p *pod) { p.Linux.CgroupParent = "/kubepods/../.." }, "linux.cgroup_parent"},
		{"sysctl", func(p *pod) { p.Linux.Sysctls = map[string]string{"vm.swappiness": "1"} }, "linux.sysctls"},

		{"network CONTAINER", func(p *pod) { p.Linux.SecurityContext.NamespaceOptions.Network = modeContainer }, "namespace_options.network: CONTAINER"},
		{"ipc TARGET", func(p *pod) { p.Linux.SecurityContext.NamespaceOptions.Ipc = modeTarget }, "namespace_options.ipc: TARGET"},
		{"pid TARGET", func(p *pod) { p.Linux.SecurityContext.NamespaceOptions.Pid = modeTarget }, "namespace_options.pid: TARGET"},
		{"pid of no kind", func(p *pod) { p.Linux.SecurityContext.NamespaceOptions.Pid = 9 }, "namespace_options.pid: 9"},

		{"userns", func(p *pod) {
			userns(p, &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{mapping(0, 1000, 100000)}, Gids: []*runtimeapi.IDMapping{mapping(0, 1000, 100000)}})
		}, ""},
		{"userns NODE", func(p *pod) { userns(p, &runtimeapi.UserNamespace{Mode: modeNode}) }, ""},
		{"userns POD without mappings", func(p *pod) { userns(p, &runtimeapi.UserNamespace{}) }, ""},
		{"userns CONTAINER", func(p *pod) { userns(p, &runtimeapi.UserNamespace{Mode: modeContainer}) }, "userns_options.mode: CONTAINER"},
		{"userns TARGET", func(p *pod) { userns(p, &runtimeapi.UserNamespace{Mode: modeTarget}) }, "userns_options.mode: TARGET"},
		{"userns NODE with mapping", func(p *pod) {
			userns(p, &runtimeapi.UserNamespace{Mode: modeNode, Uids: []*runtimeapi.IDMapping{mapping(0, 1, 1)}})
		}, "takes no mappings"},
		{"userns with two mappings", func(p *pod) {
			two := []*runtimeapi.IDMapping{mapping(0, 1000, 1), mapping(1, 2000, 1)}
			userns(p, &runtimeapi.UserNamespace{Uids: two, Gids: two})
		}, "userns_options.uids: there are 2 mappings; give exactly one"},
		{"userns without gids", func(p *pod) {
			userns(p, &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{mapping(0, 1, 1)}})
		}, "userns_options.gids: there are 0 mappings"},
		{"userns without root", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(1, 1000, 10)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
		}, "userns_options.uids[0].container_id: 1: id 0 is not mapped"},
		{"userns without ids", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(0, 1000, 0)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
		}, "the range is empty"},
		{"userns beyond all ids", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(0, 1<<31, 1<<31)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
		}, "ends above the highest id"},

		{"userns with the node's processes", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(0, 65536, 65536)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
			p.Linux.SecurityContext.NamespaceOptions.Pid = modeNode
		}, "namespace_options.pid: NODE: the pod has a user namespace of its own"},
		{"userns with the node's IPC", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(0, 65536, 65536)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
			p.Linux.SecurityContext.NamespaceOptions.Ipc = modeNode
		}, "namespace_options.ipc: NODE: the pod has a user namespace of its own"},
		{"userns with the node's network", func(p *pod) {
			m := []*runtimeapi.IDMapping{mapping(0, 65536, 65536)}
			userns(p, &runtimeapi.UserNamespace{Uids: m, Gids: m})
			p.Linux.SecurityContext.NamespaceOptions.Network = modeNode
		}, ""},

		{"group without user", func(p *pod) { p.Linux.SecurityContext.RunAsGroup = id64(1) }, "run_as_group: 1: a group is set without a user; set run_as_user as well"},
		{"negative user", func(p *pod) { p.Linux.SecurityContext.RunAsUser = id64(-1) }, "run_as_user: -1"},
		{"unknown policy", func(p *pod) { p.Linux.SecurityContext.SupplementalGroupsPolicy = 2 }, "supplemental_groups_policy: 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := proto.Clone(testInput().Pod).(*pod)
			tt.edit(p)
			err := ValidatePod(p)
			if tt.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
		})
	}
	wantError(t, ValidatePod(nil), errdefs.ErrInvalidArgument, "config")
}

func TestValidateContainer(t *testing.T) {
	type container = runtimeapi.ContainerConfig
	type mount = runtimeapi.Mount
	mounting := func(m *mount) func(*Input) {
		return func(in *Input) { in.Container.Mounts = []*mount{{ContainerPath: "/ok", HostPath: "/ok"}, m} }
	}
	own := func(edit func(*container)) func(*Input) { return func(in *Input) { edit(in.Container) } }
	secured := func(edit func(*runtimeapi.LinuxContainerSecurityContext)) func(*Input) {
		return func(in *Input) { edit(in.context()) }
	}
	for _, tt := range []struct {
		name string
		edit func(*Input)
		err  string
	}{
		{"as it is", func(in *Input) {}, ""},
		{"no Linux part", own(func(c *container) { c.Linux = nil }), ""},
		{"no name", own(func(c *container) { c.Metadata = nil }), "metadata.name: it is required"},
		{"no image", own(func(c *container) { c.Image.Image = "" }), "image.image: it is required"},
		{"relative working_dir", own(func(c *container) { c.WorkingDir = "x" }), "working_dir"},
		{"NUL in args", own(func(c *container) { c.Args = []string{"a\x00"} }), "args: "},
		{"variable without name", own(func(c *container) { c.Envs = []*runtimeapi.KeyValue{{}} }), "envs[0].key"},
		{"windows", own(func(c *container) { c.Windows = &runtimeapi.WindowsContainerConfig{} }), "windows"},
		{"stop signal", own(func(c *container) { c.StopSignal = 66 }), "stop_signal: 66"},
		{"quota", own(func(c *container) { c.Linux.Resources.CpuQuota = 1 }), "linux.resources.cpu_quota"},

		{"log path", own(func(c *container) { c.LogPath = "c/0.log" }), ""},
		{"log path with dots", own(func(c *container) { c.LogPath = "c/../d/..0.log" }), ""},
		{"absolute log path", own(func(c *container) { c.LogPath = "/etc/passwd" }), "log_path"},
		{"log path elsewhere", own(func(c *container) { c.LogPath = "c/../../x" }), "log_path"},
		{"log path that is the directory", own(func(c *container) { c.LogPath = "c/.." }), "log_path"},
		{"log path without directory", func(in *Input) { in.Pod.LogDirectory = ""; in.Container.LogPath = "x" }, ""},

		{"mount without path", mounting(&mount{HostPath: "/x"}), `mounts[1].container_path: "": the path is not absolute`},
		{"mount on relative path", mounting(&mount{ContainerPath: "x", HostPath: "/x"}), "mounts[1].container_path"},
		{"mount on the root", mounting(&mount{ContainerPath: "/x/..", HostPath: "/x"}), "mounts[1].container_path"},
		{"mount without source", mounting(&mount{ContainerPath: "/x"}), "mounts[1].host_path: a mount needs a source"},
		{"mount of relative path", mounting(&mount{ContainerPath: "/x", HostPath: "x"}), "mounts[1].host_path"},
		{"mount of path and image", mounting(&mount{ContainerPath: "/x", HostPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}}), "mounts[1].host_path: \"/x\": image is set as well"},
		{"image mount", mounting(&mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}, ImageSubPath: "a/b"}), ""},
		{"image mount without image", mounting(&mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{}}), "mounts[1].image.image"},
		{"sub path without image", mounting(&mount{ContainerPath: "/x", HostPath: "/x", ImageSubPath: "a"}), "mounts[1].image_sub_path"},
		{"sub path outside the image", mounting(&mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}, ImageSubPath: "a/../../b"}), "mounts[1].image_sub_path"},
		{"absolute sub path", mounting(&mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}, ImageSubPath: "/b"}), "mounts[1].image_sub_path"},
		{"rro of writable", mounting(&mount{ContainerPath: "/x", HostPath: "/x", RecursiveReadOnly: true}), "recursive_read_only: true: the mount is not read-only; set readonly as well"},
		{"rro with propagation", mounting(&mount{ContainerPath: "/x", HostPath: "/x", RecursiveReadOnly: true, Readonly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}), "recursive_read_only: true: later mounts would not be read-only"},
		{"propagation of no kind", mounting(&mount{ContainerPath: "/x", HostPath: "/x", Propagation: 3}), "propagation: 3"},
		{"mount option", mounting(&mount{ContainerPath: "/x", HostPath: "/x", MountOptions: []string{"nosuid", "lowerdir=/"}}), `mount_options: "lowerdir=/"`},

		{"device", own(func(c *container) { c.Devices = []*runtimeapi.Device{{HostPath: "dev"}} }), "devices[0].host_path"},
		{"device path", own(func(c *container) { c.Devices = []*runtimeapi.Device{{HostPath: "/dev/x", ContainerPath: "x"}} }), "devices[0].container_path"},
		{"device permissions", own(func(c *container) { c.Devices = []*runtimeapi.Device{{HostPath: "/dev/x", Permissions: "rx"}} }), `devices[0].permissions: "rx"`},
		{"CDI", own(func(c *container) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/gpu=0"}} }), ""},
		{"CDI name", own(func(c *container) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "gpu"}} }), "CDI_devices[0].name"},

		{"NODE network in a pod of its own", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NamespaceOptions.Network = modeNode }), "namespace_options.network: NODE: the containers of a pod share its network, which is POD"},
		{"NODE IPC in a pod of its own", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NamespaceOptions.Ipc = modeNode }), "namespace_options.ipc: NODE"},
		{"nothing said in a pod of the node's network", func(in *Input) { in.podContext().NamespaceOptions.Network = modeNode }, ""},
		{"TARGET", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions.Pid, sc.NamespaceOptions.TargetId = modeTarget, "t"
		}), ""},
		{"TARGET of none", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NamespaceOptions.Pid = modeTarget }), "target_id: a PID namespace of mode TARGET"},
		{"PID of no kind", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NamespaceOptions.Pid = 9 }), "pid: 9"},
		{"userns that is not the pod's", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{Length: 1}}}
		}), "userns_options: the containers of a pod share its user namespace"},

		{"NODE userns in a pod without one", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modeNode}
		}), ""},
		{"NODE userns in a pod with one", func(in *Input) {
			goldens["user-namespace"](in)
			in.context().NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: modeNode}}
		}, "userns_options: the containers of a pod share its user namespace"},
		{"nothing said in a pod with a userns", func(in *Input) {
			goldens["user-namespace"](in)
			in.context().NamespaceOptions = nil
		}, ""},

		{"the node's processes in a pod with a userns", func(in *Input) {
			goldens["user-namespace"](in)
			in.context().NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeNode}
		}, "namespace_options.pid: NODE: the pod has a user namespace of its own"},
		{"mount with the pod's ids", func(in *Input) { goldens["user-namespace"](in) }, ""},
		{"mount without ids in a pod with a userns", func(in *Input) {
			goldens["user-namespace"](in)
			in.Container.Mounts[0].UidMappings, in.Container.Mounts[0].GidMappings = nil, nil
		}, ""},
		{"mount with ids in a pod without a userns", mounting(&mount{ContainerPath: "/x", HostPath: "/x", UidMappings: []*runtimeapi.IDMapping{{Length: 1}}}), "mounts[1].uidMappings: the pod has no user namespace"},
		{"mount with other uids", func(in *Input) {
			goldens["user-namespace"](in)
			in.Container.Mounts[0].UidMappings = []*runtimeapi.IDMapping{{HostId: 0, Length: 65536}}
		}, "mounts[0].uidMappings: they are not those of the pod's user namespace"},
		{"mount for both directions in a pod with a userns", func(in *Input) {
			goldens["user-namespace"](in)
			in.Container.Mounts[0].Propagation = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
		}, "mounts[0].propagation: PROPAGATION_BIDIRECTIONAL: no mount gets out of a user namespace"},
		{"mount without gids", func(in *Input) {
			goldens["user-namespace"](in)
			in.Container.Mounts[0].GidMappings = nil
		}, "mounts[0].gidMappings: they are not those of the pod's user namespace"},

		{"privileged in a pod that is not", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Privileged = true }), "privileged: true: the pod was not made for privileged containers"},
		{"user twice", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser, sc.RunAsUsername = id64(0), "root" }), "run_as_username"},
		{"group without user", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsGroup = id64(1) }), "run_as_group: 1: a group is set without a user"},
		{"group with username", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsGroup, sc.RunAsUsername = id64(1), "web" }), ""},
		{"relative masked path", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.MaskedPaths = []string{"proc"} }), "masked_paths"},
		{"relative read-only path", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ReadonlyPaths = []string{"proc"} }), "readonly_paths"},
		{"capability", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{""}}
		}), "capabilities.add_capabilities"},
		{"AppArmor", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "p" }), "apparmor_profile"},
		{"seccomp", secured(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SeccompProfilePath = "p" }), "seccomp_profile_path"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			tt.edit(&in)
			err := ValidateContainer(in.Pod, in.Container)
			if tt.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
		})
	}
	wantError(t, ValidateContainer(testInput().Pod, nil), errdefs.ErrInvalidArgument, "config")
}
