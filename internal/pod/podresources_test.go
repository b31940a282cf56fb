package pod

import (
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestUpdatePod(t *testing.T) {
	l := newLab(t)
	s := l.start()
	config := podNamed("a")
	config.Linux.Overhead = &runtimeapi.LinuxContainerResources{CpuShares: 10}
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 100}
	p := must[string](t)(s.Run(t.Context(), config, ""))
	check := func(s *Pods, overhead, resources int64) {
		t.Helper()
		st, err := s.Get(p)
		if err != nil || st.Overhead.GetCpuShares() != overhead || st.Resources.GetCpuShares() != resources {
			t.Fatalf("%v, %v, %v", st.Overhead, st.Resources, err)
		}
	}
	check(s, 10, 100)
	if err := s.UpdatePod(t.Context(), p, nil, &runtimeapi.LinuxContainerResources{CpuShares: 200}); err != nil {
		t.Fatal(err)
	}
	check(s, 10, 200)
	if err := s.UpdatePod(t.Context(), p, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -5}, nil); !errdefs.IsInvalidArgument(err) {
		t.Fatalf("no such limit: %v", err)
	}
	if err := s.UpdatePod(t.Context(), "none", nil, nil); !errdefs.IsNotFound(err) {
		t.Fatalf("no such pod: %v", err)
	}
	again := l.start()
	check(again, 10, 200)
	if !proto.Equal(config.Linux.Resources, &runtimeapi.LinuxContainerResources{CpuShares: 100}) {
		t.Fatal("the configuration was changed")
	}
	if err := again.Stop(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := again.UpdatePod(t.Context(), p, nil, nil); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("stopped: %v", err)
	}
}
