package pod

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

func podInUserNamespace(name string) *runtimeapi.PodSandboxConfig {
	pod := podNamed(name)
	ids := []*runtimeapi.IDMapping{{HostId: 200000, Length: 65536}}
	pod.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Uids: ids, Gids: ids}
	return pod
}

// TestUserNamespaceRefused: a pod that cannot have what it asks for is refused before
// anything is made, and told why.
func TestUserNamespaceRefused(t *testing.T) {
	broken := errors.New("the kernel of this test has none")
	for name, tt := range map[string]struct {
		edit func(*Pods)
		says string
	}{
		"host":    {func(s *Pods) { s.hostUserNamespaces = func() error { return broken } }, broken.Error()},
		"handler": {func(s *Pods) { s.cfg.Features = minimal }, `handler "builtin"`},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			s := l.start()
			s.hostUserNamespaces = func() error { return nil }
			tt.edit(s)
			_, err := s.Run(t.Context(), podInUserNamespace("a"), "")
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "userns_options: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v", err)
			}
			l.checkEmpty(s)
			if _, err := s.Run(t.Context(), podNamed("b"), ""); err != nil {
				t.Errorf("a pod of the host's users: %v", err)
			}
		})
	}
}

func minimal(context.Context, string) (spec.Features, error) { return spec.Minimal(), nil }

// TestUserNamespaceIsGone: a pod whose user namespace is not pinned any more takes no further
// container.
func TestUserNamespaceIsGone(t *testing.T) {
	l := newLab(t)
	s := l.start()
	id := newID()
	p := &Pod{podRecord: podRecord{ID: id, CreatedAt: time.Now(), Runtime: "builtin", Keeper: "node", Config: podConfig{podInUserNamespace("a")}}}
	if err := s.recordPod(p); err != nil {
		t.Fatal(err)
	}
	if err := state.Write(filepath.Join(s.paths.pod(id), "ready"), readyKind, readyRecord{Boot: host.BootID()}, state.Volatile); err != nil {
		t.Fatal(err)
	}
	s = l.start()
	st, err := s.Get(id)
	if err != nil || st.Ready || st.Problem != "its user namespace is gone" {
		t.Errorf("got %+v, %v", st, err)
	}
	if err := s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	l.checkEmpty(s)
}
