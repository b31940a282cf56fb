/*
 * System calls and the few functions that the compiler itself may call, for a
 * program without a C library: it is executed at the start of every container,
 * and all of it is in the keeper's memory.
 */

#ifndef SYS_H
#define SYS_H

#include <stddef.h>
#include <stdint.h>

#include <asm/unistd.h>

#if defined(__x86_64__)

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	and $-16, %rsp\n"
	"	call launch\n"
	"	hlt\n");

static inline long sys6(long nr, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

#elif defined(__aarch64__)

__asm__(".globl _start\n"
	"_start:\n"
	"	mov x29, #0\n"
	"	bl launch\n"
	"	brk #0\n");

static inline long sys6(long nr, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc #0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
}

#else
#error "system calls of this architecture are not known"
#endif

/* sys(nr, ...): up to six arguments, and -errno if it fails. */
#define sys(...) SYS_ARGS(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define SYS_ARGS(nr, a, b, c, d, e, f, ...) \
	sys6((nr), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

void *memset(void *to, int byte, size_t n)
{
	unsigned char *p = to;

	while (n--)
		*p++ = (unsigned char)byte;
	return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
	unsigned char *p = to;
	const unsigned char *q = from;

	while (n--)
		*p++ = *q++;
	return to;
}

static size_t length(const char *s)
{
	size_t n = 0;

	while (s[n])
		n++;
	return n;
}

static int begins(const char *s, const char *prefix)
{
	while (*prefix)
		if (*s++ != *prefix++)
			return 0;
	return 1;
}

#endif
