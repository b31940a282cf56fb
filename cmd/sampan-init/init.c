/*
 * sampan-init is the small program that does for the daemon what the daemon
 * cannot do itself.
 *
 * Without arguments it is PID 1 of a pod whose containers share a PID namespace,
 * and the sandbox process of runtimes that need one. It does nothing but what a
 * PID 1 must: it lives until it is told to end, and inherits orphans. It exits
 * with 0 on SIGTERM or SIGINT, at once: whatever else is in the namespace is
 * killed by the kernel then.
 *
 * "hold FLAGS" is the other thing a pod may need for a moment, a process with a
 * single thread: it leaves for new namespaces, those of unshare(2)'s flags FLAGS,
 * writes one byte to standard output, which is 0 or errno, and exits when standard
 * input ends.
 *
 * With other arguments it looks at paths on volumes. Who waits for a volume whose
 * server is gone cannot be killed, so this is no work for a process that has
 * others to do:
 *
 *   follow PATH...   prints each path without symbolic links, ended by a NUL
 *   mkdirs PATH...   makes directories, as mkdir -p does
 *   map NS PATH...   prints each path that can be mounted with the ids of the user
 *                    namespace NS, ended by a NUL
 *
 * It ends at the first path that fails, having printed those before it, and the
 * exit code is the errno then.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int pid1(void)
{
	sigset_t end;
	int sig;

	/* The kernel reaps the children of a process that ignores SIGCHLD. */
	if (signal(SIGCHLD, SIG_IGN) == SIG_ERR) {
		perror("ignore SIGCHLD");
		return 1;
	}

	/*
	 * Blocked, so that sigwait has them also if they come before it is
	 * called. The kernel drops any other signal that a PID 1 does not
	 * handle, but for SIGKILL from outside.
	 */
	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	sigaddset(&end, SIGINT);
	if (sigprocmask(SIG_BLOCK, &end, NULL) != 0) {
		perror("block signals");
		return 1;
	}
	if (sigwait(&end, &sig) != 0)
		return 1;
	return 0;
}

static int hold(const char *flags)
{
	unsigned char byte;
	ssize_t n;

	byte = unshare(atoi(flags)) == 0 ? 0 : errno;
	if (write(STDOUT_FILENO, &byte, 1) != 1 || byte != 0)
		return 1;
	do
		n = read(STDIN_FILENO, &byte, 1);
	while (n > 0 || (n < 0 && errno == EINTR));
	return n < 0;
}

static int print(const char *path)
{
	return fwrite(path, strlen(path) + 1, 1, stdout) == 1 ? 0 : EIO;
}

static int follow(const char *path)
{
	char real[PATH_MAX];

	if (!realpath(path, real))
		return errno;
	return print(real);
}

static int mkdirs(const char *path)
{
	char dir[PATH_MAX];
	struct stat st;
	size_t i, n = strlen(path);

	if (n >= sizeof(dir))
		return ENAMETOOLONG;
	/* Whatever fails but for the last shows when the next is made. */
	for (i = 1; i <= n; i++) {
		if (path[i] != '/' && path[i] != '\0')
			continue;
		memcpy(dir, path, i);
		dir[i] = '\0';
		if (mkdir(dir, 0755) == 0 || i < n)
			continue;
		if (errno != EEXIST)
			return errno;
		if (stat(dir, &st) != 0)
			return errno;
		if (!S_ISDIR(st.st_mode))
			return ENOTDIR;
	}
	return 0;
}

/* The user namespace of map. */
static int userns = -1;

static int map(const char *path)
{
	struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = userns};
	int tree;

	tree = syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (tree < 0)
		return errno;
	if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof(attr)) != 0)
		return errno;
	close(tree);
	return print(path);
}

int main(int argc, char **argv)
{
	int (*verb)(const char *);
	int i = 2, err;

	if (argc < 2)
		return pid1();
	if (argc == 3 && strcmp(argv[1], "hold") == 0)
		return hold(argv[2]);
	if (strcmp(argv[1], "follow") == 0)
		verb = follow;
	else if (strcmp(argv[1], "mkdirs") == 0)
		verb = mkdirs;
	else if (argc > 2 && strcmp(argv[1], "map") == 0) {
		verb = map;
		userns = open(argv[i++], O_RDONLY | O_CLOEXEC);
		if (userns < 0)
			return errno;
	} else
		return EINVAL;
	for (; i < argc; i++) {
		err = verb(argv[i]);
		if (err) {
			fflush(stdout);
			return err;
		}
	}
	return fflush(stdout) == 0 ? 0 : EIO;
}
