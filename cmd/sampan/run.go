package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// logRoot is where the kubelet keeps pods' logs, so that tools find ours too.
const logRoot = "/var/log/pods"

// runMark is a file in the log directories that `sampan run` makes: they go with
// their pods. Those of the kubelet are the kubelet's.
const runMark = ".sampan-run"

// order is what `sampan run` was asked for.
type order struct {
	image       string
	command     []string
	name        string
	namespace   string
	handler     string
	publish     []string
	env         []string
	hostNetwork bool
}

func newRunCommand() *cobra.Command {
	var o order
	cmd := &cobra.Command{
		Use:   "run IMAGE [flags] [-- COMMAND ARG...]",
		Short: "Run a pod with one container; pull the image if it is not there",
		Args:  cobra.MinimumNArgs(1),
	}
	flags := cmd.Flags()
	flags.StringVar(&o.name, "name", "", "name of the pod (default: from the image)")
	flags.StringVar(&o.namespace, "namespace", "default", "Kubernetes namespace of the pod")
	flags.StringVar(&o.handler, "handler", "", "handler to run it with (default: the daemon's default)")
	flags.StringArrayVarP(&o.publish, "publish", "p", nil, "[HOST-IP:]HOST-PORT:PORT[/udp|/sctp], may be repeated")
	flags.StringArrayVarP(&o.env, "env", "e", nil, "KEY=VALUE, may be repeated")
	flags.BoolVar(&o.hostNetwork, "host-network", false, "use the host's network")
	return daemon{timeout: 15 * time.Minute}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		o.image, o.command = args[0], args[1:]
		status, err := c.run(ctx, o)
		if err != nil {
			return err
		}
		where := cmp.Or(status.GetNetwork().GetIp(), "the host's")
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "pod %s is up\naddress: %s\nid: %s\n", status.GetMetadata().GetName(), where, status.GetId())
		return err
	})
}

// run brings the pod up, or leaves nothing.
func (c *client) run(ctx context.Context, o order) (*runtimeapi.PodSandboxStatus, error) {
	pod, err := o.pod()
	if err != nil {
		return nil, err
	}
	container, err := o.container()
	if err != nil {
		return nil, err
	}
	if err := c.refuseTwin(ctx, pod.GetMetadata()); err != nil {
		return nil, err
	}
	if err := c.ensureImage(ctx, o.image); err != nil {
		return nil, err
	}
	status, err := c.start(ctx, o, pod, container)
	if err == nil {
		return status, nil
	}
	if undone := c.undo(ctx, pod); undone != nil {
		err = fmt.Errorf("%w; what is left could not be removed: %w", err, undone)
	}
	return nil, err
}

func (c *client) refuseTwin(ctx context.Context, m *runtimeapi.PodSandboxMetadata) error {
	answer, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, pod := range answer.GetItems() {
		if pod.GetMetadata().GetName() == m.GetName() && pod.GetMetadata().GetNamespace() == m.GetNamespace() {
			return fmt.Errorf("pod %s: there is one already; remove it with `sampan pod rm %s` or choose a --name", m.GetName(), short(pod.GetId()))
		}
	}
	return nil
}

func (c *client) ensureImage(ctx context.Context, reference string) error {
	answer, err := c.image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: reference}})
	if err != nil {
		return fmt.Errorf("image %s: %w", reference, err)
	}
	if answer.GetImage() == nil {
		_, err = c.pull(ctx, reference, nil)
	}
	return err
}

func (c *client) start(ctx context.Context, o order, pod *runtimeapi.PodSandboxConfig, container *runtimeapi.ContainerConfig) (*runtimeapi.PodSandboxStatus, error) {
	if err := makeLogDirectory(pod, container); err != nil {
		return nil, err
	}
	ran, err := c.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod, RuntimeHandler: o.handler})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", pod.GetMetadata().GetName(), err)
	}
	id := ran.GetPodSandboxId()
	created, err := c.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: container, SandboxConfig: pod})
	if err != nil {
		return nil, fmt.Errorf("create container: %w", err)
	}
	if _, err := c.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.GetContainerId()}); err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	answer, err := c.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return nil, fmt.Errorf("ask for pod %s: %w", pod.GetMetadata().GetName(), err)
	}
	return answer.GetStatus(), nil
}

// undo removes a pod that did not come up. It finds the pod by its uid, for the
// answer with its id may have been lost, and has time of its own, for the
// command's may be over.
func (c *client) undo(ctx context.Context, config *runtimeapi.PodSandboxConfig) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	answer, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	failed := []error{err}
	for _, pod := range answer.GetItems() {
		if pod.GetMetadata().GetUid() == config.GetMetadata().GetUid() {
			failed = append(failed, c.removePod(ctx, pod))
		}
	}
	failed = append(failed, os.RemoveAll(config.GetLogDirectory()))
	return errors.Join(failed...)
}

