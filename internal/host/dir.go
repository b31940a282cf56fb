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
