package host

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// IDRange is a range of user or group ids in a user namespace, and what they are
// outside of it.
type IDRange struct{ Inside, Outside, Size uint32 }

// Outside returns what an id of a user namespace is outside, and false if the namespace
// has no such id.
func Outside(ids []IDRange, inside uint32) (uint32, bool) {
	for _, r := range ids {
		if inside >= r.Inside && inside-r.Inside < r.Size {
			return r.Outside + (inside - r.Inside), true
		}
	}
	return 0, false
}

// IDsOf returns the ids of the user namespace that a process is in, none if it is
// the caller's.
func IDsOf(pid int) (uids, gids []IDRange, err error) {
	dir := "/proc/" + strconv.Itoa(pid)
	theirs, err := os.Readlink(dir + "/ns/user")
	if err != nil {
		return nil, nil, fmt.Errorf("user namespace of process %d: %w", pid, err)
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil || theirs == ours {
		return nil, nil, err
	}
	if uids, err = readIDs(dir + "/uid_map"); err != nil {
		return nil, nil, fmt.Errorf("ids of process %d: %w", pid, err)
	}
	if gids, err = readIDs(dir + "/gid_map"); err != nil {
		return nil, nil, fmt.Errorf("ids of process %d: %w", pid, err)
	}
	return uids, gids, nil
}

func readIDs(path string) ([]IDRange, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var ids []IDRange
	for line := range strings.Lines(string(data)) {
		var r IDRange
		if _, err := fmt.Sscan(line, &r.Inside, &r.Outside, &r.Size); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", path, line, err)
		}
		ids = append(ids, r)
	}
	return ids, nil
}

// holdTime bounds how long the kernel may take to make namespaces.
const holdTime = 10 * time.Second

// inUserNamespace makes a user namespace with these ids, and, owned by it, one
// more for each of flags (CLONE_NEWNET, ...). All of them are those of the process
// that fn gets, which ends when fn returns, or this process does.
//
// The kernel gives a new user namespace only to a process with a single thread, and
// a fork of ours would copy all its memory's page tables. So there is a program
// that does nothing else: holder is the path of sampan-init.
func inUserNamespace(holder string, uids, gids []IDRange, flags int, fn func(pid int) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make user namespace: %w", err)
		}
	}()
	stdin, release, err := os.Pipe()
	if err != nil {
		return err
	}
	defer release.Close()
	answer, stdout, err := os.Pipe()
	if err != nil {
		return errors.Join(err, stdin.Close())
	}
	defer answer.Close()
	process, err := os.StartProcess(holder, []string{"init", "hold", strconv.Itoa(flags | unix.CLONE_NEWUSER)}, &os.ProcAttr{
		Env: []string{}, Files: []*os.File{stdin, stdout, nil},
	})
	stdin.Close()
	stdout.Close()
	if err != nil {
		return err
	}
	err = awaitHolder(answer)
	if err == nil {
		err = writeIDs(process.Pid, uids, gids)
	}
	if err == nil {
		err = fn(process.Pid)
	}
	if kerr := process.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
		return errors.Join(err, kerr)
	}
	_, werr := process.Wait()
	return errors.Join(err, werr)
}

// awaitHolder waits for the byte that says that the namespaces are there, or why not.
func awaitHolder(answer *os.File) error {
	if err := answer.SetReadDeadline(time.Now().Add(holdTime)); err != nil {
		return err
	}
	var errno [1]byte
	switch _, err := answer.Read(errno[:]); {
	case errors.Is(err, io.EOF):
		return errors.New("its process has died")
	case err != nil:
		return err
	}
	switch err := unix.Errno(errno[0]); err {
	case 0:
		return nil
	case unix.ENOSPC, unix.EUSERS:
		return fmt.Errorf("there are as many as /proc/sys/user/max_*_namespaces allow: %w", err)
	default:
		return err
	}
}

func writeIDs(pid int, uids, gids []IDRange) error {
	for file, list := range map[string][]IDRange{"uid_map": uids, "gid_map": gids} {
		var b strings.Builder
		for _, r := range list {
			fmt.Fprintf(&b, "%d %d %d\n", r.Inside, r.Outside, r.Size)
		}
		if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/"+file, []byte(b.String()), 0); err != nil {
			return fmt.Errorf("ids %v: %w", list, err)
		}
	}
	return nil
}

