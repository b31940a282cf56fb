// Package node tests the daemon as a unit of systemd, on a machine that it has to
// itself: what units and cgroups look like, what outlives what, and how
// containers are confined. `make test-vm` runs it in virtual machines.
package node

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

const busybox = "docker.io/library/busybox:latest"

func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	lab.RequireNode(t)
	return lab.New(t, lab.Options{})
}

// driver is the cgroup driver that the daemon has.
func driver(t *testing.T, l *lab.Lab) runtimeapi.CgroupDriver {
	t.Helper()
	r, err := l.Runtime.RuntimeConfig(t.Context(), &runtimeapi.RuntimeConfigRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetLinux().GetCgroupDriver()
}

func needSystemd(t *testing.T, l *lab.Lab) {
	t.Helper()
	if driver(t, l) != runtimeapi.CgroupDriver_SYSTEMD {
		t.Skip("the daemon says that its cgroup driver is cgroupfs")
	}
}

func needV2(t *testing.T) {
	t.Helper()
	if mode := host.CgroupMode(); mode != host.CgroupV2 {
		t.Skip("this machine was booted with cgroup ", mode)
	}
}

// podSlice makes a slice as the kubelet does for a pod, and returns its name.
func podSlice(t *testing.T, uid string) string {
	t.Helper()
	slice := "kubepods-burstable-pod" + uid + ".slice"
	unit := "[Unit]\nDefaultDependencies=no\n[Slice]\nMemoryMax=256M\nCPUWeight=50\nTasksMax=500\n"
	file := "/run/systemd/system/" + slice
	if err := os.WriteFile(file, []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "daemon-reload")
	systemctl(t, "start", slice)
	t.Cleanup(func() {
		systemctl(t, "stop", slice)
		os.Remove(file)
		systemctl(t, "stop", "kubepods.slice")
	})
	return slice
}

func systemctl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("timeout", append([]string{"300", "systemctl"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("systemctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func property(t *testing.T, unit, name string) string {
	t.Helper()
	value, err := lab.UnitProperty(unit, name)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// container runs a container in a new pod and returns the ids of both.
func container(t *testing.T, l *lab.Lab, config *runtimeapi.PodSandboxConfig, change func(*runtimeapi.ContainerConfig), args ...string) (podID, id string) {
	t.Helper()
	l.Pull(t, busybox)
	podID = l.RunPod(t, config)
	return podID, addContainer(t, l, podID, config, change, args...)
}

func addContainer(t *testing.T, l *lab.Lab, podID string, config *runtimeapi.PodSandboxConfig, change func(*runtimeapi.ContainerConfig), args ...string) string {
	t.Helper()
	c := l.ContainerConfig("main", busybox, args...)
	if change != nil {
		change(c)
	}
	id := l.CreateContainer(t, podID, config, c)
	l.StartContainer(t, id)
	return id
}

// pid is the first process of a container, as the machine sees it.
func pid(t *testing.T, l *lab.Lab, id string) int {
	t.Helper()
	r, err := l.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ PID int }
	if err := json.Unmarshal([]byte(r.GetInfo()["info"]), &info); err != nil || info.PID == 0 {
		t.Fatalf("no pid in %v (%v)", r.GetInfo(), err)
	}
	return info.PID
}

// cgroup is where a process is, in the hierarchy of a controller; "" is the
// unified one.
func cgroup(t *testing.T, pid int, controller string) string {
	t.Helper()
	c, err := host.CgroupOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	return c[controller]
}

func read(t *testing.T, elems ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(elems...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// TestUnit: the daemon's unit is what it says, its log has priorities, and the
// keeper is outside.
func TestUnit(t *testing.T) {
	l := newLab(t)
	for name, want := range map[string]string{"ActiveState": "active", "Type": "notify", "KillMode": "mixed", "OOMScoreAdjust": "-999"} {
		if got := property(t, lab.Unit, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	out, err := exec.Command("journalctl", "--unit="+lab.Unit, "--output=json", "--lines=200", "--no-pager").Output()
	if err != nil {
		t.Fatal(err)
	}
	serving := ""
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "msg=serving") {
			serving = line
		}
	}
	if !strings.Contains(serving, `"PRIORITY":"6"`) || strings.Contains(serving, "time=") {
		t.Errorf("the journal has of the daemon's start: %q", serving)
	}
	l.Pull(t, busybox)
	l.RunPod(t, l.PodConfig("unit"))
	for _, role := range []string{"supervisor", "worker"} {
		pids := l.Keepers(t, role)
		if len(pids) != 1 {
			t.Fatalf("%d keepers are %s", len(pids), role)
		}
		for _, controller := range []string{"", "name=systemd", "memory"} {
			if at := cgroup(t, pids[0], controller); strings.Contains(at, lab.Unit) {
				t.Errorf("the keeper's %s is in the daemon's cgroup: %s", role, at)
			}
		}
	}
}

// TestWatchdog: a daemon that hangs is started anew, and its pods go on.
func TestWatchdog(t *testing.T) {
	l := newLab(t)
	_, id := container(t, l, l.PodConfig("watchdog"), nil, "sleep", "1000")
	dropIn := "/run/systemd/system/" + lab.Unit + ".d/watchdog.conf"
	if err := os.WriteFile(dropIn, []byte("[Service]\nWatchdogSec=9s\nTimeoutAbortSec=1s\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dropIn); systemctl(t, "daemon-reload") })
	systemctl(t, "daemon-reload")
	systemctl(t, "restart", lab.Unit)
	first := property(t, lab.Unit, "MainPID")
	time.Sleep(12 * time.Second) // longer than the limit
	if again := property(t, lab.Unit, "MainPID"); again != first {
		t.Fatalf("a daemon that is well was killed: %s, then %s", first, again)
	}
	systemctl(t, "kill", "--kill-who=main", "--signal=STOP", lab.Unit)
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		now := property(t, lab.Unit, "MainPID")
		if now != first && now != "0" && property(t, lab.Unit, "ActiveState") == "active" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a daemon that hangs is still there after a minute")
		}
	}
	if s := l.Status(t, id); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("its container is %v", s.GetState())
	}
}

// TestPlaces: with systemd a pod has one delegated unit in the slice that the
// kubelet made, a container a cgroup below it with its limits, and systemd does
// not take them back.
func TestPlaces(t *testing.T) {
	l := newLab(t)
	needSystemd(t, l)
	needV2(t)
	slice := podSlice(t, "a1")
	config := l.PodConfig("places")
	config.Linux.CgroupParent = slice
	podID, id := container(t, l, config, func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20, CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, CpusetCpus: "0", OomScoreAdj: 500,
			Unified: map[string]string{"memory.high": "50331648", "memory.oom.group": "1", "pids.max": "77"},
		}
	}, "sleep", "1000")
	unit := "sampan-pod-" + podID[:16] + ".service"
	for name, want := range map[string]string{"ActiveState": "active", "SubState": "running", "Delegate": "yes", "Slice": slice, "OOMPolicy": "continue", "TasksMax": "infinity"} {
		if got := property(t, unit, name); got != want {
			t.Errorf("the pod's unit: %s is %s, want %s", name, got, want)
		}
	}
	at := cgroup(t, pid(t, l, id), "")
	if want := "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/" + slice + "/" + unit + "/" + id; at != want {
		t.Fatalf("the container is in %s, want %s", at, want)
	}
	limits := map[string]string{
		"memory.max": "67108864", "memory.swap.max": "0", "memory.high": "50331648", "memory.oom.group": "1", "pids.max": "77",
		"cpu.max": "50000 100000", "cpuset.cpus": "0",
	}
	check := func(when string) {
		t.Helper()
		for file, want := range limits {
			if got := read(t, at, file); got != want {
				t.Errorf("%s: %s is %q, want %q", when, file, got, want)
			}
		}
		if got := read(t, at, "../../memory.max"); got != "268435456" {
			t.Errorf("%s: memory.max of the slice is %s", when, got)
		}
	}
	check("when it runs")
	systemctl(t, "daemon-reload")
	check("after systemctl daemon-reload")
	systemctl(t, "daemon-reexec")
	check("after systemctl daemon-reexec")
	// systemd works on the controllers of all units around when one comes or goes.
	if out, err := exec.Command("systemd-run", "--quiet", "--wait", "--slice="+slice, "--property=IOWeight=50", "/bin/true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check("after another unit in the slice")

	checkFigures(t, l, podID, id)
	if _, err := l.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 << 20, MemorySwapLimitInBytes: 96 << 20, CpuQuota: 20000, CpuPeriod: 100000},
	}); err != nil {
		t.Fatal(err)
	}
	limits["memory.max"], limits["cpu.max"] = "100663296", "20000 100000"
	check("after an update")
	l.RemovePod(t, podID)
	if got := property(t, unit, "LoadState"); got != "not-found" {
		t.Errorf("the removed pod's unit is %s", got)
	}
	if _, err := os.Stat(filepath.Dir(at)); !os.IsNotExist(err) {
		t.Errorf("the removed pod's cgroup: %v", err)
	}
}

// checkFigures: the statistics are read from the right places.
func checkFigures(t *testing.T, l *lab.Lab, podID, id string) {
	t.Helper()
	r, err := l.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	s := r.GetStats()
	if s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || s.GetMemory().GetUsageBytes().GetValue() == 0 || s.GetCpu().GetPsi() == nil || s.GetMemory().GetPsi() == nil {
		t.Errorf("the container's figures: %v", s)
	}
	p, err := l.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID})
	if err != nil {
		t.Fatal(err)
	}
	linux := p.GetStats().GetLinux()
	if linux.GetMemory().GetUsageBytes().GetValue() < s.GetMemory().GetUsageBytes().GetValue()/2 || linux.GetProcess().GetProcessCount().GetValue() != 2 { // with the unit's own
		t.Errorf("the pod's figures: %v", linux)
	}
}

