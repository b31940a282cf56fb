package crash

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// scenario is a piece of a node's life. It leaves nothing, whoever dies meanwhile,
// and fails if something is not as it should be at its end.
type scenario struct {
	name string
	run  func(*kubelet) error
}

// house is a lab with its scenarios, and pods that are there all the time.
type house struct {
	name      string
	options   lab.Options
	short     int // how many kills the short form makes
	scenarios []scenario
}

func houses(t *testing.T) []house {
	return []house{
		{"node", lab.Options{}, 30, []scenario{
			{"life", life}, {"terminal", terminal}, {"shared", sharedPID}, {"adopted", adopted}, {"restart", restart}, {"subnets", subnets},
		}},
		{"isolated", lab.Options{Config: "[network]\nsubnet = \"" + lab.Subnet + "\"\n[keeper]\nisolation = \"pod\"\n"}, 4, []scenario{
			{"alone", alone},
		}},
		{"plugins", lab.Options{Config: "[network]\nmode = \"cni\"\ncni_conf_dir = \"" + loopbackPlugins(t) + "\"\ncni_bin_dirs = [\"/usr/lib/cni\"]\n"}, 8, []scenario{
			{"plugged", life}, {"cidrs", subnets},
		}},
	}
}

// life is a pod with a container that ends and one that goes on, an image that
// comes and goes, and all that is done to them.
func life(k *kubelet) error { return lifeWith(k, "registry.k8s.io/pause:3.9") }

func otherLife(k *kubelet) error {
	return lifeWith(k, "registry.k8s.io/e2e-test-images/nonewprivs:1.3")
}

func lifeWith(k *kubelet, image string) error {
	blackouts := k.blackouts.Load()
	n := k.names.Add(1)
	name := fmt.Sprint("life-", n)
	if _, err := k.pull(image); err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	podConfig := k.l.PodConfig(name)
	podConfig.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: int32(20000 + n%10000)}}
	pod, err := k.runPod(podConfig)
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	w := writer{lines: 150, code: 7, every: time.Millisecond, both: n%2 == 0}
	writes, err := k.run(pod, podConfig, w.config(k.l))
	if err != nil {
		return fmt.Errorf("run writer: %w", err)
	}
	config := k.l.ContainerConfig("box", "busybox", "sleep", "1000")
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: image}, Readonly: true}}
	box, err := k.run(pod, podConfig, config)
	if err != nil {
		return fmt.Errorf("run box: %w", err)
	}
	if err := k.exec(box, name+"\n", "hostname"); err != nil {
		return err
	}
	if err := k.change(pod, box); err != nil {
		return err
	}
	if err := w.check(k, writes, filepath.Join(podConfig.GetLogDirectory(), "writer.log"), blackouts); err != nil {
		return err
	}
	if err := k.ready(pod); err != nil {
		return err
	}
	if _, err := call(k, k.runtime.StopContainer, &runtimeapi.StopContainerRequest{ContainerId: box}); err != nil {
		return fmt.Errorf("stop box: %w", err)
	}
	st, err := k.status(box)
	if err != nil || st.GetExitCode() != 137 && !k.blackedOut(blackouts) {
		return fmt.Errorf("stopped box: code %d (%s), %v; want 137", st.GetExitCode(), st.GetMessage(), err)
	}
	if _, err := call(k, k.runtime.RemoveContainer, &runtimeapi.RemoveContainerRequest{ContainerId: box}); err != nil {
		return fmt.Errorf("remove box: %w", err)
	}
	if err := k.removePod(pod); err != nil {
		return fmt.Errorf("remove pod: %w", err)
	}
	if err := os.RemoveAll(podConfig.GetLogDirectory()); err != nil {
		return err
	}
	return k.removeImage(image)
}

// change changes what can be changed of a running container and its pod.
func (k *kubelet) change(pod, id string) error {
	limits := &runtimeapi.LinuxContainerResources{CpuShares: 512}
	if _, err := call(k, k.runtime.UpdateContainerResources, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: limits}); err != nil {
		return fmt.Errorf("update container: %w", err)
	}
	if _, err := call(k, k.runtime.UpdatePodSandboxResources, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: limits}); err != nil {
		return fmt.Errorf("update pod: %w", err)
	}
	if _, err := call(k, k.runtime.ReopenContainerLog, &runtimeapi.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	r, err := call(k, k.runtime.ListContainers, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
	if err != nil || len(r.GetContainers()) != 1 {
		return fmt.Errorf("list: %v, %w", r.GetContainers(), err)
	}
	return nil
}

func (k *kubelet) ready(pod string) error {
	r, err := call(k, k.runtime.PodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || r.GetStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("pod: %v, %v; want ready", r.GetStatus().GetState(), err)
	}
	return nil
}

// sharedPID is a pod whose containers see each other's processes.
func sharedPID(k *kubelet) error {
	podConfig := k.l.PodConfig(k.name("shared"))
	podConfig.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	pod, err := k.runPod(podConfig)
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	config := k.l.ContainerConfig("box", "busybox", "sleep", "1000")
	config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	box, err := k.run(pod, podConfig, config)
	if err != nil {
		return fmt.Errorf("run box: %w", err)
	}
	if err := k.exec(box, "hello\n", "echo", "hello"); err != nil {
		return err
	}
	if err := k.ready(pod); err != nil {
		return err
	}
	return k.removePod(pod)
}

// terminal is a container with a terminal, which goes on as long as any process of
// Sampan has it open.
func terminal(k *kubelet) error {
	blackouts := k.blackouts.Load()
	podConfig := k.l.PodConfig(k.name("terminal"))
	pod, err := k.runPod(podConfig)
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	w := writer{lines: 150, code: 7, every: time.Millisecond, terminal: true}
	id, err := k.run(pod, podConfig, w.config(k.l))
	if err != nil {
		return fmt.Errorf("run writer: %w", err)
	}
	if err := w.check(k, id, filepath.Join(podConfig.GetLogDirectory(), "writer.log"), blackouts); err != nil {
		return err
	}
	return k.removePod(pod)
}

// adopted is a container whose keeper's worker is another at its end, so that it
// is the supervisor's child, and one whose supervisor is.
func adopted(k *kubelet) error {
	for _, role := range []string{"worker", "supervisor"} {
		if err := adoptedWithout(k, role); err != nil {
			return err
		}
	}
	return nil
}

func adoptedWithout(k *kubelet, role string) error {
	blackouts := k.blackouts.Load()
	podConfig := k.l.PodConfig(k.name("adopted"))
	pod, err := k.runPod(podConfig)
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	w := writer{lines: 120, code: 9, every: time.Millisecond}
	id, err := k.run(pod, podConfig, w.config(k.l))
	if err != nil {
		return fmt.Errorf("run writer: %w", err)
	}
	if err := k.kill(role); err != nil {
		return err
	}
	if err := w.check(k, id, filepath.Join(podConfig.GetLogDirectory(), "writer.log"), blackouts); err != nil {
		return err
	}
	return k.removePod(pod)
}

// kill sends SIGKILL to the processes in a role, if there are any just now.
func (k *kubelet) kill(role string) error {
	pids, err := k.pids(role)
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			return err
		}
	}
	return err
}

