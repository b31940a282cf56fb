package host

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
)

// ReadyAttach makes the kernel ready for moving processes between cgroups. The
// first move after a quiet time waits for an RCU grace period, some 15 ms, and
// those shortly after do not; so whoever is going to move one calls this first
// and does other work meanwhile. The returned function waits until the kernel is
// ready.
func ReadyAttach() (wait func()) {
	var moving sync.WaitGroup
	moving.Go(func() {
		// Move this process to where it is already; if that fails, the next
		// move pays. A process that was moved since home was found stays.
		h := home()
		if now, err := os.ReadFile(selfCgroup); err == nil && h.procs != "" && bytes.Equal(now, h.cgroup) {
			_ = os.WriteFile(h.procs, []byte("0"), 0)
		}
	})
	return moving.Wait
}

const selfCgroup = "/proc/self/cgroup"

// home is where this process is: the content of selfCgroup and the cgroup.procs
// of its cgroup in any one hierarchy, since one lock serves them all.
var home = sync.OnceValue(func() (h struct {
	cgroup []byte
	procs  string
}) {
	own, err := CgroupOf(os.Getpid())
	if err != nil {
		return h
	}
	if dirs := own.dirs(); len(dirs) > 0 {
		h.procs = filepath.Join(dirs[0], "cgroup.procs")
	}
	h.cgroup, _ = os.ReadFile(selfCgroup)
	return h
})