// TestOwnSlice: a pod without a parent is in Sampan's slice.
func TestOwnSlice(t *testing.T) {
	l := newLab(t)
	needSystemd(t, l)
	_, id := container(t, l, l.PodConfig("own"), nil, "sleep", "1000")
	controller := ""
	if host.CgroupMode() != host.CgroupV2 {
		controller = "memory"
	}
	if at := cgroup(t, pid(t, l, id), controller); !strings.Contains(at, "/sampan.slice/sampan-pod-") {
		t.Errorf("it is in %s", at)
	}
}

// TestRestart: pods outlive restarts of the daemon's unit, its stop, and its
// death; nothing that they write is lost.
func TestRestart(t *testing.T) {
	l := newLab(t)
	config := l.PodConfig("restart")
	_, id := container(t, l, config, nil, "sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done")
	before := pid(t, l, id)
	for _, step := range [][]string{
		{"restart", lab.Unit}, {"stop", lab.Unit}, {"start", lab.Unit},
		{"kill", "--kill-who=main", "--signal=KILL", lab.Unit}, {"daemon-reexec"}, {"restart", lab.Unit},
	} {
		systemctl(t, step...)
		if step[0] == "stop" {
			time.Sleep(3 * time.Second)
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", before)); err != nil {
				t.Fatalf("the container did not outlive the daemon's stop: %v", err)
			}
			continue
		}
		if step[0] == "kill" {
			time.Sleep(2 * time.Second) // systemd starts it after one
			if err := lab.AwaitUnit(lab.Unit, "ActiveState", "active", 2*time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		if now := pid(t, l, id); now != before {
			t.Fatalf("after %v its pid is %d, it was %d", step, now, before)
		}
		if out := l.ExecSync(t, id, "echo", "hello"); string(out.GetStdout()) != "hello\n" {
			t.Errorf("after %v: exec: %v", step, out)
		}
	}
	number := 0
	for line := range strings.Lines(read(t, config.LogDirectory, "main.log")) {
		if want := fmt.Sprintf(" line %d", number); !strings.HasSuffix(strings.TrimSpace(line), want) {
			t.Fatalf("the log has %q, want%s", line, want)
		}
		number++
	}
	if number < 20 {
		t.Errorf("the log has %d lines", number)
	}
}

// TestKeeperKilled: containers outlive each of the keeper's processes and both,
// and their exits are told.
func TestKeeperKilled(t *testing.T) {
	l := newLab(t)
	config := l.PodConfig("keeper")
	podID, id := container(t, l, config, nil, "sleep", "1000")
	before := pid(t, l, id)
	for _, roles := range [][]string{{"worker"}, {"supervisor"}, {"supervisor", "worker"}} {
		for _, role := range roles {
			for _, p := range l.Keepers(t, role) {
				if err := unix.Kill(p, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(2 * time.Second)
		if now := pid(t, l, id); now != before {
			t.Fatalf("after the death of %v its pid is %d, it was %d", roles, now, before)
		}
		l.ExecSync(t, id, "true")
		c := l.ContainerConfig("short", busybox, "sh", "-c", "exit 7")
		short := l.CreateContainer(t, podID, config, c)
		l.StartContainer(t, short)
		if s := l.AwaitExit(t, short, lab.Wait); s.GetExitCode() != 7 {
			t.Errorf("after the death of %v: %v", roles, s)
		}
		if _, err := l.Runtime.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: short}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOOM: each kill for want of memory is told as one. With systemd others lose
// some: a scope takes its counters along.
func TestOOM(t *testing.T) {
	l := newLab(t)
	config := l.PodConfig("oom")
	l.Pull(t, busybox)
	podID := l.RunPod(t, config)
	kills := 100
	if testing.Short() {
		kills = 10
	}
	for i := range kills {
		id := addContainer(t, l, podID, config, func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
		}, "sh", "-c", "x=0123456789abcdef; while :; do x=$x$x; done")
		if s := l.AwaitExit(t, id, lab.Wait); s.GetReason() != "OOMKilled" || s.GetExitCode() != 137 {
			t.Fatalf("kill %d: %v", i, s)
		}
		if _, err := l.Runtime.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Printf("%d containers were killed for want of memory, all of them told so\n", kills)
}

// TestSliceStopped: the kubelet ends a pod's slice, and with it everything in it,
// without asking anybody.
func TestSliceStopped(t *testing.T) {
	l := newLab(t)
	needSystemd(t, l)
	slice := podSlice(t, "b2")
	config := l.PodConfig("slice")
	config.Linux.CgroupParent = slice
	podID, id := container(t, l, config, nil, "sleep", "1000")
	systemctl(t, "stop", slice)
	if s := l.AwaitExit(t, id, lab.Wait); s.GetExitCode() == 0 {
		t.Errorf("exited as %v", s)
	}
	l.RemovePod(t, podID)
}
