/*
 * sampan-launch is what a container's process is before it becomes the user's.
 * The keeper executes it, in new or in the container's PID namespace, with a plan
 * that says step by step what there is to do; it decides nothing itself. When a
 * step fails it tells which one and why, and exits.
 *
 * What a path in the container means is found out by the kernel, within the root
 * file system (openat2), and then only the descriptor is used. Mounts are made
 * detached, get their attributes, and are moved onto a descriptor: no other
 * process can slip in something else between a check and its use.
 *
 * It has no C library and allocates nothing. A function returns a descriptor or
 * 0, or -errno after having noted in failed what has failed.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <asm/ioctls.h>
#include <asm/termios.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/errno.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>

#include "sys.h"
#include "plan.h"

#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef MNT_DETACH
#define MNT_DETACH 2
#endif
#define UMASK_MOUNTPOINTS 022
#define EXIT_FAILED 255

/* What steps leave to those behind them. */
static int root = -1;       /* O_PATH: the container's root file system */
static int host_mounts = -1, own_mounts = -1; /* mount namespaces, from ROOT on */
static int64_t propagation; /* of what comes from the host */
static int mounted = -1;    /* the last mount */
static int masking = -1;    /* an empty, read-only tmpfs over a masked directory */
static char **environment;  /* with room for one more */
static char **arguments;
static const char *program; /* found by the name of arguments[0] */
static char program_path[PATH_MAX];
static char home[PATH_MAX];

/* What has failed, for the message. */
static const char *failed = "";
static char kernel_said[sizeof(((struct message *)0)->text)];

static long fail(const char *what, long error)
{
	failed = what;
	return error;
}

#define TRY(call, what)                            \
	do {                                       \
		long tried = (call);               \
		if (tried < 0)                     \
			return fail(what, tried);  \
	} while (0)

/* PASS is TRY for what has noted its failure itself. */
#define PASS(call)                      \
	do {                            \
		long passed = (call);   \
		if (passed < 0)         \
			return passed;  \
	} while (0)

static void close_fd(int fd)
{
	if (fd >= 0)
		sys(__NR_close, fd); /* nothing was written to it that could fail now */
}

static _Noreturn void quit(int status)
{
	for (;;)
		sys(__NR_exit_group, status);
}

/* string returns the nth string of a step, which has it: the keeper wrote it. */
static const char *string(const struct step *s, unsigned n)
{
	const char *p = s->tail;

	while (n--)
		p += length(p) + 1;
	return p;
}

/* data returns what is behind the strings of a step. */
static const void *data(const struct step *s)
{
	uintptr_t p = (uintptr_t)string(s, s->strings);

	return (const void *)((p + 7) & ~(uintptr_t)7);
}

static long send_message(uint32_t kind, uint32_t step, long error, const char *text, int fd)
{
	struct message m = {.kind = kind, .step = step, .error = (int32_t)error};
	struct iovec part = {.iov_base = &m, .iov_len = sizeof(m)};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} rights;
	struct msghdr h = {.msg_iov = &part, .msg_iovlen = 1};
	size_t n = length(text);

	memcpy(m.text, text, n < sizeof(m.text) ? n : sizeof(m.text) - 1);
	if (fd >= 0) {
		memset(&rights, 0, sizeof(rights));
		rights.header.cmsg_len = CMSG_LEN(sizeof(int));
		rights.header.cmsg_level = SOL_SOCKET;
		rights.header.cmsg_type = SCM_RIGHTS;
		memcpy(CMSG_DATA(&rights.header), &fd, sizeof(fd));
		h.msg_control = &rights;
		h.msg_controllen = sizeof(rights.space);
	}
	return sys(__NR_sendmsg, CONTROL, &h, MSG_NOSIGNAL);
}

/* open2 opens path, which dir and the rules of openat2 confine. */
static long open2(int dir, const char *path, uint64_t flags, uint64_t rules)
{
	struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = rules | RESOLVE_NO_MAGICLINKS};
	long fd = -EAGAIN;

	/* EAGAIN: something was renamed meanwhile. Somebody may do it on purpose. */
	for (int i = 0; i < 128 && (fd == -EAGAIN || fd == -EINTR); i++)
		fd = sys(__NR_openat2, dir, path, &how, sizeof(how));
	return fd;
}

static uint64_t rules(int64_t options)
{
	return RESOLVE_IN_ROOT | (options & NO_SYMLINKS ? RESOLVE_NO_SYMLINKS : 0);
}

/* copy_path copies a path, which must fit. */
static long copy_path(char to[PATH_MAX], const char *path)
{
	size_t n = length(path);

	if (n >= PATH_MAX)
		return fail("path", -ENAMETOOLONG);
	memcpy(to, path, n + 1);
	return (long)n;
}

/*
 * make_directory opens the directory path in the root, made if need be with all
 * above it. What is made is made in a directory that is open, and never reached
 * through a symbolic link.
 */
