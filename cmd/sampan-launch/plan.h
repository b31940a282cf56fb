/*
 * The plan: what a process does to become a container's, as a list of steps.
 * internal/ociruntime/launch/plan.go writes it and has the same constants.
 */

#ifndef PLAN_H
#define PLAN_H

#include <stdint.h>

enum code {
	SETNS = 1,   /* fd, flags */
	UNSHARE,     /* flags */
	KEYRING,     /* permissions or 0; name */
	RLIMIT,      /* resource, soft, hard */
	ROOT,        /* propagation of all, of the root itself, mount namespaces: the host's and
			one with nothing but EMPTY_DIR; path. Behind PROCFS */
	MOUNT,       /* attributes, options; type, source, target, parameters... */
	BIND,        /* recursive, attributes to set, to clear, to clear if they are not locked,
			all below: to set, to clear, options; source, target */
	PROPAGATE,   /* propagation, recursive: of what was mounted last */
	NODE,        /* mode, major, minor, uid, gid; path */
	SYMLINK,     /* 1 to replace what is there; target, path */
	PIVOT,       /* propagation of the new root or 0 */
	STDNULL,     /* */
	CONSOLE,     /* rows, columns, 1 to mount it; */
	READONLY,    /* path of a mount */
	READONLYPATH, /* path of whatever there is */
	MASK,        /* path */
	HOSTNAME,    /* name */
	DOMAINNAME,  /* name */
	SYSCTL,      /* path below /proc/sys, value */
	MKDIR,       /* path */
	PROCFS,      /* before ROOT, FIFO and APPARMOR */
	NONEWPRIVS,  /* */
	SETUMASK,    /* mask */
	SYNC,        /* message */
	ENVIRONMENT, /* uid; variables... */
	USER,        /* uid, gid, 1 if capabilities are given: bounding, effective, permitted,
			inheritable, ambient; working directory; then the groups. Descriptors
			are gone then */
	ARGUMENTS,   /* arguments...; behind ENVIRONMENT */
	SECCOMP,     /* flags; then the filter */
	FIFO,        /* */
	EXECUTE,     /* */
	APPARMOR,    /* profile; of what EXECUTE executes, behind PROCFS */
};

/* Options of MOUNT and BIND. */
enum {
	NO_SYMLINKS = 1, /* the target is reached without them, and is a directory */
	INSIDE_PROC = 2, /* the target may be inside a procfs */
	KEEP_MODE = 4,   /* the mode of the target, if it exists, is a parameter */
};

struct step {
	uint32_t size;    /* of all of it, a multiple of 8 */
	uint16_t code;
	uint16_t strings; /* that many strings are behind it, each with its NUL; */
	uint32_t data;    /* or so many bytes, behind the strings and aligned to 8 */
	uint32_t unused;
	int64_t arg[9];
	char tail[];
};

/* What the program sends. An error's text names the system call. */
enum { READY = 1, TERMINAL, FAILED };

struct message {
	uint32_t kind;
	uint32_t step; /* its place in the plan, from 0 */
	int32_t error; /* errno */
	char text[116];
};

/* The descriptors it finds: the last for FIFO, of the file as O_PATH. Those that
 * the plan names come behind. */
enum { CONTROL = 3, PLAN = 4 };
#define FIFO_FD 5
#define PROCFS_FD PLAN /* once the plan is in memory */
#define EMPTY_DIR "/root"
#define STRING(x) STRING_(x)
#define STRING_(x) #x

#endif
