package pod

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestAppArmor: a container gets the profile it asks for, or none and an error. One
// that does not ask runs also where there is no default.
func TestAppArmor(t *testing.T) {
	localhost := func(name string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: name}
	}
	for _, tt := range []struct {
		name      string
		field     *runtimeapi.SecurityProfile
		off, none bool // no AppArmor on the host; no default profile to be had
		want, err string
	}{
		{name: "implied default", want: "the-default"},
		{name: "asked default", field: &runtimeapi.SecurityProfile{}, want: "the-default"},
		{name: "loaded", field: localhost("loaded"), want: "loaded"},
		{name: "not loaded", field: localhost("absent"), err: "linux.security_context.apparmor: profile absent is not loaded"},
		{name: "implied default, none", none: true},
		{name: "asked default, none", field: &runtimeapi.SecurityProfile{}, none: true, err: "linux.security_context.apparmor: no AppArmor"},
		{name: "implied default, off", off: true, none: true},
		{name: "asked default, off", field: &runtimeapi.SecurityProfile{}, off: true, none: true, err: "linux.security_context.apparmor: no AppArmor"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.facts.AppArmor, l.noAppArmor = !tt.off, tt.none
			s := l.start()
			podID, err := s.Run(t.Context(), podNamed("p"), "")
			if err != nil {
				t.Fatal(err)
			}
			config := containerNamed("c")
			config.Linux.SecurityContext.Apparmor = tt.field
			id, err := s.CreateContainer(t.Context(), podID, config)
			if tt.err != "" {
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %s", err, tt.err)
				}
			} else if err != nil {
				t.Fatal(err)
			} else if got := l.spec(s, id).Process.ApparmorProfile; got != tt.want {
				t.Errorf("profile %q, want %q", got, tt.want)
			}
			if err := s.Remove(t.Context(), podID); err != nil {
				t.Error(err)
			}
			l.checkEmpty(s)
		})
	}
}

// spec reads what the container's runtime was given.
func (l *lab) spec(s *Pods, id string) *specs.Spec {
	l.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.paths.bundle(id), "config.json"))
	if err != nil {
		l.t.Fatal(err)
	}
	var oci specs.Spec
	if err := json.Unmarshal(text, &oci); err != nil {
		l.t.Fatal(err)
	}
	return &oci
}
