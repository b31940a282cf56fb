package cni

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
	"sampan.dev/sampan/internal/state"
)

// fake is a plugin that notes how it is called and does what the test says.
type fake struct {
	*bench
	notes string // a directory
}

const fakePlugin = `#!/bin/sh
cat > NOTES/$CNI_COMMAND.stdin
[ $CNI_COMMAND = VERSION ] || echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_ARGS" >> NOTES/calls
if [ -e NOTES/fail-$CNI_COMMAND ]; then
	echo '{"cniVersion": "1.1.0", "code": 50, "msg": "no luck today"}'
	exit 1
fi
if [ -e NOTES/hang-$CNI_COMMAND ]; then
	sleep 1000 &
	echo $! > NOTES/child
	wait
fi
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:07", "sandbox": "'$CNI_NETNS'"}],
	"ips": [{"address": "10.9.0.7/24", "interface": 0}], "dns": {"nameservers": ["10.9.0.1"]}}' ;;
VERSION) echo '{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}' ;;
esac
`

func newFake(t *testing.T, version string) *fake {
	t.Helper()
	b := newBench(t)
	f := &fake{bench: b, notes: t.TempDir()}
	if err := os.MkdirAll(b.binDirs[0], 0o755); err != nil {
		t.Fatal(err)
	}
	script := strings.ReplaceAll(fakePlugin, "NOTES", f.notes)
	if err := os.WriteFile(filepath.Join(b.binDirs[0], "fake"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	b.configure(t, "10-fake.conflist", `{"cniVersion": "`+version+`", "name": "fakenet", "plugins": [
		{"type": "fake", "capabilities": {"portMappings": true, "bandwidth": true, "ipRanges": true, "io.kubernetes.cri.pod-annotations": true}}]}`)
	return f
}

// will makes the plugin fail or hang in a command; wont takes it back.
func (f *fake) will(t *testing.T, what string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(f.notes, what), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (f *fake) wont(t *testing.T, what string) {
	t.Helper()
	if err := os.Remove(filepath.Join(f.notes, what)); err != nil {
		t.Fatal(err)
	}
}

// calls lists the commands the plugin was called with so far.
func (f *fake) calls() string {
	data, _ := os.ReadFile(filepath.Join(f.notes, "calls"))
	var commands []string
	for line := range strings.Lines(string(data)) {
		commands = append(commands, strings.Fields(line)[0])
	}
	return strings.Join(commands, " ")
}

// stdin is the configuration the plugin got for a command.
func (f *fake) stdin(t *testing.T, command string) map[string]any {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(f.notes, command+".stdin"))
	if err != nil {
		t.Fatal(err)
	}
	var conf map[string]any
	if err := json.Unmarshal(data, &conf); err != nil {
		t.Fatal(err)
	}
	return conf
}

func TestWhatPluginsAreTold(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod := f.NewPod(t, network.PortMapping{Protocol: network.UDP, ContainerPort: 53, HostPort: 5353})
	pod.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "a": "b"}
	at := networktest.Attach(t, n, pod)
	if len(at.IPs) != 1 || at.IPs[0].String() != "10.9.0.7" || at.MAC.String() != "02:00:00:00:00:07" || len(at.DNS.Nameservers) != 1 {
		t.Errorf("got %+v", at)
	}
	told, err := json.Marshal(f.stdin(t, "ADD")["runtimeConfig"])
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"bandwidth":{"ingressBurst":2147483647,"ingressRate":10000000},` +
		`"io.kubernetes.cri.pod-annotations":{"a":"b","kubernetes.io/ingress-bandwidth":"10M"},` +
		`"portMappings":[{"containerPort":53,"hostIP":"","hostPort":5353,"protocol":"udp"}]}`
	if string(told) != want {
		t.Errorf("got  %s\nwant %s", told, want)
	}
	calls, err := os.ReadFile(filepath.Join(f.notes, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{pod.ID, pod.NetNS, "K8S_POD_NAMESPACE=default", "K8S_POD_NAME=" + pod.Name, "K8S_POD_UID=" + pod.UID, "IgnoreUnknown=1"} {
		if !strings.Contains(string(calls), s) {
			t.Errorf("the plugin was not told %q: %s", s, calls)
		}
	}
}

func TestAddFails(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod := f.NewPod(t)
	f.will(t, "fail-ADD")
	if _, err := n.Attach(t.Context(), pod); err == nil || !strings.Contains(err.Error(), "no luck today") {
		t.Fatalf("got %v, want the plugin's words", err)
	}
	if n.Holds(pod.ID) || f.calls() != "ADD DEL" {
		t.Errorf("held: %v, calls: %s", n.Holds(pod.ID), f.calls())
	}
}

// A plugin that fails to undo is asked again until it does, in the next process
// too, and the pod's host ports stay taken meanwhile.
func TestDelFails(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod := f.NewPod(t, network.PortMapping{Protocol: network.TCP, ContainerPort: 80, HostPort: 8080})
	if _, err := n.Attach(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	f.will(t, "fail-DEL")
	if err := n.Detach(t.Context(), pod.ID); err == nil || !strings.Contains(err.Error(), "no luck today") {
		t.Fatalf("got %v, want the plugin's words", err)
	}
	other := f.NewPod(t, pod.PortMappings...)
	if _, err := n.Attach(t.Context(), other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the port of a pod that could not leave is given away: %v", err)
	}
	if _, err := n.Attach(t.Context(), pod); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a leaving pod is attached: %v", err)
	}
	n.Close()

	f.Drop(t, pod.NetNS)
	next := f.open(t)
	if !next.Holds(pod.ID) {
		t.Fatal("the next process does not know the leaving pod")
	}
	f.wont(t, "fail-DEL")
	networktest.Eventually(t, "the pod is forgotten", func() bool { return !next.Holds(pod.ID) })
	if state.Exists(next.shelf.path(pod.ID)) {
		t.Error("the record is still there")
	}
	calls, err := os.ReadFile(filepath.Join(f.notes, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(calls), "DEL "+pod.ID+"  Ignore") {
		t.Errorf("the plugin was told of a namespace that is gone: %s", calls)
	}
}

func TestAddHangs(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod, other := f.NewPod(t), f.NewPod(t)
	f.will(t, "hang-ADD")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := n.Attach(ctx, pod)
		done <- err
	}()
	networktest.Eventually(t, "the plugin hangs", func() bool { return f.calls() == "ADD" })
	if err := n.Detach(t.Context(), other.ID); err != nil {
		t.Errorf("another pod is held up: %v", err)
	}
	if err := n.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("attach outlives its deadline")
	}
	if n.Holds(pod.ID) || f.calls() != "ADD DEL" {
		t.Errorf("held: %v, calls: %s", n.Holds(pod.ID), f.calls())
	}
	child, err := os.ReadFile(filepath.Join(f.notes, "child"))
	if err != nil {
		t.Fatal(err)
	}
	networktest.Eventually(t, "the plugin's child is gone", func() bool {
		cmdline, err := os.ReadFile("/proc/" + strings.TrimSpace(string(child)) + "/cmdline")
		return err != nil || len(cmdline) == 0
	})
}

// A process that dies while a plugin adds leaves a record without a result: the
// plugin may have given the pod an address. DEL comes before another ADD.
func TestCrashInAdd(t *testing.T) {
	for name, finish := range map[string]func(*testing.T, *Network, network.Pod) string{
		"retried": func(t *testing.T, n *Network, pod network.Pod) string {
			networktest.Attach(t, n, pod)
			return "ADD DEL ADD"
		},
		"swept": func(t *testing.T, n *Network, pod network.Pod) string {
			if err := n.Sweep(t.Context(), func(string) bool { return false }); err != nil {
				t.Fatal(err)
			}
			if n.Holds(pod.ID) {
				t.Error("the pod is still known")
			}
			return "ADD DEL"
		},
		"detached": func(t *testing.T, n *Network, pod network.Pod) string {
			if err := n.Detach(t.Context(), pod.ID); err != nil {
				t.Fatal(err)
			}
			return "ADD DEL"
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, "1.0.0")
			n := f.open(t)
			pod := f.NewPod(t)
			r, err := n.attach(t.Context(), pod)
			if err != nil {
				t.Fatal(err)
			}
			unfinished := *r
			unfinished.Result = nil
			if err := n.shelf.store(&unfinished); err != nil {
				t.Fatal(err)
			}
			if got, want := f.calls(), finish(t, f.open(t), pod); f.calls() != want {
				t.Errorf("calls: %s, then %s, want %s", got, f.calls(), want)
			}
		})
	}
}

// After a reboot the namespace is gone, but a plugin's address is still taken.
func TestRecordOfAnEarlierBoot(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod := f.NewPod(t)
	r, err := n.attach(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	old := *r
	old.Boot = "earlier"
	if err := n.shelf.store(&old); err != nil {
		t.Fatal(err)
	}
	networktest.Attach(t, f.open(t), pod)
	if f.calls() != "ADD DEL ADD" {
		t.Errorf("calls: %s", f.calls())
	}
}

func TestDamagedRecord(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	pod := f.NewPod(t)
	if _, err := n.Attach(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.shelf.path(pod.ID), []byte("sampan netw"), 0o600); err != nil {
		t.Fatal(err)
	}
	next := f.open(t)
	if err := next.Sweep(t.Context(), func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if f.calls() != "ADD DEL" || next.Holds(pod.ID) {
		t.Errorf("held: %v, calls: %s", next.Holds(pod.ID), f.calls())
	}
}

// A pod is detached with the configuration it was attached with.
func TestConfigurationChanges(t *testing.T) {
	f := newFake(t, "1.0.0")
	n := f.open(t)
	old := f.NewPod(t)
	if _, err := n.Attach(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	f.configure(t, "10-fake.conflist", `{"cniVersion": "1.0.0", "name": "newnet", "plugins": [{"type": "fake"}]}`)
	young := f.NewPod(t)
	networktest.Attach(t, n, young)
	if name := f.stdin(t, "ADD")["name"]; name != "newnet" {
		t.Errorf("a new pod is attached to %s", name)
	}
	if err := n.Detach(t.Context(), old.ID); err != nil {
		t.Fatal(err)
	}
	if name := f.stdin(t, "DEL")["name"]; name != "fakenet" {
		t.Errorf("the old pod is detached from %s", name)
	}
}

func TestPodCIDR(t *testing.T) {
	f := newFake(t, "1.0.0")
	if err := f.open(t).SetPodCIDR([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00::/64")}); err != nil {
		t.Fatal(err)
	}
	networktest.Attach(t, f.open(t), f.NewPod(t))
	told, err := json.Marshal(f.stdin(t, "ADD")["runtimeConfig"])
	if want := `{"ipRanges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00::/64"}]]}`; string(told) != want || err != nil {
		t.Errorf("got %s, %v; want %s", told, err, want)
	}
}

// Plugins of the specification 1.1 are told at Sweep which pods are left, and
// asked how they are.
func TestGarbageCollection(t *testing.T) {
	f := newFake(t, "1.1.0")
	n := f.open(t)
	live, dead := f.NewPod(t), f.NewPod(t)
	networktest.Attach(t, n, live)
	networktest.Attach(t, n, dead)
	next := f.open(t)
	if err := next.Sweep(t.Context(), func(id string) bool { return id == live.ID }); err != nil {
		t.Fatal(err)
	}
	valid, err := json.Marshal(f.stdin(t, "GC")["cni.dev/valid-attachments"])
	if want := `[{"containerID":"` + live.ID + `","ifname":"eth0"}]`; string(valid) != want || err != nil {
		t.Errorf("got %s, %v; want %s", valid, err, want)
	}
	if f.calls() != "ADD ADD DEL GC" {
		t.Errorf("calls: %s", f.calls())
	}
}

func TestStatus(t *testing.T) {
	f := newFake(t, "1.1.0")
	f.will(t, "fail-STATUS")
	n := f.open(t)
	networktest.Eventually(t, "the network is not ready", func() bool { return n.Ready() != nil })
	if err := n.Ready(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no luck today") {
		t.Errorf("got %v", err)
	}
	f.wont(t, "fail-STATUS")
	n.status.asked = time.Time{}
	networktest.Eventually(t, "the network is ready", func() bool { return n.Ready() == nil })
}

func TestReady(t *testing.T) {
	b := newBench(t)
	n := b.open(t)
	check := func(words string) {
		t.Helper()
		err := n.Ready()
		if words == "" {
			if err != nil || !n.Configured() {
				t.Errorf("got %v, want ready", err)
			}
			return
		}
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("got %v, want unavailable with %q", err, words)
		}
		if _, err := n.Attach(t.Context(), b.NewPod(t)); err == nil {
			t.Error("a pod is attached")
		}
	}
	check("no cni configuration in " + b.confDir)
	if n.Configured() {
		t.Error("configured without a directory")
	}
	b.configure(t, "10-x.conflist", `{`)
	check("10-x.conflist")
	b.configure(t, "10-x.conflist", `{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "absent"}]}`)
	check(`"absent"`)
	b.configure(t, "05-y.conf", `{"cniVersion": "1.0.0", "name": "y", "type": "loopback"}`)
	b.binDirs = nil
	if _, err := os.Stat(filepath.Join(debian, "loopback")); err != nil {
		t.Skipf("package containernetworking-plugins is not installed: %v", err)
	}
	check("")
	if err := os.RemoveAll(b.confDir); err != nil {
		t.Fatal(err)
	}
	check("no cni configuration")
}

func FuzzParseResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}], "ips": [{"address": "10.9.0.7/24", "interface": 0}]}`))
	f.Add([]byte(`{"cniVersion": "0.2.0", "ip4": {"ip": "10.9.0.7/24"}, "ip6": {"ip": "fd00::7/64"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		res, err := parseResult(data)
		if err == nil && len(res.IPs) == 0 {
			t.Error("a result without an address")
		}
	})
}
