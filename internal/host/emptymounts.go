package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// EmptyMounts returns a descriptor of a new mount namespace in which there is
// nothing but a read-only directory with an empty one in it, called name. To be born
// in a new mount namespace takes the longer the more mounts the parent's has; a copy
// of this one takes no time.
func EmptyMounts(name string) (int, error) {
	fd := -1
	err := onThread(func() (err error) {
		fd, err = emptyMounts(name)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("make empty mount namespace: %w", err)
	}
	return fd, nil
}

// emptyMounts has the calling thread enter the namespace it makes.
func emptyMounts(name string) (int, error) {
	if err := hideMounts(); err != nil {
		return -1, err
	}
	fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(rejoin(fd), leaveMounts(name)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// rejoin fails if whoever joins the calling thread's mount namespace has another root
// than the thread: then paths would mean other files there.
func rejoin(mounts int) error {
	var before, after unix.Stat_t
	if err := unix.Stat("/", &before); err != nil {
		return os.NewSyscallError("stat", err)
	}
	if err := unix.Setns(mounts, unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("setns", err)
	}
	if err := unix.Stat("/", &after); err != nil {
		return os.NewSyscallError("stat", err)
	}
	if before.Dev != after.Dev || before.Ino != after.Ino {
		return errors.New("the root directory is not that of the mount namespace")
	}
	return nil
}

// leaveMounts gives the calling thread an empty root and takes all other mounts off.
func leaveMounts(name string) error {
	empty, err := emptyDir(name)
	if err != nil {
		return err
	}
	defer unix.Close(empty)
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(old)
	if err := unix.MoveMount(empty, "", old, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	if err := unix.Fchdir(empty); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	// The old root lies on top of the new one now.
	if err := unix.Fchdir(old); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	return os.NewSyscallError("umount", unix.Unmount(".", unix.MNT_DETACH))
}

// emptyDir returns a detached, read-only mount of a directory with an empty one in it.
func emptyDir(name string) (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	for key, value := range map[string]string{"size": "4k", "nr_inodes": "2", "mode": "700"} {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return -1, os.NewSyscallError("fsconfig "+key, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, os.NewSyscallError("fsconfig", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsmount", err)
	}
	err = unix.Mkdirat(mount, name, 0o700)
	if err == nil {
		err = unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		unix.Close(mount)
		return -1, fmt.Errorf("directory %s: %w", name, err)
	}
	return mount, nil
}
