package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newPodCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pod", Short: "List, stop and remove pods", Args: cobra.NoArgs}
	cmd.AddCommand(newPodListCommand(), newPodStopCommand(), newPodRemoveCommand())
	return cmd
}

func newPodListCommand() *cobra.Command {
	var out listing
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List pods and their containers", Args: cobra.NoArgs}
	out.addTo(cmd)
	return daemon{timeout: 30 * time.Second}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, _ []string) error {
		pods, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		rows, err := c.podRows(ctx, pods.GetItems())
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), pods, "POD NAMESPACE STATE ADDRESS CONTAINERS AGE ID", rows)
	})
}

func (c *client) podRows(ctx context.Context, pods []*runtimeapi.PodSandbox) ([][]string, error) {
	containers, err := c.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	inPod := map[string][]string{}
	for _, container := range containers.GetContainers() {
		state := strings.ToLower(strings.TrimPrefix(container.GetState().String(), "CONTAINER_"))
		id := container.GetPodSandboxId()
		inPod[id] = append(inPod[id], container.GetMetadata().GetName()+":"+state)
	}
	now := time.Now()
	var rows [][]string
	for _, pod := range pods {
		state := "ready"
		if pod.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
			state = "stopped"
		}
		slices.Sort(inPod[pod.GetId()])
		rows = append(rows, []string{
			pod.GetMetadata().GetName(), pod.GetMetadata().GetNamespace(), state,
			c.addressOf(ctx, pod), cmp.Or(strings.Join(inPod[pod.GetId()], ","), "-"),
			age(now, pod.GetCreatedAt()), pod.GetId(),
		})
	}
	slices.SortFunc(rows, func(a, b []string) int { return cmp.Or(cmp.Compare(a[1], b[1]), cmp.Compare(a[0], b[0])) })
	return rows, nil
}

// addressOf asks for a pod's address, which the list does not tell. A pod that
// has gone meanwhile, or uses the host's network, has none.
func (c *client) addressOf(ctx context.Context, pod *runtimeapi.PodSandbox) string {
	answer, err := c.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod.GetId()})
	if err != nil {
		return "-"
	}
	if answer.GetStatus().GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE {
		return "host"
	}
	return cmp.Or(answer.GetStatus().GetNetwork().GetIp(), "-")
}

func newPodStopCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "stop POD...", Short: "Stop pods, with their containers", Args: cobra.MinimumNArgs(1)}
	return daemon{timeout: 2 * time.Minute}.verb(cmd, func(ctx context.Context, c *client, _ *cobra.Command, args []string) error {
		for _, name := range args {
			pod, err := c.findPod(ctx, name)
			if err != nil {
				return err
			}
			if _, err := c.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
				return fmt.Errorf("stop pod %s: %w", name, err)
			}
		}
		return nil
	})
}

func newPodRemoveCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "rm POD...",
		Aliases: []string{"remove"},
		Short:   "Stop and remove pods",
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name the pods to remove, or give --all")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove every pod there is")
	return daemon{timeout: 2 * time.Minute}.verb(cmd, func(ctx context.Context, c *client, _ *cobra.Command, args []string) error {
		pods, err := c.chosen(ctx, args, all)
		if err != nil {
			return err
		}
		var failed []error
		for _, pod := range pods {
			if err := c.removePod(ctx, pod); err != nil {
				failed = append(failed, err)
			}
		}
		return errors.Join(failed...)
	})
}

// chosen returns the pods that were named, or all.
func (c *client) chosen(ctx context.Context, names []string, all bool) ([]*runtimeapi.PodSandbox, error) {
	if all {
		answer, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		return answer.GetItems(), err
	}
	var pods []*runtimeapi.PodSandbox
	for _, name := range names {
		pod, err := c.findPod(ctx, name)
		if err != nil {
			return nil, err
		}
		pods = append(pods, pod)
	}
	return pods, nil
}

// removePod removes a pod and the logs that `sampan run` made room for.
func (c *client) removePod(ctx context.Context, pod *runtimeapi.PodSandbox) error {
	id := pod.GetId()
	if _, err := c.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop pod %s: %w", pod.GetMetadata().GetName(), err)
	}
	if _, err := c.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove pod %s: %w", pod.GetMetadata().GetName(), err)
	}
	if dir, ok := ownLogDirectory(pod); ok {
		return os.RemoveAll(dir)
	}
	return nil
}

// findPod returns the pod with the given name, NAMESPACE/NAME, id or start of
// an id. Of several with one name it takes the one that is ready.
func (c *client) findPod(ctx context.Context, name string) (*runtimeapi.PodSandbox, error) {
	answer, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	return pickPod(answer.GetItems(), name)
}

func pickPod(pods []*runtimeapi.PodSandbox, name string) (*runtimeapi.PodSandbox, error) {
	var found, ready []*runtimeapi.PodSandbox
	for _, pod := range pods {
		m := pod.GetMetadata()
		switch {
		case pod.GetId() == name:
			return pod, nil
		case m.GetName() == name, m.GetNamespace()+"/"+m.GetName() == name, len(name) >= 4 && strings.HasPrefix(pod.GetId(), name):
			found = append(found, pod)
			if pod.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
				ready = append(ready, pod)
			}
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("pod %s: there is none; `sampan pod ls` lists them", name)
	case len(found) == 1:
		return found[0], nil
	case len(ready) == 1:
		return ready[0], nil
	}
	var ids []string
	for _, pod := range found {
		ids = append(ids, short(pod.GetId()))
	}
	return nil, fmt.Errorf("pod %s: there are %d; name one by its id: %s", name, len(found), strings.Join(ids, ", "))
}

// findContainer returns the container with the given id or start of an id, or
// the one called POD/CONTAINER, or the newest of the pod called POD if all of
// the pod's containers have one name.
func (c *client) findContainer(ctx context.Context, name string) (*runtimeapi.Container, error) {
	containers, err := c.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, container := range containers.GetContainers() {
		if container.GetId() == name || len(name) >= 4 && strings.HasPrefix(container.GetId(), name) {
			return container, nil
		}
	}
	podName, containerName := name, ""
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		podName, containerName = name[:i], name[i+1:]
	}
	pod, err := c.findPod(ctx, podName)
	if err != nil && containerName != "" {
		pod, err = c.findPod(ctx, name) // NAMESPACE/POD
		containerName = ""
	}
	if err != nil {
		return nil, err
	}
	return pickContainer(containers.GetContainers(), pod, containerName)
}

func pickContainer(containers []*runtimeapi.Container, pod *runtimeapi.PodSandbox, name string) (*runtimeapi.Container, error) {
	var newest *runtimeapi.Container
	names := map[string]bool{}
	for _, container := range containers {
		n := container.GetMetadata().GetName()
		if container.GetPodSandboxId() != pod.GetId() || name != "" && n != name {
			continue
		}
		names[n] = true
		if newest == nil || container.GetCreatedAt() > newest.GetCreatedAt() {
			newest = container
		}
	}
	podName := pod.GetMetadata().GetName()
	switch {
	case newest == nil && name != "":
		return nil, fmt.Errorf("container %s: pod %s has none of that name", name, podName)
	case newest == nil:
		return nil, fmt.Errorf("pod %s: it has no container", podName)
	case len(names) > 1:
		return nil, fmt.Errorf("pod %s: it has %d containers; name one as %s/CONTAINER", podName, len(names), podName)
	}
	return newest, nil
}