func (o order) pod() (*runtimeapi.PodSandboxConfig, error) {
	name := cmp.Or(o.name, nameOf(o.image))
	m := &runtimeapi.PodSandboxMetadata{Name: name, Namespace: o.namespace, Uid: newUID()}
	if strings.ContainsAny(name+o.namespace, "/_ ") || name == "" || o.namespace == "" {
		return nil, fmt.Errorf("pod %q in namespace %q: names have letters, digits, dots and dashes", name, o.namespace)
	}
	network := runtimeapi.NamespaceMode_POD
	if o.hostNetwork {
		network = runtimeapi.NamespaceMode_NODE
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     m,
		LogDirectory: logDirectory(m),
		Labels: map[string]string{
			"io.kubernetes.pod.name":      m.GetName(),
			"io.kubernetes.pod.namespace": m.GetNamespace(),
			"io.kubernetes.pod.uid":       m.GetUid(),
		},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: namespaces(network),
			Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		}},
	}
	if !o.hostNetwork {
		config.Hostname = name
	}
	for _, p := range o.publish {
		mapping, err := parsePublish(p)
		if err != nil {
			return nil, err
		}
		config.PortMappings = append(config.PortMappings, mapping)
	}
	return config, nil
}

func (o order) container() (*runtimeapi.ContainerConfig, error) {
	network := runtimeapi.NamespaceMode_POD
	if o.hostNetwork {
		network = runtimeapi.NamespaceMode_NODE
	}
	name := cmp.Or(o.name, nameOf(o.image))
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: o.image, UserSpecifiedImage: o.image},
		Command:  o.command,
		LogPath:  filepath.Join(name, "0.log"),
		Labels:   map[string]string{"io.kubernetes.container.name": name},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: namespaces(network),
			Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		}},
	}
	for _, e := range o.env {
		key, value, ok := strings.Cut(e, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("env %q: must be KEY=VALUE", e)
		}
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: key, Value: []byte(value)})
	}
	return config, nil
}

func namespaces(network runtimeapi.NamespaceMode) *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{Network: network, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD}
}

// nameOf makes a pod's name of an image's: "docker.io/library/redis:7" is redis.
func nameOf(image string) string {
	name, _, _ := strings.Cut(image, "@")
	name = name[strings.LastIndexByte(name, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	return strings.ToLower(strings.ReplaceAll(name, "_", "-"))
}

// parsePublish reads [HOST-IP:]HOST-PORT:PORT[/PROTOCOL]; an IPv6 address
// stands in brackets.
func parsePublish(s string) (*runtimeapi.PortMapping, error) {
	bad := func() (*runtimeapi.PortMapping, error) {
		return nil, fmt.Errorf("publish %q: must be [HOST-IP:]HOST-PORT:PORT[/udp|/sctp], like 8080:80", s)
	}
	ports, protocol, named := strings.Cut(s, "/")
	if !named {
		protocol = "tcp"
	}
	number, ok := runtimeapi.Protocol_value[strings.ToUpper(protocol)]
	last := strings.LastIndexByte(ports, ':')
	if !ok || last < 0 {
		return bad()
	}
	m := &runtimeapi.PortMapping{Protocol: runtimeapi.Protocol(number)}
	host := ports[:last]
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		address, err := netip.ParseAddr(strings.Trim(host[:i], "[]"))
		if err != nil {
			return bad()
		}
		m.HostIp, host = address.String(), host[i+1:]
	}
	for _, p := range []struct {
		text string
		to   *int32
	}{{host, &m.HostPort}, {ports[last+1:], &m.ContainerPort}} {
		n, err := strconv.ParseUint(p.text, 10, 16)
		if err != nil || n == 0 {
			return bad()
		}
		*p.to = int32(n)
	}
	return m, nil
}

func newUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func logDirectory(m *runtimeapi.PodSandboxMetadata) string {
	return filepath.Join(logRoot, m.GetNamespace()+"_"+m.GetName()+"_"+m.GetUid())
}

// makeLogDirectory does what the kubelet does before it asks for a pod.
func makeLogDirectory(pod *runtimeapi.PodSandboxConfig, container *runtimeapi.ContainerConfig) error {
	err := os.MkdirAll(filepath.Join(pod.GetLogDirectory(), container.GetMetadata().GetName()), 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(pod.GetLogDirectory(), runMark), nil, 0o644)
	}
	if err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	return nil
}

// ownLogDirectory returns the log directory of a pod that `sampan run` made. A
// pod's name may be anything, so it is not trusted to stay within logRoot.
func ownLogDirectory(pod *runtimeapi.PodSandbox) (string, bool) {
	dir := logDirectory(pod.GetMetadata())
	_, err := os.Lstat(filepath.Join(dir, runMark))
	return dir, err == nil && filepath.Dir(dir) == logRoot
}
