/* The status that all processes share: errors, clocks, and who is there. */
#include "memcheck.h"
#include <signal.h>
#include <stdarg.h>
#include <sys/syscall.h>

struct status *st;
__thread struct thread *self;
int worker_index = -1;

void status_init(void)
{
	st = mmap(NULL, sizeof *st, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (st == MAP_FAILED)
		die("status: mmap: %s", strerror(errno));
	st->magic = st->magic_end = STATUS_MAGIC;
}

/* If the status itself came back wrong, no counter in it can be believed. */
void status_check(void)
{
	if (st->magic != STATUS_MAGIC || st->magic_end != STATUS_MAGIC)
		fail("status: the shared status is damaged: %#llx %#llx",
		     (unsigned long long)st->magic, (unsigned long long)st->magic_end);
}

/* say writes one line to stderr in one write, without stdio: a forked child may
 * have inherited its locks. */
static void say(const char *text)
{
	char line[600];
	int n = snprintf(line, sizeof line, "memcheck: %s\n", text);
	if (write(STDERR_FILENO, line, (size_t)n) < 0)
		return; /* a log that is gone is no memory error */
}

void fail(const char *fmt, ...)
{
	uint32_t n = atomic_fetch_add(&st->errors, 1);
	if (n >= MAX_ERRORS) /* the count goes on, the first ones stay */
		return;
	int len = snprintf(st->error[n], sizeof st->error[n], "pid %d: ", getpid());
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(st->error[n] + len, sizeof st->error[n] - (size_t)len, fmt, ap);
	va_end(ap);
	atomic_store(&st->error_ready[n], 1);
	say(st->error[n]); /* the log of the shard is a second witness */
}

void die(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	say(line);
	if (st)
		atomic_store(&st->stop, 1);
	_exit(2);
}

uint64_t now_ns(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void nap(unsigned us)
{
	struct timespec ts = {us / 1000000, (long)(us % 1000000) * 1000};
	nanosleep(&ts, NULL); /* cut short by a freeze: the caller loops anyway */
}

void thread_begin(struct thread *t, const char *name)
{
	uint32_t n = 0, unused = 0;
	/* Slots are used again, for forked children come and go. */
	while (n < MAX_SLOTS && !atomic_compare_exchange_strong(&st->slot[n].used, &unused, SLOT_SETUP)) {
		unused = 0;
		n++;
	}
	if (n == MAX_SLOTS)
		die("more than %d threads", MAX_SLOTS);
	memset(t, 0, sizeof *t);
	t->slot = &st->slot[n];
	t->slot->longest = (struct pause){0};
	t->slot->pass_ms = 0;
	t->rng = mix(((uint64_t)getpid() << 32) ^ n ^ now_ns(CLOCK_REALTIME));
	t->verify_seen = atomic_load(&st->verify_request);
	t->slot->pid = getpid();
	t->slot->tid = (int)syscall(SYS_gettid);
	snprintf(t->slot->name, sizeof t->slot->name, "%d/%s", worker_index, name);
	atomic_store(&t->slot->verify_seen, t->verify_seen);
	atomic_store(&t->slot->reset_seen, atomic_load(&st->reset_request));
	self = t;
	tick_forgive();
	atomic_store(&t->slot->used, SLOT_LIVE);
}

/* thread_end is for an orderly end only: a thread that vanished otherwise
 * stays in the list, and a verification that waits for it fails. */
void thread_end(struct thread *t)
{
	atomic_store(&t->slot->used, SLOT_FREE);
	self = NULL;
}

void tick_forgive(void)
{
	self->mono = now_ns(CLOCK_MONOTONIC);
	self->boot = now_ns(CLOCK_BOOTTIME);
	self->real = now_ns(CLOCK_REALTIME);
}

void tick(void)
{
	struct thread *t = self;
	struct slot *s = t->slot;
	uint64_t mono = t->mono, boot = t->boot, real = t->real;
	tick_forgive();
	atomic_fetch_add_explicit(&s->ticks, 1, memory_order_relaxed);
	if (t->mono < mono || t->boot < boot) {
		count(&st->clock_backwards, 1);
		if (!opt.clock_may_jump)
			fail("clock: went back by %lld ns (monotonic) and %lld ns (boot time)",
			     (long long)(mono - t->mono), (long long)(boot - t->boot));
		return;
	}
	uint32_t reset = atomic_load(&st->reset_request);
	struct pause p = {t->mono - mono, t->boot - boot, t->real > real ? t->real - real : 0, real};
	bool clear = atomic_load_explicit(&s->reset_seen, memory_order_relaxed) != reset;
	if (!clear && p.mono_ns <= s->longest.mono_ns)
		return;
	atomic_fetch_add(&s->seq, 1);
	s->longest = p; /* after a reset too: this gap ended after it */
	atomic_fetch_add(&s->seq, 1);
	/* After the change: whoever sees the reset answered also sees it done. */
	atomic_store(&s->reset_seen, reset);
}

bool verify_wanted(void)
{
	return atomic_load_explicit(&st->verify_request, memory_order_relaxed) != self->verify_seen;
}

void verify_done(void)
{
	/* One more request may have come meanwhile; its pass is still to be made. */
	self->verify_seen++;
	atomic_store(&self->slot->verify_seen, self->verify_seen);
}

enum damage corrupt_kind(enum feature f)
{
	if (!opt.corrupt[0] || worker_index != 0 || atomic_load_explicit(&st->corrupt_armed, memory_order_relaxed) != 1)
		return D_NONE;
	if (strcmp(feature_names[f], opt.corrupt) != 0)
		return D_NONE;
	uint32_t armed = 1;
	if (!atomic_compare_exchange_strong(&st->corrupt_armed, &armed, 2))
		return D_NONE;
	return opt.damage;
}
