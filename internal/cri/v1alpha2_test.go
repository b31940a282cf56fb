package cri

import (
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The old API's services have exactly the methods of the list, and no streams.
func TestV1alpha2Methods(t *testing.T) {
	got := make(map[string]int)
	for name, v1 := range map[string]grpc.ServiceDesc{
		"runtime.v1alpha2.RuntimeService": runtimeapi.RuntimeService_ServiceDesc,
		"runtime.v1alpha2.ImageService":   runtimeapi.ImageService_ServiceDesc,
	} {
		before := len(v1.Methods)
		desc := asV1alpha2(v1, name[len(v1alpha2):])
		if desc.ServiceName != name || len(desc.Streams) > 0 {
			t.Errorf("%s has %d streams, want %s with none", desc.ServiceName, len(desc.Streams), name)
		}
		for _, m := range desc.Methods {
			got[m.MethodName]++
		}
		if len(v1.Methods) != before || v1.Methods[before-1].MethodName == "" {
			t.Errorf("%s: v1's own description was changed", name)
		}
	}
	for _, name := range v1alpha2Methods {
		if got[name] != 1 {
			t.Errorf("%s is in %d services", name, got[name])
		}
	}
	if len(got) != len(v1alpha2Methods) {
		t.Errorf("%d methods, want %d", len(got), len(v1alpha2Methods))
	}
}
