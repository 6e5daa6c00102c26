// A process that does one thing which an interruption could disturb. It says
// "ready" on its standard output, does it, and says "ok", or what was wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/rseq.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t handled;
static void handler(int sig) { handled++; }

static void on(int sig, int flags)
{
	struct sigaction sa = {.sa_handler = handler, .sa_flags = flags};
	sigaction(sig, &sa, NULL);
}

static void ready(void) { (void)!write(1, "ready\n", 6); }

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int fail(const char *what, long got)
{
	printf("%s: %ld (%s)\n", what, got, strerror(errno));
	return 1;
}

// A wait of one second, which must last as long.
static int waited(double began, long got, long want)
{
	double took = now() - began;
	if (got != want)
		return fail("result", got);
	if (took < 0.99 || took > 3) {
		printf("waited %f s instead of 1\n", took);
		return 1;
	}
	return 0;
}

static int do_read(void)
{
	char c;
	ready();
	long n = read(0, &c, 1);
	return n == 1 && c == 'x' ? 0 : fail("read", n);
}

// A handler without SA_RESTART makes read return EINTR, one with it does not.
static int do_read_signal(void)
{
	char c;
	on(SIGUSR1, 0);
	on(SIGUSR2, SA_RESTART);
	ready();
	while (handled == 0 || !(errno == EINTR)) {
		errno = 0;
		long n = read(0, &c, 1);
		if (n != -1)
			return fail("read", n);
		if (errno != EINTR)
			return fail("read", n);
	}
	ready();
	long n = read(0, &c, 1);
	return n == 1 && handled == 2 ? 0 : fail("second read", n * 100 + handled);
}

static int do_futex(void)
{
	static uint32_t word;
	struct timespec t = {1, 0};
	ready();
	double began = now();
	long r = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, NULL, 0);
	if (r != -1 || errno != ETIMEDOUT)
		return fail("futex", r);
	return waited(began, 0, 0);
}

static int do_nanosleep(void)
{
	struct timespec t = {1, 0};
	ready();
	double began = now();
	return waited(began, nanosleep(&t, NULL), 0);
}

static int do_poll(void)
{
	struct pollfd p = {.fd = 0, .events = POLLIN};
	ready();
	double began = now();
	return waited(began, poll(&p, 1, 1000), 0);
}

static int do_ppoll(void)
{
	struct pollfd p = {.fd = 0, .events = POLLIN};
	sigset_t block, open;
	sigemptyset(&block);
	sigaddset(&block, SIGUSR1);
	sigprocmask(SIG_BLOCK, &block, &open);
	on(SIGUSR1, 0);
	ready();
	long n = ppoll(&p, 1, NULL, &open);
	if (n != -1 || errno != EINTR || handled != 1)
		return fail("ppoll", n * 100 + handled);
	sigset_t after;
	sigprocmask(SIG_BLOCK, NULL, &after);
	return sigismember(&after, SIGUSR1) ? 0 : fail("mask", 0);
}

static int do_select(void)
{
	fd_set set;
	FD_ZERO(&set);
	FD_SET(0, &set);
	struct timeval t = {1, 0};
	ready();
	double began = now();
	return waited(began, select(1, &set, NULL, NULL, &t), 0);
}

static long epoll(sigset_t *mask)
{
	int fd = epoll_create1(0);
	struct epoll_event e = {.events = EPOLLIN}, got;
	epoll_ctl(fd, EPOLL_CTL_ADD, 0, &e);
	ready();
	return mask ? epoll_pwait(fd, &got, 1, -1, mask) : epoll_wait(fd, &got, 1, -1);
}

static int do_epoll(void)
{
	long n = epoll(NULL);
	return n == 1 ? 0 : fail("epoll_wait", n);
}

static int do_epoll_pwait(void)
{
	sigset_t mask;
	sigfillset(&mask);
	long n = epoll(&mask);
	return n == 1 ? 0 : fail("epoll_pwait", n);
}

// A signal whose handler runs must be seen as EINTR.
static int do_epoll_signal(void)
{
	on(SIGUSR1, SA_RESTART);
	long n = epoll(NULL);
	return n == -1 && errno == EINTR && handled == 1 ? 0 : fail("epoll_wait", n * 100 + handled);
}

static int do_sigtimedwait(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	ready();
	long n = sigtimedwait(&set, NULL, NULL);
	return n == SIGUSR1 ? 0 : fail("sigtimedwait", n);
}

static int do_pause(void)
{
	on(SIGUSR1, SA_RESTART);
	ready();
	long n = pause();
	return n == -1 && errno == EINTR && handled == 1 ? 0 : fail("pause", n);
}

// Queued signals: each one counts. The sender follows them with SIGUSR1.
static volatile sig_atomic_t queued, over;
static void count(int sig) { queued++; }
static void last(int sig) { over = 1; }

static int do_signals(void)
{
	struct sigaction sa = {.sa_handler = count};
	sigaction(SIGRTMIN, &sa, NULL);
	sa.sa_handler = last;
	sigaction(SIGRTMIN + 1, &sa, NULL);
	ready();
	while (!over)
		;
	return queued == 500 ? 0 : fail("signals", queued);
}

// Registers, flags and floating point under a running loop.
static double compute(uint64_t *sum)
{
	double x = 1.0, y = 0.5;
	uint64_t a = 1, b = 2, c = 3, d = 4;
	for (long i = 0; i < 60000000; i++) {
		x = x * 1.0000001 + y;
		y = y * 0.9999999 + 1e-9 * (double)(a & 0xff);
		a = a * 6364136223846793005ULL + b;
		b ^= c + (a >> 7);
		c += d ^ (b << 3);
		d = (d >> 1) + a;
	}
	*sum = a ^ b ^ c ^ d;
	return x;
}

