package spec

import (
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
)

// devices adds device nodes and the rules of the device cgroup. The nodes every
// container has (null, zero, full, random, urandom, tty, ptmx) and their rules
// are the OCI runtime's own.
func devices(s *specs.Spec, in Input) error {
	if in.Container.GetLinux().GetSecurityContext().GetPrivileged() {
		for _, d := range in.HostDevices {
			s.Linux.Devices = append(s.Linux.Devices, deviceNode(d, d.Path))
		}
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else {
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	}
	for i, d := range in.Container.GetDevices() {
		if err := addDevice(s, in, i, d); err != nil {
			return err
		}
	}
	return nil
}

// addDevice adds the i-th device of the container's configuration, or, if its
// host path is a directory, all devices below.
func addDevice(s *specs.Spec, in Input, i int, d *runtimeapi.Device) error {
	nodes := in.Devices[d.GetHostPath()]
	if len(nodes) == 0 {
		return invalid(fmt.Sprintf("devices[%d].host_path", i), d.GetHostPath(), "no device stands there", "name a device node, or a directory of them")
	}
	destination := d.GetContainerPath()
	if destination == "" {
		destination = d.GetHostPath()
	}
	access := d.GetPermissions()
	if access == "" {
		access = "rwm"
	}
	for _, node := range nodes {
		// Path lies at or below HostPath.
		target := path.Join(destination, strings.TrimPrefix(node.Path, d.GetHostPath()))
		s.Linux.Devices = setDevice(s.Linux.Devices, deviceNode(node, target))
		major, minor := node.Major, node.Minor
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: node.Type, Major: &major, Minor: &minor, Access: access,
		})
	}
	return nil
}

// setDevice appends d, in place of what has its path already.
func setDevice(list []specs.LinuxDevice, d specs.LinuxDevice) []specs.LinuxDevice {
	for i := range list {
		if list[i].Path == d.Path {
			list[i] = d
			return list
		}
	}
	return append(list, d)
}

func deviceNode(d host.Device, target string) specs.LinuxDevice {
	mode := fs.FileMode(d.Mode)
	return specs.LinuxDevice{
		Path: target, Type: d.Type, Major: d.Major, Minor: d.Minor,
		FileMode: &mode, UID: &d.UID, GID: &d.GID,
	}
}

func validateDevices(list []*runtimeapi.Device) error {
	for i, d := range list {
		field := fmt.Sprintf("devices[%d].", i)
		if !path.IsAbs(d.GetHostPath()) {
			return invalid(field+"host_path", d.GetHostPath(), "the path is not absolute", "give the full path of a device on this node")
		}
		if p := d.GetContainerPath(); p != "" && !path.IsAbs(p) {
			return invalid(field+"container_path", p, "the path is not absolute", "let it begin with /, or leave it empty for the host's path")
		}
		if strings.Trim(d.GetPermissions(), "rwm") != "" {
			return invalid(field+"permissions", d.GetPermissions(), "only r, w and m can be permitted", "")
		}
	}
	return nil
}
