package spec

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"sampan.dev/sampan/internal/host"
)

func TestCheck(t *testing.T) {
	period, quota, score := uint64(5), int64(5), -999
	for field, spoil := range map[string]func(*specs.Spec){
		"":                   func(*specs.Spec) {},
		"process.args":       func(s *specs.Spec) { s.Process.Args = []string{""} },
		"process.env[0]":     func(s *specs.Spec) { s.Process.Env = []string{"=x"} },
		"process.env[1]":     func(s *specs.Spec) { s.Process.Env = []string{"A=", "B"} },
		"process.rlimits[0]": func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "NOFILE"}} },
		"process.rlimits[1]": func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_CORE"}}
		},
		"process.oomScoreAdj":   func(s *specs.Spec) { s.Process.OOMScoreAdj = &score },
		"mounts[0].destination": func(s *specs.Spec) { s.Mounts = []specs.Mount{{Destination: "x"}} },
		"mounts[0].source": func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/x", Source: "y", Options: []string{"rbind"}}}
		},
		"linux.cgroupsPath":          func(s *specs.Spec) { s.Linux.CgroupsPath = "" },
		"linux.namespaces[1].type":   func(s *specs.Spec) { s.Linux.Namespaces = []specs.LinuxNamespace{{Type: "pid"}, {Type: "pid"}} },
		"linux.namespaces[0].path":   func(s *specs.Spec) { s.Linux.Namespaces = []specs.LinuxNamespace{{Type: "pid", Path: "x"}} },
		"linux.devices[0].path":      func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "null", Type: "c"}} },
		"linux.devices[0].type":      func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/null", Type: "x"}} },
		"linux.resources.cpu.period": func(s *specs.Spec) { s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Period: &period}} },
		"linux.resources.cpu.quota":  func(s *specs.Spec) { s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota}} },
		"hooks.path":                 func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "x"}}} },
	} {
		s := &specs.Spec{Process: &specs.Process{Args: []string{"a"}}, Linux: &specs.Linux{CgroupsPath: "/c"}}
		spoil(s)
		err := Check(s, host.Facts{})
		if field == "" {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		var f *FieldError
		if !errors.As(err, &f) || !strings.HasPrefix(f.Field, field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}
