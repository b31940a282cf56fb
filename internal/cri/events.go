package cri

import (
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/pod"
)

var eventTypes = map[pod.EventKind]runtimeapi.ContainerEventType{
	pod.EventCreated: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT,
	pod.EventStarted: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	pod.EventStopped: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT,
	pod.EventDeleted: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// GetContainerEvents tells what happens to pods and containers, from the moment
// its headers are sent.
func (s *runtimeService) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	events := s.cfg.Pods.Subscribe()
	defer events.Close()
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for {
		batch, err := events.Next(stream.Context())
		if err != nil {
			return err
		}
		for _, e := range batch {
			if err := stream.Send(containerEvent(e)); err != nil {
				return err
			}
		}
	}
}

func containerEvent(e pod.Event) *runtimeapi.ContainerEventResponse {
	return &runtimeapi.ContainerEventResponse{
		ContainerId: e.ID, ContainerEventType: eventTypes[e.Kind], CreatedAt: e.At.UnixNano(),
		PodSandboxStatus: podStatus(e.Pod), ContainersStatuses: containerStatuses(e.Snapshot),
	}
}

func containerStatuses(snapshot pod.Snapshot) []*runtimeapi.ContainerStatus {
	all := make([]*runtimeapi.ContainerStatus, 0, len(snapshot.Containers))
	for _, st := range snapshot.Containers {
		all = append(all, containerStatus(snapshot.Pod, st))
	}
	return all
}
