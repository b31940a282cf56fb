package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// LimitsNothing reports whether a hierarchy of cgroup v1, by its controller, only
// groups processes, so that a container can do without.
func LimitsNothing(controller string) bool {
	return controller == "" || controller == "misc" || strings.HasPrefix(controller, "name=")
}

// Make makes the directories of a cgroup of v1, and those above it, ready for
// processes. What is there is left as it is. It does what libcontainer does, in a
// fifth of the time.
func (c Cgroup) Make() error {
	for controller, dir := range c {
		var err error
		if controller == "cpuset" {
			err = makeCpuset(dir)
		} else {
			err = makeCgroupDir(dir)
		}
		if err != nil && !LimitsNothing(controller) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	return nil
}

func makeCgroupDir(dir string) error { return mkdir(dir, makeCgroupDir) }

// mkdir makes a directory, after the one above by above if that is not there.
func mkdir(dir string, above func(string) error) error {
	err := unix.Mkdir(dir, 0o755)
	if errors.Is(err, unix.ENOENT) {
		if err := above(filepath.Dir(dir)); err != nil {
			return err
		}
		err = unix.Mkdir(dir, 0o755)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return &fs.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	return nil
}

// cpusetFiles are empty in a new directory, and then no process may enter it.
var cpusetFiles = []string{"cpuset.cpus", "cpuset.mems"}

// makeCpuset gives a new directory the processors and memory of the one above. To
// write them makes the kernel look at all cpusets there are, so those made below
// a directory that is new itself get them from the kernel as they are made.
func makeCpuset(dir string) error {
	if err := mkdir(dir, func(parent string) error {
		if err := makeCpuset(parent); err != nil {
			return err
		}
		return writeNow(filepath.Join(parent, "cgroup.clone_children"), []byte("1"))
	}); err != nil {
		return err
	}
	for _, name := range cpusetFiles {
		if err := inherit(dir, name); err != nil {
			return err
		}
	}
	return nil
}

// inherit copies a file that is empty from the directory above, where it may have to
// be copied to first.
func inherit(dir, name string) error {
	path, parent := filepath.Join(dir, name), filepath.Dir(dir)
	own, err := readNow(path)
	if err != nil || len(bytes.TrimSpace(own)) > 0 {
		return err
	}
	above, err := readNow(filepath.Join(parent, name))
	if err != nil {
		return err // also at the top, which is never empty
	}
	if len(bytes.TrimSpace(above)) == 0 {
		if err := inherit(parent, name); err != nil {
			return err
		}
		if above, err = readNow(filepath.Join(parent, name)); err != nil {
			return err
		}
	}
	return writeNow(path, bytes.TrimSpace(above))
}

// writeNow writes to a file of the kernel's, which never blocks.
func writeNow(path string, data []byte) error {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := retry(func() (int, error) { return unix.Write(fd, data) }); err != nil {
		return &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}