// IDMapped returns the directory or file at path as a mount of its own that is not
// mounted anywhere yet. What belongs to id N on the file system belongs to whoever N
// is in the user namespace at userns, a file of /proc/PID/ns or a pin. Mounts below
// path are not part of it. It goes when it is closed, unless it was attached.
// Attributes are those of a mount that it has beside, such as MOUNT_ATTR_RDONLY.
//
// The error is EINVAL if the file system cannot do that, and EPERM if the mount
// at path is of this kind already.
func IDMapped(path, userns string, attributes uint64) (*os.File, error) {
	ns, err := os.Open(userns)
	if err != nil {
		return nil, fmt.Errorf("map the ids of %s: %w", path, err)
	}
	defer ns.Close()
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("map the ids of %s: %w", path, err)
	}
	tree := os.NewFile(uintptr(fd), path)
	if err := mapIDs(tree, ns, attributes); err != nil {
		tree.Close()
		return nil, fmt.Errorf("map the ids of %s: %w", path, err)
	}
	return tree, nil
}

func mapIDs(mount, userns *os.File, attributes uint64) error {
	return unix.MountSetattr(int(mount.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_IDMAP | attributes, Userns_fd: uint64(userns.Fd()),
	})
}

// Attach mounts what IDMapped has returned on target, which exists.
func Attach(mount *os.File, target string) error {
	if err := unix.MoveMount(int(mount.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount on %s: %w", target, err)
	}
	return nil
}

// ProbeUserNamespaces is nil if containers can have user namespaces with root file
// systems and volumes below dir: if such a namespace can be made, if ids can be
// mapped on the file system of dir and on tmpfs, and if overlayfs can be mounted
// on what has mapped ids. All of it is tried, in a mount namespace that nobody else
// sees; nothing is left, whatever happens. Holder is the path of sampan-init.
func ProbeUserNamespaces(dir, holder string) error {
	ids := []IDRange{{0, probeID, 1}}
	return inUserNamespace(holder, ids, ids, 0, func(pid int) error {
		userns := procNS(pid, "user")
		tree, err := IDMapped(dir, userns, unix.MOUNT_ATTR_RDONLY)
		if err != nil {
			return err
		}
		defer tree.Close()
		return onThread(func() error {
			if err := hideMounts(); err != nil {
				return err
			}
			if err := unix.Mount("none", dir, "tmpfs", 0, "mode=755,size=64k"); err != nil {
				return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
			}
			inMemory, err := IDMapped(dir, userns, 0)
			if err != nil {
				return fmt.Errorf("tmpfs: %w", err)
			}
			inMemory.Close()
			return probeOverlay(dir, tree)
		})
	})
}

// probeID is what the probe maps root to: some user who is not root.
const probeID = 1 << 16

// hideMounts gives the calling thread mounts of its own, whose changes nobody sees.
func hideMounts() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}

// probeOverlay mounts tree as the lower directory of an overlay in dir, and looks whose
// the files are.
func probeOverlay(dir string, tree *os.File) error {
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("change to directory %s: %w", dir, err)
	}
	for _, d := range []string{"lower", "empty", "merged"} {
		if err := unix.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("make directory %s: %w", d, err)
		}
	}
	if err := Attach(tree, "lower"); err != nil {
		return err
	}
	if err := unix.Mount("overlay", "merged", "overlay", unix.MS_RDONLY, "lowerdir=lower:empty"); err != nil {
		return fmt.Errorf("mount overlayfs on a directory with mapped ids: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat("merged", &st); err != nil {
		return fmt.Errorf("look into overlayfs on a directory with mapped ids: %w", err)
	}
	if st.Uid != probeID {
		return fmt.Errorf("overlayfs does not see mapped ids: what is root's, and should be user %d's, is user %d's", probeID, st.Uid)
	}
	return nil
}

func procNS(pid int, kind string) string {
	return "/proc/" + strconv.Itoa(pid) + "/ns/" + kind
}

// asUser runs fn on the calling thread as a user who is not root.
func asUser(uid uint32, fn func() error) error {
	// The change clears, for the whole process, the flag that it may be looked into
	// by its own user.
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("become user %d: %w", uid, err)
	}
	if err := setEffectiveUser(uid); err != nil {
		return fmt.Errorf("become user %d: %w", uid, err)
	}
	err = fn()
	if back := setEffectiveUser(0); back != nil {
		return errors.Join(err, fmt.Errorf("become root again: %w", back))
	}
	if back := unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(dumpable), 0, 0, 0); back != nil {
		err = errors.Join(err, fmt.Errorf("set dumpable to %d: %w", dumpable, back))
	}
	return err
}

// setEffectiveUser changes the calling thread alone; package unix changes all.
func setEffectiveUser(uid uint32) error {
	const same = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
		return errno
	}
	return nil
}
