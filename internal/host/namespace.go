package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
)

// Namespaces asks for new namespaces, each pinned by a bind mount on a file so
// that it lives without a process. An empty path means: do not make that one.
type Namespaces struct {
	Net, IPC, UTS string            // absolute paths; their directories must exist
	Hostname      string            // set in the new UTS namespace
	Sysctls       map[string]string // applied inside the new namespaces

	// User is a user namespace, which then owns the others; UIDs and GIDs are its
	// ids, Holder is the path of sampan-init, which makes it.
	User       string
	UIDs, GIDs []IDRange
	Holder     string
}

// Create makes and pins the namespaces. On error none of them stays. Pins that
// a killed Create left behind are replaced.
func (n Namespaces) Create() error {
	err := onThread(n.create)
	if err != nil {
		return errors.Join(fmt.Errorf("create namespaces: %w", err), n.Remove())
	}
	return nil
}

// Remove unpins the namespaces; they go when their last process is gone. What
// is absent already is no error.
func (n Namespaces) Remove() error {
	var errs []error
	for _, pin := range n.pins() {
		errs = append(errs, Unpin(pin.path))
	}
	return errors.Join(errs...)
}

type pin struct {
	path, name string
	flag       int
}

func (n Namespaces) pins() []pin {
	var pins []pin
	for _, p := range []pin{{n.Net, "net", unix.CLONE_NEWNET}, {n.IPC, "ipc", unix.CLONE_NEWIPC}, {n.UTS, "uts", unix.CLONE_NEWUTS}, {n.User, "user", 0}} {
		if p.path != "" {
			pins = append(pins, p)
		}
	}
	return pins
}

// create runs on a thread of its own.
func (n Namespaces) create() error {
	flags := 0
	for _, p := range n.pins() {
		flags |= p.flag
	}
	if n.User == "" {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		return n.furnish("/proc/thread-self/ns/")
	}
	return inUserNamespace(n.Holder, n.UIDs, n.GIDs, flags, func(pid int) error {
		process, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return fmt.Errorf("open process %d: %w", pid, err)
		}
		defer unix.Close(process)
		// Into all but the user namespace, which no thread of ours can join.
		if err := unix.Setns(process, flags); err != nil && flags != 0 {
			return fmt.Errorf("join namespaces: %w", err)
		}
		return n.furnish(procNS(pid, ""))
	})
}

// furnish sets up the namespaces, which the calling thread is in, and pins those
// that are in the directory dir.
func (n Namespaces) furnish(dir string) error {
	if n.UTS != "" && n.Hostname != "" {
		if err := unix.Sethostname([]byte(n.Hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", n.Hostname, err)
		}
	}
	if err := n.writeSysctls(); err != nil {
		return err
	}
	for _, p := range n.pins() {
		if err := Pin(dir+p.name, p.path); err != nil {
			return err
		}
	}
	return nil
}

// writeSysctls writes the sysctls of the namespaces that the calling thread is in.
// Those of an IPC namespace are its owner's root's alone to write, no capability
// helps.
func (n Namespaces) writeSysctls() error {
	for name, value := range n.Sysctls {
		err := WriteSysctl(name, value)
		if n.User != "" && errors.Is(err, unix.EACCES) {
			err = asUser(n.UIDs[0].Outside, func() error { return WriteSysctl(name, value) })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Pin keeps the namespace at source, a file in /proc/PID/ns, alive by a bind mount
// on target. A pin that stands there is replaced.
func Pin(source, target string) error {
	if err := Unpin(target); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("pin namespace: %w", err)
	}
	f.Close()
	fault.Point("namespace.pin-file-made")
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin namespace on %s: %w", target, err)
	}
	fault.Point("namespace.pinned")
	return nil
}

// Unpin removes a namespace's pin and its file; absent is fine.
func Unpin(path string) error {
	if err := Unmount(path); err != nil {
		return err
	}
	fault.Point("namespace.unmounted")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin namespace: %w", err)
	}
	return nil
}

// Pinned reports whether a namespace is pinned on path.
func Pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// InNetNS runs fn on a thread of its own inside the network namespace pinned at
// path. Sockets fn makes stay in that namespace. Goroutines that fn starts do
// not run there.
func InNetNS(path string, fn func() error) error {
	return onThread(func() error {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", filepath.Base(path), err)
		}
		return fn()
	})
}

// onThread runs fn on an OS thread that ends with it, so that nothing fn did to
// the thread's namespaces is seen by anybody else. The main thread cannot end
// and shows its namespaces as the process's own: it is never taken.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Hold the main thread while another goroutine finds another.
			done <- onThread(fn)
			runtime.UnlockOSThread()
			return
		}
		done <- fn() // no UnlockOSThread: the runtime ends the thread
	}()
	return <-done
}
