/*
 * sampan-init is PID 1 of a pod whose containers share a PID namespace, and the
 * sandbox process of runtimes that need one. It does nothing but what a PID 1
 * must: it lives until it is told to end, and inherits orphans.
 *
 * It exits with 0 on SIGTERM or SIGINT, at once: whatever else is in the
 * namespace is killed by the kernel then.
 *
 * Called as "init hold FLAGS" it is the other thing a pod may need for a moment, a
 * process with a single thread: it leaves for new namespaces, those of unshare(2)'s
 * flags FLAGS, writes one byte to standard output, and exits when standard input
 * ends. What went wrong is on standard output instead.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int hold(const char *flags)
{
	char byte = 0;
	ssize_t n;

	if (unshare(atoi(flags)) != 0) {
		dprintf(STDOUT_FILENO, "unshare: %s", strerror(errno));
		return 1;
	}
	if (write(STDOUT_FILENO, &byte, 1) != 1)
		return 1;
	do
		n = read(STDIN_FILENO, &byte, 1);
	while (n > 0 || (n < 0 && errno == EINTR));
	return n < 0;
}

int main(int argc, char **argv)
{
	sigset_t end;
	int sig;

	if (argc == 3 && strcmp(argv[1], "hold") == 0)
		return hold(argv[2]);

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