static int do_compute(void)
{
	uint64_t s1, s2;
	double x1 = compute(&s1);
	ready();
	double x2 = compute(&s2);
	return x1 == x2 && s1 == s2 ? 0 : fail("compute", 0);
}

// The parent waits in the kernel, and cannot be stopped, until the child, which
// has the same memory, has read from standard input.
static volatile long shared[512 * 64];
static int do_vfork(void)
{
	ready();
	if (vfork() == 0) {
		char c;
		for (int i = 0; i < 64; i++)
			shared[i * 512]++;
		(void)!read(0, &c, 1);
		for (int i = 0; i < 64; i++)
			shared[i * 512 + 1]++;
		_exit(0);
	}
	char c;
	ready();
	(void)!read(0, &c, 1);
	return shared[0] == 1 && shared[1] == 1 ? 0 : fail("vfork", shared[0] * 100 + shared[1]);
}

// Threads that fork all the time. No child may see a descriptor that it should
// not have when it has lived for a while; the test looks at them from outside.
static void *forker(void *arg)
{
	for (;;) {
		pid_t pid = fork();
		if (pid == 0) {
			usleep(300000);
			_exit(0);
		}
		usleep(1000);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

static int do_forks(void)
{
	pthread_t t[3];
	for (int i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, forker, NULL);
	ready();
	char c;
	(void)!read(0, &c, 1);
	puts("ok");
	fflush(stdout);
	_exit(0);
}

static void *waiter(void *arg)
{
	char c;
	(void)!read(0, &c, 1);
	puts("ok");
	fflush(stdout);
	_exit(0);
}

static int do_leader(void)
{
	pthread_t t;
	pthread_create(&t, NULL, waiter, NULL);
	ready();
	pthread_exit(NULL);
}

#ifdef __x86_64__
// A long restartable sequence that looks at the clock all the time. Whoever
// interrupts it must make it start over: it must never come to its end after the
// clock made a leap of 80 ms.
static volatile long aborts, commits, stop;
static void stopper(int sig) { stop = 1; }

static uint64_t tsc(void)
{
	uint32_t low, high;
	__asm__ __volatile__("rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

static int do_rseq(void)
{
	signal(SIGUSR1, stopper);
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	if (__rseq_size == 0)
		return fail("no rseq", 0);
	double began = now();
	uint64_t leap = tsc();
	while (now() - began < 0.08)
		;
	leap = tsc() - leap;
	ready();
	while (!stop) {
		uint64_t longest = 0;
		__asm__ __volatile__ goto(
			".pushsection __rseq_cs, \"aw\"\n\t"
			".balign 32\n\t"
			"7:\n\t"
			".long 0, 0\n\t"
			".quad 1f, (2f - 1f), 4f\n\t"
			".popsection\n\t"
			"leaq 7b(%%rip), %%rax\n\t"
			"movq %%rax, 8(%[area])\n\t"
			"1:\n\t"
			"movq $2000, %%rcx\n\t"
			"xorq %%r9, %%r9\n\t"
			"rdtsc\n\t"
			"shlq $32, %%rdx\n\t"
			"orq %%rax, %%rdx\n\t"
			"movq %%rdx, %%r8\n\t"
			"3:\n\t"
			"rdtsc\n\t"
			"shlq $32, %%rdx\n\t"
			"orq %%rax, %%rdx\n\t"
			"movq %%rdx, %%rax\n\t"
			"subq %%r8, %%rax\n\t"
			"movq %%rdx, %%r8\n\t"
			"cmpq %%r9, %%rax\n\t"
			"cmovaq %%rax, %%r9\n\t"
			"decq %%rcx\n\t"
			"jnz 3b\n\t"
			"movq %%r9, (%[longest])\n\t"
			"2:\n\t"
			"movq $0, 8(%[area])\n\t"
			"jmp 5f\n\t"
			".long 0x53053053\n\t" // RSEQ_SIG, for the kernel to check
			"4:\n\t"
			"jmp %l[aborted]\n\t"
			"5:\n\t"
			: : [area] "r"(area), [longest] "r"(&longest) : "rax", "rcx", "rdx", "r8", "r9", "memory", "cc" : aborted);
		commits++;
		if (longest > leap)
			return fail("the end of a sequence that was interrupted", longest);
		continue;
	aborted:
		aborts++;
	}
	return commits > 0 ? 0 : fail("commits", commits);
}
#endif

int main(int argc, char **argv)
{
	struct {
		const char *name;
		int (*run)(void);
	} all[] = {
		{"read", do_read}, {"read-signal", do_read_signal}, {"futex", do_futex}, {"nanosleep", do_nanosleep},
		{"poll", do_poll}, {"ppoll", do_ppoll}, {"select", do_select}, {"epoll", do_epoll},
		{"epoll-pwait", do_epoll_pwait}, {"epoll-signal", do_epoll_signal}, {"sigtimedwait", do_sigtimedwait},
		{"pause", do_pause}, {"signals", do_signals}, {"compute", do_compute}, {"vfork", do_vfork},
		{"forks", do_forks}, {"leader", do_leader},
#ifdef __x86_64__
		{"rseq", do_rseq},
#endif
	};
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
		if (strcmp(argv[1], all[i].name))
			continue;
		if (all[i].run())
			return 1;
		puts("ok");
		return 0;
	}
	return 2;
}