func (k *kubelet) pids(role string) ([]int, error) {
	if role == "daemon" {
		return k.l.Daemons()
	}
	return k.l.KeeperPids(role)
}

// restart kills the daemon with a pod there, and has it unpack its programs anew.
func restart(k *kubelet) error {
	podConfig := k.l.PodConfig(k.name("restart"))
	pod, err := k.runPod(podConfig)
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	inits, err := filepath.Glob(filepath.Join(k.l.Root, "bin", "init-*"))
	if err != nil {
		return err
	}
	for _, path := range inits {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if err := k.kill("daemon"); err != nil {
		return err
	}
	if err := k.ready(pod); err != nil {
		return err
	}
	return k.removePod(pod)
}

// subnets moves new pods to another subnet and back.
func subnets(k *kubelet) error {
	for _, cidr := range []string{"10.89.0.0/16", lab.Subnet} {
		config := &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}}
		if _, err := call(k, k.runtime.UpdateRuntimeConfig, &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: config}); err != nil {
			return fmt.Errorf("update runtime config: %w", err)
		}
		podConfig := k.l.PodConfig(k.name("subnet"))
		pod, err := k.runPod(podConfig)
		if err != nil {
			return fmt.Errorf("run pod: %w", err)
		}
		if err := k.removePod(pod); err != nil {
			return err
		}
	}
	return nil
}

// alone is a pod with a keeper of its own, which leaves after it.
func alone(k *kubelet) error {
	if err := sharedPID(k); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		pids, err := k.pids("supervisor")
		if err != nil {
			return err
		}
		cgroups, err := filepath.Glob("/sys/fs/cgroup/*/sampan.keeper-*")
		if err != nil {
			return err
		}
		names := map[string]bool{}
		for _, path := range cgroups {
			names[filepath.Base(path)] = true
		}
		if len(pids) == residents && len(names) <= residents {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d keepers and their %d cgroups are there %v after a pod, want the %d of those that stay", len(pids), len(names), patience, residents)
		}
	}
}

// loopbackPlugins writes a CNI configuration that needs no bridge, so that what is
// left is Sampan's.
func loopbackPlugins(t *testing.T) string {
	dir := t.TempDir()
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "crash", "plugins": [
	{"type": "ptp", "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.99.0.0/16"}]]}}]}`, filepath.Join(dir, "ipam"))
	if err := os.WriteFile(filepath.Join(dir, "10-crash.conflist"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// residents is how many pods there are all the time.
const residents = 3

// resident is a pod that nothing may happen to.
type resident struct {
	id      string
	log     string
	started int64
	read    *reader
}

func startResidents(t *testing.T, k *kubelet) []*resident {
	t.Helper()
	var all []*resident
	for i := range residents {
		podConfig := k.l.PodConfig(fmt.Sprint("resident-", i))
		pod := k.l.RunPod(t, podConfig)
		w := writer{lines: 100_000_000, every: time.Duration(10*(i+1)) * time.Millisecond, both: i == 1}
		config := w.config(k.l)
		id := k.l.CreateContainer(t, pod, podConfig, config)
		k.l.StartContainer(t, id)
		all = append(all, &resident{id: id, log: filepath.Join(podConfig.GetLogDirectory(), "writer.log"), started: k.l.Status(t, id).GetStartedAt(), read: w.reader()})
	}
	return all
}

// check finds the resident as it was, with lines that follow each other.
func (r *resident) check(k *kubelet) error {
	st, err := k.status(r.id)
	if err != nil {
		return err
	}
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING || st.GetStartedAt() != r.started {
		return fmt.Errorf("resident %s: %v, code %d (%s), started at %d; want running since %d",
			r.log, st.GetState(), st.GetExitCode(), st.GetMessage(), st.GetStartedAt(), r.started)
	}
	_, before := r.read.ends()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(pause) {
		if err := r.read.follow(r.log); err != nil {
			return fmt.Errorf("resident: %w", err)
		}
		if _, last := r.read.ends(); last > before {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("resident %s: no line after line %d", r.log, before)
		}
	}
}
