package crash

import (
	"fmt"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// oomKills is how many containers are killed for want of memory, half of them in a
// child of their first process.
const (
	oomKills     = 20
	oomKillsLong = 1000
)

// TestOOM lets containers use more memory than they may, one after the other. Each
// must be reported as OOMKilled: with 137 if its first process was killed, and with
// that process' own code if it outlived its child.
func TestOOM(t *testing.T) {
	lab.Require(t)
	n := oomKills
	if *long {
		n = oomKillsLong
	}
	l := lab.New(t, lab.Options{})
	k := newKubelet(t, l)
	l.Pull(t, "busybox")
	podConfig := l.PodConfig("oom")
	pod := l.RunPod(t, podConfig)
	for i := range n {
		want, script := int32(137), "exec tail /dev/zero"
		if i%2 == 1 {
			want, script = 3, "tail /dev/zero; exit 3"
		}
		config := l.ContainerConfig(fmt.Sprint("eater-", i), "busybox", "sh", "-c", script)
		config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
		id, err := k.run(pod, podConfig, config)
		if err != nil {
			t.Fatal(err)
		}
		st, err := k.awaitExit(id)
		if err != nil {
			t.Fatal(err)
		}
		if st.GetReason() != "OOMKilled" || st.GetExitCode() != want {
			t.Errorf("container %d (%s): %s, code %d (%s); want OOMKilled, %d", i, script, st.GetReason(), st.GetExitCode(), st.GetMessage(), want)
		}
		if _, err := call(k, k.runtime.RemoveContainer, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
	l.RemovePod(t, pod)
	t.Logf("%d containers killed for want of memory, each reported so", n)
}
