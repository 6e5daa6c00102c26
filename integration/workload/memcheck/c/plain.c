/* Plain memory: one mapping a worker, whose pages all of its threads write,
 * interleaved, at a given rate, and verify on the way round. */
#include "memcheck.h"

static uint8_t *plain;
static size_t plain_pages;

void plain_setup(void)
{
	plain_pages = opt.size / PAGE / opt.procs;
	if (plain_pages < opt.threads * 32)
		plain_pages = opt.threads * 32;
	plain = mmap(NULL, plain_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (plain == MAP_FAILED)
		die("plain: mmap of %zu pages: %s", plain_pages, strerror(errno));
}

/* due tells how many of something, wanted at `per_second`, the time since the
 * last call asks for. What a pause would have asked for is forgotten beyond
 * 50 ms: after a blackout the program goes on, it does not catch up. */
static uint64_t due(double per_second, uint64_t *last, double *rest)
{
	uint64_t now = self->mono, gap = now - *last;
	*last = now;
	if (gap > 50000000)
		gap = 50000000;
	*rest += per_second * (double)gap / 1e9;
	uint64_t n = (uint64_t)*rest;
	*rest -= (double)n;
	return n;
}

void *plain_thread(void *arg)
{
	size_t index = (size_t)arg;
	struct thread t;
	struct region r;
	thread_begin(&t, "plain");
	region_init(&r, F_PLAIN, "plain", plain + index * PAGE, plain_pages / opt.threads);
	r.stride = opt.threads;
	/* One page in 16 is never written, one in 16 only later: holes and zero
	 * pages are part of every real heap. */
	for (size_t k = 0; k < r.pages; k++)
		if (k % 16 != 7 && k % 16 != 15)
			page_stamp(&r, k);
	size_t hot = r.pages * opt.hot / 100;
	double writes_rest = 0, checks_rest = 0;
	double writes_rate = (double)opt.rate / PAGE / opt.procs / opt.threads;
	double checks_rate = (double)r.pages * 1000 / opt.verify_ms;
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	uint64_t writes_last = t.mono, checks_last = t.mono, pass_began = t.mono;
	while (!stopping()) {
		tick();
		uint64_t writes = due(writes_rate, &writes_last, &writes_rest);
		uint64_t checks = due(checks_rate, &checks_last, &checks_rest);
		if (verify_wanted()) {
			region_check_all(&r);
			verify_done();
		}
		enum damage d = corrupt_kind(F_PLAIN);
		if (d)
			region_damage(&r, d);
		for (uint64_t i = 0; i < writes; i++) {
			size_t k = rnd_below(hot);
			if (k % 16 == 7)
				continue;
			page_write(&r, k);
			if (i % 16 == 15)
				tick();
		}
		for (uint64_t i = 0; i < checks; i++) {
			region_check(&r, r.cursor);
			if (++r.cursor == r.pages) {
				r.cursor = 0;
				region_check_cells(&r);
				atomic_store(&t.slot->pass_ms, (t.mono - pass_began) / 1000000);
				pass_began = t.mono;
			}
			if (i % 16 == 15)
				tick();
		}
		count(&st->steps[F_PLAIN], 1);
		nap(1000);
	}
	thread_end(&t);
	return NULL;
}

void *watch_thread(void *arg)
{
	struct thread t;
	(void)arg;
	thread_begin(&t, "watch");
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	while (!stopping()) {
		tick();
		status_check();
		if (verify_wanted())
			verify_done(); /* it owns no memory */
		nap(500);
	}
	thread_end(&t);
	return NULL;
}
