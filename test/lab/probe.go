package lab

import (
	"fmt"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// ProbeUserNamespaces is nil if this host can give a container all that it needs in a
// user namespace. What kernels learned last of it, in Linux 6.3, is to map the ids of a
// tmpfs: that is tried, without the daemon.
func ProbeUserNamespaces(t testing.TB) error {
	t.Helper()
	dir := SmallDisk(t, "size=64k")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1 << 16, Size: 1}}
	holder := exec.Command("sleep", "1000")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	if err := holder.Start(); err != nil {
		return fmt.Errorf("make a user namespace: %w", err)
	}
	defer holder.Wait() //nolint:errcheck // killed
	defer holder.Process.Kill()
	mapped, err := host.IDMapped(dir, fmt.Sprintf("/proc/%d/ns/user", holder.Process.Pid), 0)
	if err != nil {
		return fmt.Errorf("on tmpfs: %w", err)
	}
	return mapped.Close()
}