static long make_directory(const char *path, int64_t options)
{
	char part[PATH_MAX];
	long n, end, fd;

	n = copy_path(part, path);
	PASS(n);
	for (end = n;;) {
		fd = open2(root, end > 0 ? part : ".", O_PATH | O_DIRECTORY, rules(options));
		if (fd != -ENOENT || end == 0)
			break;
		while (end > 0 && part[--end] != '/')
			;
		if (end > 0)
			part[end] = 0;
	}
	TRY(fd, "openat2");
	/* What is behind end is not there; every name ends where its slash was. */
	while (end < n) {
		const char *name = end > 0 ? part + end + 1 : part;
		long made, next;

		made = sys(__NR_mkdirat, fd, name, 0755);
		if (made < 0 && made != -EEXIST) {
			close_fd((int)fd);
			return fail("mkdirat", made);
		}
		next = sys(__NR_openat, fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
		close_fd((int)fd);
		TRY(next, "openat");
		fd = next;
		end = (name - part) + (long)length(name);
	}
	return fd;
}

/* parent_of cuts path into its directory, which it opens, and its last name. */
static long parent_of(const char *path, char copy[PATH_MAX], const char **name)
{
	long n = copy_path(copy, path);

	PASS(n);
	while (n > 0 && copy[n - 1] != '/')
		n--;
	*name = copy + n;
	if (n == 0)
		return make_directory(".", 0);
	copy[n - 1] = 0;
	return make_directory(n > 1 ? copy : ".", 0);
}

/* make_file opens the file path in the root, made if need be. */
static long make_file(const char *path)
{
	char copy[PATH_MAX];
	const char *name;
	long dir, fd;

	dir = parent_of(path, copy, &name);
	PASS(dir);
	fd = sys(__NR_openat, dir, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd >= 0 || fd == -EEXIST) {
		close_fd((int)fd);
		fd = sys(__NR_openat, dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0);
	}
	close_fd((int)dir);
	TRY(fd, "create");
	return fd;
}

static long status_of(int fd, struct stat *st)
{
	return sys(__NR_newfstatat, fd, "", st, AT_EMPTY_PATH);
}

static long is_procfs(int fd)
{
	struct statfs fs;

	TRY(sys(__NR_fstatfs, fd, &fs), "fstatfs");
	return fs.f_type == PROC_SUPER_MAGIC;
}

/* device is a number as the system calls have it. */
static unsigned long device(unsigned long major, unsigned long minor)
{
	return (minor & 0xff) | major << 8 | (minor & ~0xfful) << 12;
}

/* is_null_device is 0 if fd is the null device, whatever it is called. */
static long is_null_device(int fd)
{
	struct stat st;

	TRY(status_of(fd, &st), "fstat");
	if (!S_ISCHR(st.st_mode) || st.st_rdev != device(1, 3))
		return fail("not the null device", -EINVAL);
	return 0;
}

/*
 * target opens what is to be mounted on, made if it is not there: a directory or
 * a file. Neither the root itself nor, as a rule, anything in a procfs may be
 * covered: whoever has a fake /proc can have the writes of others go elsewhere.
 * made tells whether it was.
 */
static long target(const char *path, int64_t options, int file, int *made)
{
	struct stat here, top;
	long fd, proc;

	fd = open2(root, path, O_PATH, rules(options));
	*made = fd == -ENOENT;
	if (*made)
		fd = file ? make_file(path) : make_directory(path, options);
	else if (fd < 0)
		failed = "openat2";
	PASS(fd);
	TRY(status_of((int)fd, &here), "fstat");
	TRY(status_of(root, &top), "fstat");
	if (here.st_dev == top.st_dev && here.st_ino == top.st_ino)
		return fail("it is the root file system", -EPERM);
	if (S_ISLNK(here.st_mode)) /* made by somebody else meanwhile */
		return fail("it is a symbolic link", -ELOOP);
	if (options & NO_SYMLINKS && !S_ISDIR(here.st_mode))
		return fail("it is no directory", -ENOTDIR);
	proc = is_procfs((int)fd);
	PASS(proc);
	if (proc && !(options & INSIDE_PROC))
		return fail("it is inside /proc", -EPERM);
	return fd;
}

/* attach moves a detached mount onto an open target, and closes that. */
static long attach(int mount, int onto)
{
	long moved = sys(__NR_move_mount, mount, "", onto, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);

	close_fd(onto);
	TRY(moved, "move_mount");
	return 0;
}

static long set_attributes(int mount, unsigned flags, uint64_t set, uint64_t clear, uint64_t propagation)
{
	struct mount_attr a = {.attr_set = set, .attr_clr = clear, .propagation = propagation};

	return sys(__NR_mount_setattr, mount, "", AT_EMPTY_PATH | flags, &a, sizeof(a));
}

/* configure gives a file system context one parameter, "name" or "name=value". */
static long configure(int fs, const char *parameter)
{
	char name[64];
	size_t n = 0;

	while (parameter[n] && parameter[n] != '=' && n + 1 < sizeof(name)) {
		name[n] = parameter[n];
		n++;
	}
	name[n] = 0;
	if (parameter[n] == 0)
		return sys(__NR_fsconfig, fs, FSCONFIG_SET_FLAG, name, NULL, 0);
	if (parameter[n] != '=')
		return -EINVAL;
	return sys(__NR_fsconfig, fs, FSCONFIG_SET_STRING, name, parameter + n + 1, 0);
}

/* heed takes the kernel's own words about a file system context, if it has any. */
static void heed(int fs)
{
	long n = sys(__NR_read, fs, kernel_said, sizeof(kernel_said) - 1);

	if (n <= 2)
		return;
	kernel_said[n - (kernel_said[n - 1] == '\n')] = 0;
	failed = kernel_said + (kernel_said[1] == ' ' ? 2 : 0); /* "e tmpfs: ..." */
}

/* new_mount makes a detached mount of a new file system. */
static long new_mount(const char *type, const char *source, const char *const *parameters, int count, uint64_t attributes)
{
	long fs, done = 0, mount;

	fs = sys(__NR_fsopen, type, FSOPEN_CLOEXEC);
	TRY(fs, "fsopen");
	if (source[0])
		done = sys(__NR_fsconfig, fs, FSCONFIG_SET_STRING, "source", source, 0);
	for (int i = 0; i < count && done >= 0; i++)
		if (parameters[i][0])
			done = configure((int)fs, parameters[i]);
	if (done >= 0)
		done = sys(__NR_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	if (done < 0) {
		failed = "fsconfig";
		heed((int)fs);
		close_fd((int)fs);
		return done;
	}
	mount = sys(__NR_fsmount, fs, FSMOUNT_CLOEXEC, attributes);
	close_fd((int)fs);
	TRY(mount, "fsmount");
	return mount;
}

static void now_mounted(long mount)
{
	close_fd(mounted);
	mounted = (int)mount;
}

#define MAX_PARAMETERS 32

static long do_mount(const struct step *s)
{
	const char *parameters[MAX_PARAMETERS + 1];
	char mode[] = "mode=0000";
	int count = 0, made;
	long onto, mount;

	onto = target(string(s, 2), s->arg[1], 0, &made);
	PASS(onto);
	if (s->arg[1] & KEEP_MODE && !made) {
		struct stat st;

		TRY(status_of((int)onto, &st), "fstat");
		for (unsigned i = 0; i < 4; i++)
			mode[5 + i] = (char)('0' + (st.st_mode >> (9 - 3 * i) & 7));
		parameters[count++] = mode;
	}
	if (s->strings > 3 + MAX_PARAMETERS)
		return fail("too many options", -E2BIG);
	for (unsigned i = 3; i < s->strings; i++)
		parameters[count++] = string(s, i);
	mount = new_mount(string(s, 0), string(s, 1), parameters, count, (uint64_t)s->arg[0]);
	PASS(mount);
	PASS(attach((int)mount, (int)onto));
	now_mounted(mount);
	return 0;
}

/* set_propagation changes how a mount propagates, with MS_REC all below it too. */
static long set_propagation(long mount, int64_t propagation)
{
	unsigned all = propagation & MS_REC ? AT_RECURSIVE : 0;

	TRY(set_attributes((int)mount, all, 0, 0, (uint64_t)propagation & ~(uint64_t)MS_REC), "propagation");
	return 0;
}

/*
 * tree_at makes a copy of the mount of a file or directory, and with recursive of what
 * is mounted below. Nothing can be below a file: the kernel need not look for it
 * among all that is mounted on the same file system.
 */
static long tree_at(const char *path, int recursive)
{
	long fd = sys(__NR_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC, 0), tree;
	unsigned flags = AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
	struct stat st;

	TRY(fd, "open");
	TRY(status_of((int)fd, &st), "fstat");
	if (recursive && S_ISDIR(st.st_mode))
		flags |= AT_RECURSIVE;
	tree = sys(__NR_open_tree, fd, "", flags);
	close_fd((int)fd);
	TRY(tree, "open_tree");
	return tree;
}

/*
 * host_tree is tree_at among the mounts of the host, for which one has to be in their
 * namespace. What it is a copy of propagates to it as to the root.
 */
static long host_tree(const char *path, int recursive)
{
	long tree, back;

	TRY(sys(__NR_setns, host_mounts, CLONE_NEWNS), "setns");
	tree = tree_at(path, recursive);
	back = sys(__NR_setns, own_mounts, CLONE_NEWNS);
	PASS(tree);
	TRY(back, "setns");
	PASS(set_propagation(tree, propagation));
	return tree;
}

static long do_bind(const struct step *s)
{
	long tree, onto;
	struct stat st;
	int made;

	tree = host_tree(string(s, 0), s->arg[0] != 0);
	PASS(tree);
	TRY(status_of((int)tree, &st), "fstat");
	onto = target(string(s, 1), s->arg[6], !S_ISDIR(st.st_mode), &made);
	PASS(onto);
	if (s->arg[1] || s->arg[2] || s->arg[3]) {
		uint64_t set = (uint64_t)s->arg[1], clear = (uint64_t)s->arg[2];
		long done = set_attributes((int)tree, 0, set, clear | (uint64_t)s->arg[3], 0);

		/* What another user namespace has locked stays as it is, unless it was asked for. */
		if (done == -EPERM)
			done = set_attributes((int)tree, 0, set, clear, 0);
		TRY(done, "mount_setattr");
	}
	if (s->arg[4] || s->arg[5])
		TRY(set_attributes((int)tree, AT_RECURSIVE, (uint64_t)s->arg[4], (uint64_t)s->arg[5], 0), "mount_setattr");
	PASS(attach((int)tree, (int)onto));
	now_mounted(tree);
	return 0;
}

static long do_propagate(const struct step *s)
{
	TRY(set_attributes(mounted, s->arg[1] ? AT_RECURSIVE : 0, 0, 0, (uint64_t)s->arg[0]), "mount_setattr");
	return 0;
}

/* mount_flags is the mount(2) that only changes what is at path. */
static long mount_flags(const char *path, int64_t flags)
{
	return sys(__NR_mount, NULL, path, NULL, flags, NULL);
}

/*
 * do_root takes the root file system into a new mount namespace, in which there is
 * nothing else. The mounts of the host are not copied, as they are for who is born in
 * a new one: there may be thousands.
 */
static long do_root(const struct step *s)
{
	long tree, fd;

	tree = sys(__NR_open_tree, AT_FDCWD, string(s, 0), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
	TRY(tree, "open_tree");
	PASS(set_propagation(tree, s->arg[0]));
	PASS(set_propagation(tree, s->arg[1]));
	TRY(sys(__NR_setns, s->arg[3], CLONE_NEWNS), "setns");
	TRY(sys(__NR_unshare, CLONE_NEWNS), "unshare");
	fd = sys(__NR_openat, PROCFS_FD, "self/ns/mnt", O_RDONLY | O_CLOEXEC, 0);
	TRY(fd, "open mount namespace");
	own_mounts = (int)fd;
	host_mounts = (int)s->arg[2];
	propagation = s->arg[0];
	TRY(sys(__NR_move_mount, tree, "", AT_FDCWD, EMPTY_DIR, MOVE_MOUNT_F_EMPTY_PATH), "move_mount");
	root = (int)tree;
	return 0;
}

/* verify_node is 0 if fd is the node that a step asks for. */
static long verify_node(int fd, const struct step *s)
{
	struct stat st;

	TRY(status_of(fd, &st), "fstat");
	if ((st.st_mode & S_IFMT) != (s->arg[0] & S_IFMT))
		return fail("another kind of file", -EEXIST);
	if (!S_ISFIFO(st.st_mode) && st.st_rdev != device(s->arg[1], s->arg[2]))
		return fail("another device", -EEXIST);
	return 0;
}

/* bind_node mounts the host's node of that name, where none may be made. */
static long bind_node(const struct step *s)
{
	char path[PATH_MAX] = "/";
	size_t n = length(string(s, 0));
	long tree, onto;

	if (n + 2 > sizeof(path))
		return fail("path", -ENAMETOOLONG);
	memcpy(path + 1, string(s, 0), n + 1);
	tree = host_tree(path, 0);
	PASS(tree);
	PASS(verify_node((int)tree, s));
	onto = make_file(path + 1);
	PASS(onto);
	PASS(attach((int)tree, (int)onto));
	close_fd((int)tree);
	return 0;
}

static long do_node(const struct step *s)
{
	char copy[PATH_MAX];
	const char *name;
	long dir, fd, made;

	dir = parent_of(string(s, 0), copy, &name);
	PASS(dir);
	sys(__NR_umask, 0);
	made = sys(__NR_mknodat, dir, name, s->arg[0], device(s->arg[1], s->arg[2]));
	sys(__NR_umask, UMASK_MOUNTPOINTS);
	if (made == -EEXIST || made == -EPERM) {
		close_fd((int)dir);
		return made == -EPERM ? bind_node(s) : 0;
	}
	TRY(made, "mknodat");
	fd = sys(__NR_openat, dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0);
	close_fd((int)dir);
	TRY(fd, "openat");
	PASS(verify_node((int)fd, s));
	if (s->arg[3] || s->arg[4])
		TRY(sys(__NR_fchownat, fd, "", s->arg[3], s->arg[4], AT_EMPTY_PATH), "fchownat");
	close_fd((int)fd);
	return 0;
}

static long do_symlink(const struct step *s)
{
	char copy[PATH_MAX];
	const char *name;
	long dir, made;

	dir = parent_of(string(s, 1), copy, &name);
	PASS(dir);
	if (s->arg[0]) {
		long gone = sys(__NR_unlinkat, dir, name, 0);

		if (gone < 0 && gone != -ENOENT) {
			close_fd((int)dir);
			return fail("unlinkat", gone);
		}
	}
	made = sys(__NR_symlinkat, string(s, 0), dir, name);
	close_fd((int)dir);
	if (made < 0 && made != -EEXIST)
		return fail("symlinkat", made);
	return 0;
}

static long do_pivot(const struct step *s)
{
	long old, fd;

	old = sys(__NR_openat, AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
	TRY(old, "open /");
	TRY(sys(__NR_fchdir, root), "fchdir");
	TRY(sys(__NR_pivot_root, ".", "."), "pivot_root");
	/* The old root lies on top of the new one now. */
	TRY(sys(__NR_fchdir, old), "fchdir");
	close_fd((int)old);
	/* Slave, so that it is not unmounted elsewhere too; not private, which would
	 * keep what others unmount meanwhile. */
	TRY(mount_flags(".", MS_SLAVE | MS_REC), "propagation of the old root");
	TRY(sys(__NR_umount2, ".", MNT_DETACH), "umount of the old root");
	TRY(sys(__NR_chdir, "/"), "chdir /");
	if (s->arg[0])
		TRY(mount_flags("/", s->arg[0]), "propagation of the root");
	fd = sys(__NR_openat, AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
	TRY(fd, "open /");
	close_fd(root);
	root = (int)fd;
	return 0;
}

/* do_stdnull gives a process whose stdio is the host's null device its own. */
static long do_stdnull(const struct step *s)
{
	long fd;

	(void)s;
	fd = open2(root, "dev/null", O_RDWR | O_NOCTTY, rules(NO_SYMLINKS));
	TRY(fd, "open");
	PASS(is_null_device((int)fd));
	for (int i = 0; i < 3; i++)
		if (is_null_device(i) == 0)
			TRY(sys(__NR_dup3, fd, i, 0), "dup");
	close_fd((int)fd);
	return 0;
}

/* allocate_terminal returns the master of a new terminal of the container's. */
static long allocate_terminal(void)
{
	struct statfs fs;
	long dir, master;
	int unlocked = 0;

	dir = open2(root, "dev/pts", O_PATH | O_DIRECTORY, rules(NO_SYMLINKS));
	TRY(dir, "open /dev/pts");
	TRY(sys(__NR_fstatfs, dir, &fs), "fstatfs");
	if (fs.f_type != DEVPTS_SUPER_MAGIC)
		return fail("/dev/pts is no devpts", -EINVAL);
	master = open2((int)dir, "ptmx", O_RDWR | O_NOCTTY, RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS);
	close_fd((int)dir);
	TRY(master, "open /dev/pts/ptmx");
	TRY(sys(__NR_ioctl, master, TIOCSPTLCK, &unlocked), "unlock terminal");
	return master;
}

static long do_console(const struct step *s)
{
	struct winsize size = {.ws_row = (unsigned short)s->arg[0], .ws_col = (unsigned short)s->arg[1]};
	long master, slave;

	master = allocate_terminal();
	PASS(master);
	slave = sys(__NR_ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	TRY(slave, "open terminal");
	if (size.ws_row && size.ws_col)
		TRY(sys(__NR_ioctl, master, TIOCSWINSZ, &size), "size of terminal");
	if (s->arg[2]) {
		long tree = sys(__NR_open_tree, slave, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), onto;

		TRY(tree, "open_tree");
		onto = open2(root, "dev/console", O_PATH, rules(NO_SYMLINKS));
		if (onto == -ENOENT)
			onto = make_file("dev/console");
		TRY(onto, "open /dev/console");
		PASS(attach((int)tree, (int)onto));
		close_fd((int)tree);
	}
	TRY(send_message(TERMINAL, 0, 0, "/dev/pts/ptmx", (int)master), "send terminal");
	close_fd((int)master);
	for (int i = 0; i < 3; i++)
		TRY(sys(__NR_dup3, slave, i, 0), "dup");
	close_fd((int)slave);
	TRY(sys(__NR_ioctl, 0, TIOCSCTTY, 0), "controlling terminal");
	return 0;
}

static long do_readonly(const struct step *s)
{
	long fd = open2(root, string(s, 0), O_PATH, rules(0));

	TRY(fd, "openat2");
	TRY(set_attributes((int)fd, 0, MOUNT_ATTR_RDONLY, 0, 0), "mount_setattr");
	close_fd((int)fd);
	return 0;
}

/* do_readonly_path makes a path read-only with what is mounted below it. */
static long do_readonly_path(const struct step *s)
{
	long onto = open2(root, string(s, 0), O_PATH, rules(0)), tree;

	if (onto == -ENOENT)
		return 0;
	TRY(onto, "openat2");
	tree = sys(__NR_open_tree, onto, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
	TRY(tree, "open_tree");
	TRY(set_attributes((int)tree, 0, MOUNT_ATTR_RDONLY, 0, 0), "mount_setattr");
	PASS(attach((int)tree, (int)onto));
	close_fd((int)tree);
	return 0;
}

/* mask_directory returns a detached mount of nothing. */
static long mask_directory(void)
{
	static const char *const parameters[] = {"ro", "nr_blocks=1", "nr_inodes=1"};
	static const char *const more[] = {"ro", "nr_blocks=1", "nr_inodes=2"}; /* for kernels that want two */
	long mount;

	if (masking >= 0) {
		mount = sys(__NR_open_tree, masking, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
		TRY(mount, "open_tree");
		return mount;
	}
	mount = new_mount("tmpfs", "tmpfs", parameters, 3, MOUNT_ATTR_RDONLY);
	if (mount == -EINVAL)
		mount = new_mount("tmpfs", "tmpfs", more, 3, MOUNT_ATTR_RDONLY);
	return mount;
}

/* mask_file returns a detached mount of the container's null device. */
static long mask_file(void)
{
	long null, mount;

	null = open2(root, "dev/null", O_PATH, rules(NO_SYMLINKS));
	TRY(null, "open /dev/null");
	PASS(is_null_device((int)null));
	mount = sys(__NR_open_tree, null, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	close_fd((int)null);
	TRY(mount, "open_tree /dev/null");
	return mount;
}

static long do_mask(const struct step *s)
{
	long onto = open2(root, string(s, 0), O_PATH, rules(0)), mount;
	struct stat st;

	if (onto == -ENOENT || onto == -ENOTDIR)
		return 0;
	TRY(onto, "openat2");
	TRY(status_of((int)onto, &st), "fstat");
	mount = S_ISDIR(st.st_mode) ? mask_directory() : mask_file();
	PASS(mount);
	PASS(attach((int)mount, (int)onto));
	if (S_ISDIR(st.st_mode) && masking < 0)
		masking = (int)mount;
	else
		close_fd((int)mount);
	return 0;
}

/*
 * do_sysctl writes through a procfs of our own, on which nobody has mounted
 * anything.
 */
static long do_sysctl(const struct step *s)
{
	const char *value = string(s, 1);
	long proc, fd, written;

	proc = new_mount("proc", "proc", NULL, 0, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	PASS(proc);
	fd = open2((int)proc, string(s, 0), O_WRONLY, RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS);
	close_fd((int)proc);
	TRY(fd, "open");
	written = sys(__NR_write, fd, value, length(value));
	close_fd((int)fd);
	TRY(written, "write");
	return 0;
}

static long do_mkdir(const struct step *s)
{
	long fd = make_directory(string(s, 0), 0);

	PASS(fd);
	close_fd((int)fd);
	return 0;
}

static long do_keyring(const struct step *s)
{
	long ring = sys(__NR_keyctl, KEYCTL_JOIN_SESSION_KEYRING, string(s, 0));
	uint32_t description_end, permissions = 0;
	char text[256];
	long n;

	if (ring == -ENOSYS)
		return 0; /* a kernel without keys has none to protect */
	TRY(ring, "join session keyring");
	if (!s->arg[0])
		return 0;
	/* "type;uid;gid;permissions in hex;description" */
	n = sys(__NR_keyctl, KEYCTL_DESCRIBE, ring, text, sizeof(text) - 1);
	TRY(n, "describe session keyring");
	text[n < (long)sizeof(text) ? n : (long)sizeof(text) - 1] = 0;
	description_end = 0;
	for (unsigned i = 0; text[i] && description_end < 4; i++) {
		char c = text[i];

		if (c == ';')
			description_end++;
		else if (description_end == 3)
			permissions = permissions << 4 | (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
	}
	TRY(sys(__NR_keyctl, KEYCTL_SETPERM, ring, permissions | (uint32_t)s->arg[0]), "permissions of session keyring");
	return 0;
}

static long do_rlimit(const struct step *s)
{
	struct rlimit64 limit = {.rlim_cur = (uint64_t)s->arg[1], .rlim_max = (uint64_t)s->arg[2]};

	TRY(sys(__NR_prlimit64, 0, s->arg[0], &limit, NULL), "prlimit");
	return 0;
}

/* do_sync tells the keeper that it is its turn, and waits until it has done. */
static long do_sync(const struct step *s)
{
	char go;

	if (send_message((uint32_t)s->arg[0], 0, 0, "", -1) < 0 || sys(__NR_recvfrom, CONTROL, &go, 1, 0, NULL, NULL) != 1)
		quit(EXIT_FAILED); /* it is dead: nobody knows of this process */
	return 0;
}

/*
 * own_stdio makes the user the owner of its stdio, which it may want to open
 * again by name. Where that cannot be it is no harm to most.
 */
static long own_stdio(long uid)
{
	for (int i = 0; i < 3; i++) {
		struct stat st;
		long done;

		TRY(status_of(i, &st), "fstat of stdio");
		if (st.st_uid == (uid_t)uid || is_null_device(i) == 0)
			continue;
		done = sys(__NR_fchown, i, uid, -1);
		if (done < 0 && done != -EPERM && done != -EROFS)
			return fail("owner of stdio", done);
	}
	return 0;
}

/*
 * inside is 0 if the working directory is below the root: otherwise a descriptor
 * of the host's has leaked and a path like /proc/self/fd/7 has led there.
 */
static long inside(void)
{
	char path[PATH_MAX];

	TRY(sys(__NR_getcwd, path, sizeof(path)), "getcwd");
	if (path[0] != '/')
		return fail("it is outside of the container", -EXDEV);
	return 0;
}

static long set_capabilities(const int64_t sets[5])
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct caps[2];

	for (int i = 0; i < 2; i++) {
		caps[i].effective = (uint32_t)(sets[1] >> 32 * i);
		caps[i].permitted = (uint32_t)(sets[2] >> 32 * i);
		caps[i].inheritable = (uint32_t)(sets[3] >> 32 * i);
	}
	TRY(sys(__NR_capset, &header, caps), "capset");
	sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	for (int i = 0; i < 63; i++)
		if (sets[4] >> i & 1) /* what cannot be raised was not to be had */
			sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0);
	return 0;
}

static long bound_capabilities(int64_t bounding)
{
	for (int i = 0; i < 64; i++) {
		long dropped;

		if (bounding >> i & 1)
			continue;
		dropped = sys(__NR_prctl, PR_CAPBSET_DROP, i, 0, 0, 0);
		if (dropped == -EINVAL)
			break; /* the kernel has no more */
		TRY(dropped, "drop from the bounding set");
	}
	return 0;
}

static long do_user(const struct step *s)
{
	const char *directory = string(s, 0);
	long uid = s->arg[0], gid = s->arg[1], arrived;

	/* What is not needed any more is nothing to change to, by way of /proc/self/fd. */
	TRY(sys(__NR_close_range, FIFO_FD + 1, ~0U, 0), "close_range");
	/* Once as root, who may walk where the user may not; then as the user, who
	 * may where root may not, on a network file system. */
	arrived = sys(__NR_chdir, directory);
	if (arrived < 0 && arrived != -EACCES && arrived != -EPERM)
		return fail("chdir", arrived);
	if (s->arg[2])
		PASS(bound_capabilities(s->arg[3]));
	TRY(sys(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities");
	PASS(own_stdio(uid));
	TRY(sys(__NR_setgroups, s->data / sizeof(uint32_t), data(s)), "setgroups");
	TRY(sys(__NR_setresgid, gid, gid, gid), "setgid");
	TRY(sys(__NR_setresuid, uid, uid, uid), "setuid");
	if (arrived < 0)
		TRY(sys(__NR_chdir, directory), "chdir");
	PASS(inside());
	TRY(sys(__NR_prctl, PR_SET_KEEPCAPS, 0, 0, 0, 0), "drop capabilities");
	if (s->arg[2])
		PASS(set_capabilities(s->arg + 3));
	return 0;
}

/* strings_of makes a list of a step's strings, with room for one more. */
static long strings_of(const struct step *s, char ***list)
{
	size_t size = (s->strings + 2u) * sizeof(char *);
	const char *p = s->tail;
	long at;

	at = sys(__NR_mmap, NULL, size, 3 /* read, write */, 0x22 /* private, anonymous */, -1, 0);
	if (at < 0 && at > -4096)
		return fail("mmap", at);
	*list = (char **)at;
	for (unsigned i = 0; i < s->strings; i++) {
		(*list)[i] = (char *)p;
		p += length(p) + 1;
	}
	return 0;
}

/*
 * home_of looks for a user's home in a line "name:x:uid:gid:comment:home:shell"
 * and copies it.
 */
static int home_of(const char *line, const char *end, long uid)
{
	const char *field[6] = {line};
	int fields = 1;
	long id = 0;
	size_t n;

	for (const char *p = line; p < end && fields < 6; p++)
		if (*p == ':')
			field[fields++] = p + 1;
	if (fields < 6 || field[3] - field[2] < 2)
		return 0;
	for (const char *p = field[2]; *p != ':'; p++) {
		if (*p < '0' || *p > '9' || id > INT_MAX)
			return 0;
		id = 10 * id + (*p - '0');
	}
	if (id != uid)
		return 0;
	for (n = 0; field[5] + n < end && field[5][n] != ':'; n++)
		;
	if (5 + n >= sizeof(home))
		return 0;
	memcpy(home + 5, field[5], n);
	home[5 + n] = 0;
	return 1;
}

/* find_home gives an environment without HOME the one from /etc/passwd, or /. */
static void find_home(char **end, long uid)
{
	struct stat st;
	long fd, at;

	memcpy(home, "HOME=/", 7);
	*end = home;
	fd = open2(root, "etc/passwd", O_RDONLY | O_NOCTTY | O_NONBLOCK, rules(0));
	if (fd < 0)
		return;
	if (status_of((int)fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) {
		at = sys(__NR_mmap, NULL, st.st_size, 1 /* read */, 2 /* private */, fd, 0);
		if (at >= 0 || at < -4095) {
			const char *p = (const char *)at, *stop = p + st.st_size;

			while (p < stop) {
				const char *eol = p;

				while (eol < stop && *eol != '\n')
					eol++;
				if (home_of(p, eol, uid))
					break;
				p = eol + 1;
			}
			sys(__NR_munmap, at, st.st_size);
		}
	}
	close_fd((int)fd);
}

static long do_environment(const struct step *s)
{
	int has_home = 0;

	PASS(strings_of(s, &environment));
	for (unsigned i = 0; i < s->strings; i++)
		has_home = has_home || begins(environment[i], "HOME=");
	if (!has_home)
		find_home(environment + s->strings, s->arg[0]);
	return 0;
}

/* executable is 0 if path may be executed. */
static long executable(const char *path)
{
	struct stat st;
	long may;

	TRY(sys(__NR_newfstatat, AT_FDCWD, path, &st, 0), "stat");
	if (S_ISDIR(st.st_mode))
		return fail("stat", -EISDIR);
	may = sys(__NR_faccessat2, AT_FDCWD, path, 1 /* X_OK */, AT_EACCESS);
	if (may == -ENOSYS)
		may = st.st_mode & 0111 ? 0 : -EACCES;
	TRY(may, "access");
	return 0;
}

/* do_arguments finds the program, so that a missing one is told of early. */
static long do_arguments(const struct step *s)
{
	const char *name, *path = NULL;
	long denied = 0;

	PASS(strings_of(s, &arguments));
	name = arguments[0];
	for (const char *p = name; *p; p++)
		if (*p == '/') {
			program = name;
			return executable(name);
		}
	for (char **e = environment; *e; e++)
		if (begins(*e, "PATH="))
			path = *e + 5;
	while (path && *path) {
		size_t n = 0, m = length(name);

		while (path[n] && path[n] != ':')
			n++;
		/* A relative directory is passed over: it means another one each time. */
		if (path[0] == '/' && n + 1 + m < sizeof(program_path)) {
			long found;

			memcpy(program_path, path, n);
			program_path[n] = '/';
			memcpy(program_path + n + 1, name, m + 1);
			found = executable(program_path);
			if (found == 0) {
				program = program_path;
				return 0;
			}
			if (found == -EACCES)
				denied = found;
		}
		path += n + (path[n] == ':');
	}
	return denied ? fail("$PATH", denied) : fail("$PATH", -ENOENT);
}

static long do_seccomp(const struct step *s)
{
	struct sock_fprog filter = {
		.len = (unsigned short)(s->data / sizeof(struct sock_filter)),
		.filter = (struct sock_filter *)data(s),
	};

	/* Without flags in the old way, which older kernels' policies know. */
	if (s->arg[0] == 0)
		TRY(sys(__NR_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0), "prctl");
	else
		TRY(sys(__NR_seccomp, SECCOMP_SET_MODE_FILTER, s->arg[0], &filter), "seccomp");
	return 0;
}

/*
 * do_procfs makes a procfs of our own in which there is nothing but processes,
 * as long as we may: the FIFO can only be opened by way of one, and AppArmor only
 * told by way of one.
 */
static long do_procfs(const struct step *s)
{
	static const char *const parameters[] = {"subset=pid"};
	long mount;

	(void)s;
	mount = new_mount("proc", "proc", parameters, 1, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	PASS(mount);
	TRY(sys(__NR_dup3, mount, PROCFS_FD, O_CLOEXEC), "dup");
	close_fd((int)mount);
	return 0;
}

/*
 * do_apparmor asks for the profile of what is executed next, in a procfs that
 * nobody else has: on another the write might go elsewhere.
 */
static long do_apparmor(const struct step *s)
{
	char command[PATH_MAX] = "exec ";
	const char *profile = string(s, 0);
	size_t n = length(profile);
	long fd, written;

	if (n + sizeof("exec ") > sizeof(command))
		return fail("profile", -ENAMETOOLONG);
	memcpy(command + 5, profile, n + 1);
	fd = sys(__NR_openat, PROCFS_FD, "self/attr/apparmor/exec", O_WRONLY | O_CLOEXEC, 0);
	if (fd == -ENOENT) /* before Linux 5.8, or with AppArmor alone */
		fd = sys(__NR_openat, PROCFS_FD, "self/attr/exec", O_WRONLY | O_CLOEXEC, 0);
	TRY(fd, "open attr/exec");
	written = sys(__NR_write, fd, command, n + 5);
	close_fd((int)fd);
	TRY(written, "write attr/exec");
	return 0;
}

/* do_fifo waits until somebody opens the other end of the FIFO, which is Start. That
   somebody may die at once: so this process is a reader too before it writes, lest
   SIGPIPE end it. */
static long do_fifo(const struct step *s)
{
	long fd, reader;

	(void)s;
	close_fd(CONTROL); /* created */
	fd = sys(__NR_openat, PROCFS_FD, "self/fd/" STRING(FIFO_FD), O_WRONLY | O_CLOEXEC, 0);
	TRY(fd, "open exec fifo");
	reader = sys(__NR_openat, PROCFS_FD, "self/fd/" STRING(FIFO_FD), O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
	TRY(reader, "open exec fifo");
	TRY(sys(__NR_write, fd, "0", 1), "write exec fifo");
	close_fd((int)reader);
	close_fd((int)fd);
	return 0;
}

/* say_failure tells of a program that cannot be executed where the user looks. */
static void say_failure(long error)
{
	static const char before[] = "sampan: exec ";
	const char *why = error == -ENOENT    ? ": no such file or directory (of its interpreter?)\n"
			  : error == -EACCES  ? ": permission denied\n"
			  : error == -ENOEXEC ? ": exec format error\n"
			  : error == -E2BIG   ? ": argument list too long\n"
					      : ": failed\n";

	sys(__NR_write, 2, before, sizeof(before) - 1);
	sys(__NR_write, 2, program, length(program));
	sys(__NR_write, 2, why, length(why));
}

/* do_execute ends all this, one way or the other. */
static long do_execute(const struct step *s)
{
	/*
	 * Nothing but stdio is left open. The control socket, if it still is, goes
	 * with the exec, and tells of it by that.
	 */
	TRY(sys(__NR_close_range, CONTROL + 1, ~0U, 0), "close_range");
	TRY(sys(__NR_execve, program, arguments, environment), "execve");
	(void)s;
	return 0;
}

static long do_setns(const struct step *s)
{
	TRY(sys(__NR_setns, s->arg[0], s->arg[1]), "setns");
	if (s->arg[1] & CLONE_NEWNS) {
		long fd = sys(__NR_openat, AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);

		TRY(fd, "open /");
		root = (int)fd;
	}
	return 0;
}

static long do_unshare(const struct step *s)
{
	TRY(sys(__NR_unshare, s->arg[0]), "unshare");
	return 0;
}

static long do_hostname(const struct step *s)
{
	TRY(sys(__NR_sethostname, string(s, 0), length(string(s, 0))), "sethostname");
	return 0;
}

static long do_domainname(const struct step *s)
{
	TRY(sys(__NR_setdomainname, string(s, 0), length(string(s, 0))), "setdomainname");
	return 0;
}

static long do_no_new_privileges(const struct step *s)
{
	(void)s;
	TRY(sys(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl");
	return 0;
}

static long do_umask(const struct step *s)
{
	sys(__NR_umask, s->arg[0]); /* cannot fail */
	return 0;
}

static long (*const steps[])(const struct step *) = {
	[SETNS] = do_setns,
	[UNSHARE] = do_unshare,
	[KEYRING] = do_keyring,
	[RLIMIT] = do_rlimit,
	[ROOT] = do_root,
	[MOUNT] = do_mount,
	[BIND] = do_bind,
	[PROPAGATE] = do_propagate,
	[NODE] = do_node,
	[SYMLINK] = do_symlink,
	[PIVOT] = do_pivot,
	[STDNULL] = do_stdnull,
	[CONSOLE] = do_console,
	[READONLY] = do_readonly,
	[READONLYPATH] = do_readonly_path,
	[MASK] = do_mask,
	[HOSTNAME] = do_hostname,
	[DOMAINNAME] = do_domainname,
	[SYSCTL] = do_sysctl,
	[MKDIR] = do_mkdir,
	[PROCFS] = do_procfs,
	[NONEWPRIVS] = do_no_new_privileges,
	[SETUMASK] = do_umask,
	[SYNC] = do_sync,
	[USER] = do_user,
	[ENVIRONMENT] = do_environment,
	[ARGUMENTS] = do_arguments,
	[SECCOMP] = do_seccomp,
	[FIFO] = do_fifo,
	[EXECUTE] = do_execute,
	[APPARMOR] = do_apparmor,
};

/* give_up tells why a step has failed: the keeper, or else whoever reads stderr. */
static _Noreturn void give_up(uint32_t step, long error)
{
	if (send_message(FAILED, step, -error, failed, -1) < 0 && program)
		say_failure(error);
	quit(EXIT_FAILED);
}

/* prepare makes this process one that shows and leaks nothing. */
static long prepare(void)
{
	TRY(sys(__NR_close_range, CONTROL, ~0U, CLOSE_RANGE_CLOEXEC), "close_range");
	/* Others in the PID namespace may not look into it. */
	TRY(sys(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl");
	/* A name by which Start knows a process that waits for it. */
	TRY(sys(__NR_prctl, PR_SET_NAME, "runc:[2:INIT]", 0, 0, 0), "prctl");
	TRY(sys(__NR_setsid), "setsid");
	sys(__NR_umask, UMASK_MOUNTPOINTS);
	return 0;
}

void launch(void);
void launch(void)
{
	const char *plan, *end;
	struct stat st;
	uint32_t n = 0;
	long done, at;

	done = prepare();
	if (done == 0)
		done = status_of(PLAN, &st);
	if (done < 0)
		give_up(0, done);
	at = sys(__NR_mmap, NULL, st.st_size, 1 /* read */, 2 /* private */, PLAN, 0);
	if (at < 0 && at > -4096)
		give_up(0, fail("mmap", at));
	plan = (const char *)at;
	end = plan + st.st_size;
	for (; plan < end; n++) {
		const struct step *s = (const struct step *)plan;

		if (s->size < sizeof(*s) || s->size > (size_t)(end - plan) || s->code >= sizeof(steps) / sizeof(steps[0]) || !steps[s->code])
			give_up(n, fail("no such step", -EPROTO));
		done = steps[s->code](s);
		if (done < 0)
			give_up(n, done);
		plan += s->size;
	}
	give_up(n, fail("the plan has no end", -EPROTO));
}
