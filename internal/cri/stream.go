package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/pod"
)

// Streams gives out the URLs at which clients exec, attach and forward ports.
type Streams interface {
	Exec(r *runtimeapi.ExecRequest) (url string, err error)
	Attach(r *runtimeapi.AttachRequest) (url string, err error)
	PortForward(r *runtimeapi.PortForwardRequest) (url string, err error)
}

// Exec prepares running a command with streams.
func (s *runtimeService) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if len(r.GetCmd()) == 0 {
		return nil, fmt.Errorf("cmd: it is empty; give the program and its arguments: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkStreams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}
	st, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	r.ContainerId = st.ID
	url, err := s.cfg.Streams.Exec(r)
	return &runtimeapi.ExecResponse{Url: url}, err
}

// Attach prepares connecting to a container's first process.
func (s *runtimeService) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}
	st, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if r.GetTty() && !st.Config.GetTty() {
		return nil, fmt.Errorf("tty: the container has no terminal; attach without: %w", errdefs.ErrInvalidArgument)
	}
	r.ContainerId, r.Tty = st.ID, st.Config.GetTty()
	url, err := s.cfg.Streams.Attach(r)
	return &runtimeapi.AttachResponse{Url: url}, err
}

// PortForward prepares connecting to ports of a pod.
func (s *runtimeService) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	st, err := s.cfg.Pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !st.Ready {
		return nil, fmt.Errorf("forward ports of pod %s: it is not ready: %w", st.ID, errdefs.ErrFailedPrecondition)
	}
	for _, port := range r.GetPort() {
		if port < 1 || port > 1<<16-1 {
			return nil, fmt.Errorf("port: %d is none; give one from 1 to 65535: %w", port, errdefs.ErrInvalidArgument)
		}
	}
	r.PodSandboxId = st.ID
	url, err := s.cfg.Streams.PortForward(r)
	return &runtimeapi.PortForwardResponse{Url: url}, err
}

func checkStreams(stdin, stdout, stderr, tty bool) error {
	if tty && stderr {
		return fmt.Errorf("stderr: a terminal has only one output; ask for stdout: %w", errdefs.ErrInvalidArgument)
	}
	if !stdin && !stdout && !stderr {
		return fmt.Errorf("stdin, stdout, stderr: none is asked for; set at least one: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *runtimeService) runningContainer(id string) (pod.ContainerStatus, error) {
	st, err := s.cfg.Pods.GetContainer(id)
	if err == nil && st.State != pod.Running {
		err = fmt.Errorf("container %s: it is %v, not running: %w", st.ID, st.State, errdefs.ErrFailedPrecondition)
	}
	return st, err
}
