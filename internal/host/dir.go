package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// InDir runs fn on a thread of its own whose working directory is dir, for
// system calls that take many paths in little space. Goroutines that fn starts
// do not run there.
func InDir(dir string, fn func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare working directory: %w", err)
		}
		// Not os.Chdir: it would also tell the Go runtime, for the whole process.
		if err := unix.Chdir(dir); err != nil {
			return fmt.Errorf("change to directory %s: %w", dir, err)
		}
		return fn()
	})
}

// InOwnMounts runs fn on a thread of its own with a mount namespace of its own, to
// which comes what is mounted on the host, but not the other way round. Processes
// that fn starts have it too; goroutines do not.
func InOwnMounts(fn func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mounts: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("make mounts a slave of the host's: %w", err)
		}
		return fn()
	})
}
