/*
 * memcheck: a program that checks its own memory while it is moved.
 *
 * Shape: main (control port, reaper) forks `procs` workers; each worker forks
 * one peer and runs one thread for each group of features. Every page, record
 * and byte that is written is also remembered somewhere else (a cell, a
 * sequence number, a register), and compared without end. What the outside may
 * know lies in one MAP_SHARED page run, struct status.
 *
 * Rules: the first error latches and nothing clears it; a thread that forked
 * children or peers may run while other threads hold libc locks, so nothing
 * after fork allocates; every wait has an end.
 */
#ifndef MEMCHECK_H
#define MEMCHECK_H

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define MAX_PROCS 32
#define MAX_SLOTS 512 /* threads of all processes */
#define MAX_ERRORS 10

/* ---- options (main.c) ---------------------------------------------------- */

enum damage { D_NONE, D_BIT, D_ZERO, D_STALE, D_SWAP, D_LOST };

struct options {
	uint64_t size;         /* bytes of plain memory, over all processes */
	uint64_t rate;         /* bytes a second that are rewritten, over all processes */
	unsigned hot;          /* percent of the plain pages that are ever rewritten */
	unsigned compressible; /* percent of each page that is the same everywhere */
	unsigned procs, threads;
	unsigned verify_ms;    /* every page is looked at this often */
	uint64_t sparse;       /* bytes of the NORESERVE reservation */
	bool clock_may_jump;   /* moved between machines: CLOCK_MONOTONIC is another one */
	const char *dir;       /* in the writable layer */
	char listen[128];
	char corrupt[48];      /* the feature that is damaged on purpose, or "" */
	enum damage damage;
	unsigned corrupt_after_ms;
	uint64_t features;
};
extern struct options opt;

enum feature {
	F_PLAIN, F_MAPS, F_HEAP, F_STACK, F_THP, F_SPARSE, F_REGS, F_FORK,
	F_SHARED, F_PIPE, F_SOCKET, F_LOOPBACK, F_EVENTFD, F_SIGNAL, F_TIMER, F_TIMERFD,
	F_MEMFD, F_SHM, F_PRIVATE, F_MAPPED, F_LOG, F_UNLINKED,
	F_COUNT
};
extern const char *const feature_names[F_COUNT];
static inline bool has(enum feature f) { return opt.features >> f & 1; }

/* ---- what the outside sees (status.c) ------------------------------------ */

struct pause {
	uint64_t mono_ns, boot_ns, real_ns; /* length by each clock */
	uint64_t at_real_ns;                /* wall clock when it began */
};

enum { SLOT_FREE, SLOT_SETUP, SLOT_LIVE };

/* One thread's place in the status. Only its owner writes, but for reset. */
struct slot {
	_Atomic uint32_t used;
	_Atomic int32_t pid, tid;
	char name[16];
	_Atomic uint32_t seq; /* odd while `longest` changes */
	struct pause longest;
	_Atomic uint32_t reset_seen;
	_Atomic uint32_t verify_seen;
	_Atomic uint64_t pass_ms;  /* age of the oldest unverified page, last pass */
	_Atomic uint64_t ticks;
};

struct status {
	uint64_t magic;
	_Atomic uint32_t stop;
	_Atomic uint32_t errors;
	_Atomic uint32_t error_ready[MAX_ERRORS];
	char error[MAX_ERRORS][320];
	_Atomic uint32_t verify_request;
	_Atomic uint32_t reset_request;
	_Atomic uint32_t corrupt_armed;
	_Atomic uint64_t verified, writes, forks, records, messages, stream_bytes;
	_Atomic uint64_t map_ops, mremap_refused, register_rounds, signals, clock_backwards;
	_Atomic uint64_t steps[F_COUNT];
	_Atomic uint32_t ready; /* threads and peers that are set up */
	struct slot slot[MAX_SLOTS];
	uint64_t magic_end;
};
#define STATUS_MAGIC 0x7472616e73686970ull
extern struct status *st;

/* fail latches an error. It may be called from any process, after fork and in
 * a signal handler of a process that is about to die. */
