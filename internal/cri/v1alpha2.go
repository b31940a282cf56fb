package cri

import (
	"context"
	"slices"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// v1alpha2 is the API of kubelets up to 1.25. Each of its messages has the fields
// of v1's message of the same name, as far as there were any, with the same
// numbers and types, so that v1's handlers serve it.
const v1alpha2 = "runtime.v1alpha2."

// v1alpha2Methods are those the old API had at its end. Its clients ask for no
// others, and one that does should hear that they are not there.
var v1alpha2Methods = []string{
	"Version", "Status", "UpdateRuntimeConfig",
	"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "PodSandboxStatus", "ListPodSandbox",
	"CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "ListContainers", "ContainerStatus",
	"UpdateContainerResources", "ReopenContainerLog", "ExecSync", "Exec", "Attach", "PortForward",
	"ContainerStats", "ListContainerStats", "PodSandboxStats", "ListPodSandboxStats",
	"ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo",
}

// registerV1alpha2 serves both services under their old names too.
func registerV1alpha2(s *grpc.Server, runtime *runtimeService, images *imageService) {
	s.RegisterService(asV1alpha2(runtimeapi.RuntimeService_ServiceDesc, "RuntimeService"), oldRuntimeService{runtime})
	s.RegisterService(asV1alpha2(runtimeapi.ImageService_ServiceDesc, "ImageService"), images)
}

func asV1alpha2(desc grpc.ServiceDesc, name string) *grpc.ServiceDesc {
	desc.ServiceName, desc.Streams, desc.Metadata = v1alpha2+name, nil, nil
	desc.Methods = slices.DeleteFunc(slices.Clone(desc.Methods), func(m grpc.MethodDesc) bool {
		return !slices.Contains(v1alpha2Methods, m.MethodName)
	})
	return &desc
}

// oldRuntimeService is runtimeService as v1alpha2 clients see it.
type oldRuntimeService struct{ *runtimeService }

// Version is v1's, with the version of the API that was asked.
func (s oldRuntimeService) Version(ctx context.Context, r *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	resp, err := s.runtimeService.Version(ctx, r)
	if err != nil {
		return nil, err
	}
	resp.RuntimeApiVersion = "v1alpha2"
	return resp, nil
}
