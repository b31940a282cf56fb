package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// VolumePaths looks at paths that may be on a volume whose server is gone. A process
// that waits for such a file system cannot be killed, so the calling process must
// not: a program made for that does, and is left behind if it hangs, to end when
// the volume lets go.
//
// The zero VolumePaths has the calling process look for itself.
type VolumePaths struct {
	Program string // cmd/sampan-init
}

// Follow returns each of the paths without symbolic links. If one fails the error
// is a *fs.PathError that names it, and those before it are returned. When ctx
// ends, its cause is the error.
func (v VolumePaths) Follow(ctx context.Context, paths ...string) ([]string, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	if v.Program == "" {
		var real []string
		for _, path := range paths {
			r, err := filepath.EvalSymlinks(path)
			if err != nil {
				return real, err
			}
			real = append(real, r)
		}
		return real, nil
	}
	out, err := v.run(ctx, append([]string{"follow"}, paths...)...)
	real := strings.Split(out, "\x00")
	real = real[:len(real)-1]
	var errno syscall.Errno
	if errors.As(err, &errno) && len(real) < len(paths) {
		err = &os.PathError{Op: "follow", Path: paths[len(real)], Err: errno}
	}
	if err == nil && len(real) != len(paths) {
		err = fmt.Errorf("%s follow: %d paths came back for %d", v.Program, len(real), len(paths))
	}
	return real, err
}

// MapIDs is nil if each of the paths can be mounted with the ids of the user namespace
// at userns. Otherwise the error is as that of Follow, with the cause as IDMapped has it.
func (v VolumePaths) MapIDs(ctx context.Context, userns string, paths ...string) error {
	if len(paths) == 0 {
		return nil
	}
	if v.Program == "" {
		for _, path := range paths {
			tree, err := IDMapped(path, userns, 0)
			if err != nil {
				return &os.PathError{Op: "map ids", Path: path, Err: err}
			}
			tree.Close()
		}
		return nil
	}
	out, err := v.run(ctx, append([]string{"map", userns}, paths...)...)
	done := strings.Count(out, "\x00")
	var errno syscall.Errno
	if errors.As(err, &errno) && done < len(paths) {
		err = &os.PathError{Op: "map ids", Path: paths[done], Err: errno}
	}
	return err
}

// MakeDirs makes a directory and what is missing above it, with mode 0755.
func (v VolumePaths) MakeDirs(ctx context.Context, path string) error {
	if v.Program == "" {
		return os.MkdirAll(path, 0o755)
	}
	if isCachedDir(path) {
		return nil
	}
	_, err := v.run(ctx, "mkdirs", path)
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return &os.PathError{Op: "mkdir", Path: path, Err: errno}
	}
	return err
}

const resolveCached = 0x20 // RESOLVE_CACHED of <linux/openat2.h>, which unix lacks; Linux 5.12

// isCachedDir reports whether the kernel knows, without asking any file system,
// that path is a directory.
func isCachedDir(path string) bool {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolveCached})
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// run returns what the program printed. Its exit code, if not 0, is the error, a
// syscall.Errno.
func (v VolumePaths) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.Command(v.Program, args...)
	cmd.Dir = "/"
	cmd.Env = []string{}
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	ended := make(chan error, 1)
	// It stays as long as the program does, which only the volume can end.
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			err = syscall.Errno(exit.ExitCode())
		}
		return out.String(), err
	case <-ctx.Done():
		_ = cmd.Process.Kill() // it may have ended
		return "", context.Cause(ctx)
	}
}
