package spec

import (
	"testing"

	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestLibcontainer: the built-in handler's library understands every spec, and
// every mount option that is let through.
func TestLibcontainer(t *testing.T) {
	for name, edit := range goldens {
		t.Run(name, func(t *testing.T) {
			in := testInput()
			edit(&in)
			for _, option := range bindOptions {
				in.Container.Mounts = append(in.Container.Mounts, &runtimeapi.Mount{ContainerPath: "/mnt/" + option, HostPath: "/mnt", MountOptions: []string{option}})
				in.Sources = append(in.Sources, Source{Path: "/mnt"})
			}
			s := mustBuild(t, in)
			// libcontainer would read the mappings of the namespace there.
			for i, ns := range s.Linux.Namespaces {
				if ns.Type == specs.UserNamespace {
					s.Linux.Namespaces[i].Path = ""
				}
			}
			config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: in.ContainerID, Spec: s})
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range config.Mounts {
				// An option that is not known becomes data of the file system,
				// which a bind mount has not.
				if m.Device == "bind" && m.Data != "" {
					t.Errorf("mount on %s: unknown options %q", m.Destination, m.Data)
				}
			}
		})
	}
}