void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* die is for set-up: say it on stderr and end the whole program. */
void die(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
void status_init(void);
void status_check(void);
static inline bool stopping(void) { return atomic_load_explicit(&st->stop, memory_order_relaxed); }
static inline void count(_Atomic uint64_t *c, uint64_t n) { atomic_fetch_add_explicit(c, n, memory_order_relaxed); }

/* A thread that ticks. tick compares all clocks with the last tick and keeps
 * the longest gap; tick_forgive begins anew without judging, after a call that
 * is slow by itself (fsync). */
struct thread {
	struct slot *slot;
	uint64_t mono, boot, real;
	uint64_t rng;
	uint32_t verify_seen;
};
extern __thread struct thread *self;
void thread_begin(struct thread *t, const char *name);
void thread_end(struct thread *t);
void tick(void);
void tick_forgive(void);
uint64_t now_ns(clockid_t clock);
void nap(unsigned us);
/* verify_wanted says that the control port asked for a full pass that this
 * thread has not made; verify_done answers it. */
bool verify_wanted(void);
void verify_done(void);
/* corrupt_kind returns, once, how feature f of worker 0 shall be damaged: 0 for
 * not at all. The damage is done behind the back of the one who verifies. */
enum damage corrupt_kind(enum feature f);
extern int worker_index; /* -1 in main */

/* ---- pages (page.c) ------------------------------------------------------ */

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}
static inline uint64_t rnd(void) { return mix(self->rng++); }
static inline uint64_t rnd_below(uint64_t n) { return n ? rnd() % n : 0; }

enum cell_kind {
	CELL_ZERO,  /* all bytes zero: never written, dropped, or zeroed on purpose */
	CELL_STAMP, /* the stamp of `gen`, based on a full rewrite at `base` */
	CELL_FREED, /* MADV_FREE: the old stamp or zeros, the kernel may choose */
};
struct cell { uint32_t gen, base, kind; };

/* A region is a set of pages with one owner: only one thread writes it. */
struct region {
	const char *name;
	enum feature feature;
	uint64_t id;
	uint8_t *at;
	size_t pages;
	size_t first, stride; /* page k lies at at + (first + k*stride) * PAGE */
	struct cell *cells;
	uint64_t sum;    /* over the cells, so that a damaged cell is not believed */
	size_t cell_count; /* maps.c maps fewer pages than it has cells */
	size_t cursor;   /* next page of the rolling verification */
};
static inline uint64_t *page_at(const struct region *r, size_t k)
{
	return (uint64_t *)(r->at + (r->first + k * r->stride) * PAGE);
}
/* region_init makes r cover `pages` pages from `at`, all expected to be zero.
 * The cells come from mmap, never from the heap. */
void region_init(struct region *r, enum feature f, const char *name, void *at, size_t pages);
void region_set(struct region *r, size_t k, struct cell c);
void page_render(const struct region *r, size_t k, struct cell c, uint64_t *out);
/* page_write checks page k and gives it its next generation: usually a small
 * change, now and then a full rewrite or zeros. page_stamp rewrites in full,
 * unseen. */
void page_write(struct region *r, size_t k);
void page_stamp(struct region *r, size_t k);
/* page_check compares page k, as found at `got`, with its cell. A page that is
 * wrong is reported and then stamped anew, so that it counts once. */
bool page_check(struct region *r, size_t k, const void *got, const char *via);
bool region_check(struct region *r, size_t k);
/* region_forget expects zeros from now on; region_drop checks the pages, makes
 * the kernel drop them, and then expects zeros (stride 1 only). */
void region_forget(struct region *r, size_t from, size_t to);
void region_drop(struct region *r, size_t from, size_t n);
void region_check_all(struct region *r);
void region_check_cells(struct region *r);
bool all_zero(const uint64_t *page);
void region_damage(struct region *r, enum damage d);

/* ---- the groups of features; each runs in a thread of its own ------------- */

void *plain_thread(void *arg);   /* plain.c */
void *watch_thread(void *arg);   /* plain.c: sleeps and ticks, nothing else */
void plain_setup(void);
void *maps_thread(void *arg);    /* maps.c: maps heap stack thp sparse */
void *regs_thread(void *arg);    /* regs.c */
void *fork_thread(void *arg);    /* fork.c */
void *files_thread(void *arg);   /* files.c: memfd shm private mapped log unlinked */
void shm_path(char *path, size_t size, pid_t main_pid, int worker);
void ipc_setup(void);            /* ipc.c: makes the channels and forks the peer */
void *ipc_thread(void *arg);     /* shared pipe socket loopback eventfd signal timer timerfd */
extern pid_t ipc_peer;

/* ---- control.c ------------------------------------------------------------ */

int control_listen(char *where, size_t size);
void control_run(int listener);  /* returns when asked to quit */
void control_print(void);        /* the last stat, to stdout */
void reap(void);                 /* main.c: notices workers that ended */
extern uint64_t started_mono, started_real;

#endif
