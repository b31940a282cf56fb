package pod

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cdiFile defines the devices names of vendor.test/null: each sets a variable of
// its name to value, and is /dev/null under its name.
func cdiFile(value string, names ...string) string {
	var b strings.Builder
	b.WriteString("cdiVersion: 0.6.0\nkind: vendor.test/null\ncontainerEdits: {env: [VENDOR=test]}\ndevices:\n")
	for _, n := range names {
		b.WriteString("- name: " + n + "\n  containerEdits:\n    env: [" + n + "=" + value + "]\n    deviceNodes: [{path: /dev/" + n + ", hostPath: /dev/null}]\n")
	}
	return b.String()
}

func TestInjectDevices(t *testing.T) {
	etc, run := t.TempDir(), t.TempDir()
	for path, content := range map[string]string{
		filepath.Join(etc, "vendor.yaml"): cdiFile("etc", "a", "b"),
		filepath.Join(run, "vendor.yaml"): cdiFile("run", "b", "c"),
		filepath.Join(run, "broken.json"): `{"cdiVersion":`,
	} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dirs := []string{etc, run, filepath.Join(run, "absent")}
	devices := func(names ...string) *runtimeapi.ContainerConfig {
		config := new(runtimeapi.ContainerConfig)
		for _, n := range names {
			config.CDIDevices = append(config.CDIDevices, &runtimeapi.CDIDevice{Name: n})
		}
		return config
	}
	annotated := func(config *runtimeapi.ContainerConfig, value string) *runtimeapi.ContainerConfig {
		config.Annotations = map[string]string{"cdi.k8s.io/vendor_x": value, "other": "x"}
		return config
	}
	for _, tt := range []struct {
		name   string
		config *runtimeapi.ContainerConfig
		env    []string
		class  error
		says   []string
	}{
		{name: "none", config: devices()},
		{name: "field", config: devices("vendor.test/null=a"), env: []string{"VENDOR=test", "a=etc"}},
		{name: "the later directory wins", config: devices("vendor.test/null=b"), env: []string{"VENDOR=test", "b=run"}},
		{name: "annotation", config: annotated(devices(), "vendor.test/null=c,vendor.test/null=b"), env: []string{"VENDOR=test", "b=run", "c=run"}},
		{name: "both", config: annotated(devices("vendor.test/null=c"), "vendor.test/null=c"), env: []string{"VENDOR=test", "c=run"}},
		{name: "annotation that is no name", config: annotated(devices(), "c"), class: errdefs.ErrInvalidArgument, says: []string{"annotations: cdi.k8s.io/*", `"c"`, "vendor.com/class=name"}},
		{
			name: "unknown", config: devices("vendor.test/null=a", "vendor.test/null=z"), class: errdefs.ErrFailedPrecondition,
			says: []string{"CDI_devices: vendor.test/null=z: ", etc, run, "broken.json"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			oci := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
			err := injectDevices(oci, dirs, tt.config)
			if tt.class != nil {
				if !errors.Is(err, tt.class) {
					t.Errorf("error %v, want %v", err, tt.class)
				}
				for _, s := range tt.says {
					if err == nil || !strings.Contains(err.Error(), s) {
						t.Errorf("error %v does not say %q", err, s)
					}
				}
				if len(oci.Process.Env) > 0 {
					t.Errorf("in spite of the error: %v", oci.Process.Env)
				}
				return
			}
			if err != nil || !slices.Equal(oci.Process.Env, tt.env) {
				t.Fatalf("env %v, %v, want %v", oci.Process.Env, err, tt.env)
			}
			if got, want := len(oci.Linux.Devices), max(0, len(tt.env)-1); got != want {
				t.Errorf("%d devices, want %d", got, want)
			} else if r := oci.Linux.Resources; want > 0 && (len(r.Devices) != want || !r.Devices[0].Allow || r.Devices[0].Access != "rwm") {
				t.Errorf("the cgroup allows %+v, want %d devices", r.Devices, want)
			}
		})
	}
}
