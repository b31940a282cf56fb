/*
 * sampan-init is PID 1 of a pod whose containers share a PID namespace, and the
 * sandbox process of runtimes that need one. It does nothing but what a PID 1
 * must: it lives until it is told to end, and inherits orphans.
 *
 * It exits with 0 on SIGTERM or SIGINT, at once: whatever else is in the
 * namespace is killed by the kernel then.
 */

#include <signal.h>
#include <stdio.h>

int main(void)
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
