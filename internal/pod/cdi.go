package pod

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// injectDevices adds to a container what CDI (the Container Device Interface) says
// that its devices need: nodes, mounts, variables, hooks. The files in dirs are
// read each time: few containers have such devices, and what a driver has just
// written counts.
func injectDevices(oci *specs.Spec, dirs []string, config *runtimeapi.ContainerConfig) error {
	names, err := cdiDevices(config)
	if err != nil || len(names) == 0 {
		return err
	}
	return injectNamed(oci, dirs, names)
}

// injectNamed adds the devices with these names.
func injectNamed(oci *specs.Spec, dirs, names []string) error {
	files, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(dirs...))
	if err != nil {
		return err
	}
	unresolved, err := files.InjectDevices(oci, names...)
	if len(unresolved) > 0 {
		return fmt.Errorf("CDI_devices: %s: no file in %s defines it%s: %w", strings.Join(unresolved, ", "), strings.Join(dirs, " or "), unreadable(files), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("CDI_devices: %s: %w: %w", strings.Join(names, ", "), err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// cdiDevices lists the devices that a container asks for, each once: by the
// field, and as kubelets did before it, by annotations.
func cdiDevices(config *runtimeapi.ContainerConfig) ([]string, error) {
	var names []string
	for _, d := range config.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	_, annotated, err := cdi.ParseAnnotations(config.GetAnnotations())
	if err != nil {
		return nil, fmt.Errorf("annotations: %s*: %w: write it like vendor.com/class=name: %w", cdi.AnnotationPrefix, err, errdefs.ErrInvalidArgument)
	}
	slices.Sort(annotated) // they came out of a map
	var once []string
	for _, name := range append(names, annotated...) {
		if !slices.Contains(once, name) {
			once = append(once, name)
		}
	}
	return once, nil
}

// unreadable tells of files that may be why a device is not found.
func unreadable(files *cdi.Cache) string {
	var b strings.Builder
	all := files.GetErrors()
	for _, path := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, "; %s: %v", path, errors.Join(all[path]...))
	}
	return b.String()
}
