// Package host talks to the kernel on behalf of the rest of Sampan: process
// identities, namespaces, mounts, cgroup layout, probes. It knows no word of
// the CRI and keeps no state of its own.
//
// Setns and unshare happen here and nowhere else, on locked OS threads that
// are thrown away afterwards.
package host

import (
	"fmt"
	"os"
	"strings"
	"sync"
)

// BootID names the current boot of the kernel. Facts recorded under another
// boot id (pids, namespaces, mounts) are void.
func BootID() string { return bootID() }

var bootID = sync.OnceValue(func() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		// Without /proc nothing works; a constant keeps records readable.
		return "unknown"
	}
	return strings.TrimSpace(string(data))
})

// WriteSysctl sets a sysctl, named by its path below /proc/sys or, without any
// slash, with dots between its parts, as seen by the calling thread's namespaces.
func WriteSysctl(name, value string) error {
	path := name
	if !strings.Contains(name, "/") {
		path = strings.ReplaceAll(name, ".", "/")
	}
	f, err := os.OpenFile("/proc/sys/"+path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set sysctl %s to %q: %w", name, value, err)
	}
	return nil
}
