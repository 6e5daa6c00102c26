/* Mappings that come, go, move, change their protection, and lose pages; the
 * heap, the stack, huge pages and a big sparse reservation. One thread does all
 * of it, so that between two steps everything is as the cells say. */
#include "memcheck.h"
#include <malloc.h>
#include <sys/syscall.h>

#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

/* ---- maps: 12 slots of up to 256 pages ------------------------------------ */

#define SLOTS 12
#define SLOT_PAGES 256

struct mapslot {
	struct region r; /* cells for SLOT_PAGES; r.pages is what is mapped now */
	size_t guard_at, guard_pages;
	int guard_prot; /* PROT_NONE or PROT_READ while guard_pages != 0 */
};
static struct mapslot maps[SLOTS];

/* The kernel is asked whether it can read or write a page, for we would die of
 * trying: a system call that gets the address answers EFAULT. */
static bool readable(void *p) { return !(syscall(SYS_nanosleep, p, NULL) != 0 && errno == EFAULT); }
static bool writable(void *p) { return !(syscall(SYS_clock_getres, CLOCK_MONOTONIC, p) != 0 && errno == EFAULT); }

/* maps_unguard proves that the protection is still there, and takes it away. */
static void maps_unguard(struct mapslot *s)
{
	if (!s->guard_pages)
		return;
	uint8_t *at = s->r.at + s->guard_at * PAGE;
	for (size_t k = 0; k < s->guard_pages; k++) {
		if (s->guard_prot == PROT_NONE && readable(at + k * PAGE))
			fail("maps: page %p is PROT_NONE, but can be read", (void *)(at + k * PAGE));
		if (writable(at + k * PAGE))
			fail("maps: page %p is protected, but can be written", (void *)(at + k * PAGE));
	}
	if (mprotect(at, s->guard_pages * PAGE, PROT_READ | PROT_WRITE))
		fail("maps: mprotect back: %s", strerror(errno));
	s->guard_pages = 0;
}

static void maps_check(struct mapslot *s)
{
	for (size_t k = 0; s->r.at && k < s->r.pages; k++) {
		bool guarded = s->guard_pages && s->guard_prot == PROT_NONE &&
			       k >= s->guard_at && k < s->guard_at + s->guard_pages;
		if (!guarded && !page_check(&s->r, k, page_at(&s->r, k), NULL)) {
			maps_unguard(s);
			page_stamp(&s->r, k);
		}
	}
}

static void maps_new(struct mapslot *s)
{
	size_t n = 1 + rnd_below(SLOT_PAGES);
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED) {
		fail("maps: mmap of %zu pages: %s", n, strerror(errno));
		return;
	}
	s->r.at = p;
	s->r.pages = n;
	region_forget(&s->r, 0, SLOT_PAGES);
	for (size_t k = 0; k < n; k++)
		if (rnd_below(4))
			page_stamp(&s->r, k);
}

/* mremap_failed: the kernel refuses to resize what are two mappings by now with
 * EFAULT. That is no damage, but counted: natively a range whose protection was
 * changed and changed back is one mapping again; CRIU restores each mapping by
 * itself, and such two cannot merge any more. */
static void mremap_failed(const char *what, size_t from, size_t to)
{
	if (errno == EFAULT)
		count(&st->mremap_refused, 1);
	else
		fail("maps: mremap, %s, from %zu to %zu pages: %s", what, from, to, strerror(errno));
}

/* maps_move gives the slot n pages at a new address, chosen by us: that is what
 * a tracker by address must notice. */
static void maps_move(struct mapslot *s, size_t n)
{
	uint8_t *to = mmap(NULL, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (to == MAP_FAILED) {
		fail("maps: reserve %zu pages: %s", n, strerror(errno));
		return;
	}
	if (mremap(s->r.at, s->r.pages * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) {
		mremap_failed("elsewhere", s->r.pages, n);
		munmap(to, n * PAGE); /* perhaps done already; no other thread maps anything by now */
		return;
	}
	s->r.at = to;
	region_forget(&s->r, n < s->r.pages ? n : s->r.pages, SLOT_PAGES);
	s->r.pages = n;
}

/* maps_leave moves the pages and keeps the old mapping, which must be empty. */
static void maps_leave(struct mapslot *s)
{
	uint8_t *old = s->r.at;
	uint8_t *to = mremap(old, s->r.pages * PAGE, s->r.pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	if (to == MAP_FAILED) {
		if (errno != EINVAL) /* before Linux 5.7 */
			mremap_failed("leaving the old mapping", s->r.pages, s->r.pages);
		return;
	}
	s->r.at = to;
	for (size_t k = 0; k < s->r.pages; k += 7)
		if (((uint64_t *)(old + k * PAGE))[1])
			fail("maps: page %zu was moved away from %p, but is still there", k, (void *)old);
	munmap(old, s->r.pages * PAGE);
}

static void maps_step(void)
{
	struct mapslot *s = &maps[rnd_below(SLOTS)];
	count(&st->map_ops, 1);
	if (!s->r.at) {
		maps_new(s);
		return;
	}
	if (s->guard_pages) {
		maps_check(s);
		maps_unguard(s);
		return;
	}
	size_t from = rnd_below(s->r.pages), n = 1 + rnd_below(s->r.pages - from);
	uint8_t *at = s->r.at + from * PAGE;
	switch (rnd_below(10)) {
	case 0:
		maps_check(s);
		munmap(s->r.at, s->r.pages * PAGE);
		s->r.at = NULL;
		break;
	case 1: /* grow or shrink, where it is or elsewhere */
		maps_check(s);
		n = 1 + rnd_below(SLOT_PAGES);
		void *p = mremap(s->r.at, s->r.pages * PAGE, n * PAGE, MREMAP_MAYMOVE);
		if (p == MAP_FAILED) {
			mremap_failed("anywhere", s->r.pages, n);
			break;
		}
		s->r.at = p;
		region_forget(&s->r, n < s->r.pages ? n : s->r.pages, SLOT_PAGES);
		s->r.pages = n;
		break;
	case 2:
		maps_check(s);
		maps_move(s, 1 + rnd_below(SLOT_PAGES));
		break;
	case 3:
		maps_leave(s);
		break;
	case 4:
		region_drop(&s->r, from, n);
		break;
	case 5:
		if (madvise(at, n * PAGE, MADV_FREE) == 0)
			for (size_t k = from; k < from + n; k++)
				if (s->r.cells[k].kind == CELL_STAMP)
					region_set(&s->r, k, (struct cell){s->r.cells[k].gen, s->r.cells[k].base, CELL_FREED});
		break;
	case 6:
		madvise(at, n * PAGE, MADV_COLD); /* 5.4; advice only */
		break;
	case 7:
		s->guard_at = from;
		s->guard_pages = n;
		s->guard_prot = rnd_below(2) ? PROT_NONE : PROT_READ;
		if (mprotect(at, n * PAGE, s->guard_prot))
			fail("maps: mprotect: %s", strerror(errno));
		break;
	default:
		for (size_t k = from; k < from + n && k < from + 16; k++)
			page_write(&s->r, k);
	}
}

/* ---- heap: blocks that move the program break up and down ------------------ */

#define BLOCKS 512
static struct { uint64_t *at, key; size_t words; } block[BLOCKS];
static size_t blocks;
static bool heap_falling;

static void heap_check(size_t i)
{
	for (size_t w = 0; w < block[i].words; w++)
		if (block[i].at[w] != mix(block[i].key + w)) {
			fail("heap: word %zu of block %zu at %p is %#llx instead of %#llx", w, i, (void *)block[i].at,
			     (unsigned long long)block[i].at[w], (unsigned long long)mix(block[i].key + w));
			block[i].at[w] = mix(block[i].key + w);
			return;
		}
}

static void heap_step(void)
{
	if (blocks == BLOCKS || (blocks && rnd_below(400) == 0))
		heap_falling = true;
	if (blocks == 0)
		heap_falling = false;
	if (heap_falling) { /* last in, first out: then the break really falls */
		heap_check(--blocks);
		free(block[blocks].at);
		return;
	}
	size_t words = 8 + rnd_below(1024);
	uint64_t *p = malloc(words * 8), key = rnd();
	if (!p) {
		fail("heap: malloc of %zu bytes: %s", words * 8, strerror(errno));
		return;
	}
	for (size_t w = 0; w < words; w++)
		p[w] = mix(key + w);
	block[blocks].at = p;
	block[blocks].key = key;
	block[blocks++].words = words;
	heap_check(rnd_below(blocks));
}

/* ---- stack: frames that hold values while the program waits at the bottom --- */

static __attribute__((noinline)) uint64_t stack_descend(unsigned depth, uint64_t key, bool hold, bool damage)
{
	volatile uint64_t frame[128];
	for (unsigned i = 0; i < 128; i++)
		frame[i] = mix(key + depth * 128 + i);
	uint64_t below = 0;
	if (depth)
		below = stack_descend(depth - 1, key, hold, damage);
	else if (hold)
		for (int i = 0; i < 20; i++) { /* be here often when the freeze comes */
			nap(1000);
			tick();
		}
	if (damage && depth == 1)
		frame[17] ^= 64;
	for (unsigned i = 0; i < 128; i++)
		if (frame[i] != mix(key + depth * 128 + i))
			fail("stack: word %u of frame %u at %p is %#llx", i, depth, (void *)&frame[i], (unsigned long long)frame[i]);
	return below + depth;
}

static void stack_step(void)
{
	/* up to 1 MiB of the thread's 8 */
	unsigned depth = 2 + (unsigned)rnd_below(900);
	uint64_t sum = stack_descend(depth, rnd(), rnd_below(4) == 0, corrupt_kind(F_STACK) != D_NONE);
	if (sum != (uint64_t)depth * (depth + 1) / 2)
		fail("stack: the way back through %u frames summed to %llu", depth, (unsigned long long)sum);
}

/* ---- thp and sparse --------------------------------------------------------- */

#define HUGE (2u << 20)
static struct region thp;

static void thp_setup(void)
{
	uint8_t *p = mmap(NULL, 5 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		die("thp: mmap: %s", strerror(errno));
	p += HUGE - (uintptr_t)p % HUGE;
	madvise(p, 4 * HUGE, MADV_HUGEPAGE); /* a kernel without THP: then small pages */
	region_init(&thp, F_THP, "thp", p, 4 * HUGE / PAGE);
	for (size_t k = 0; k < thp.pages; k++)
		page_stamp(&thp, k);
}

static void thp_step(void)
{
	size_t from = rnd_below(thp.pages - 8), n = 1 + rnd_below(8);
	switch (rnd_below(64)) {
	case 0: /* splits the huge page */
		region_drop(&thp, from, n);
		break;
	case 1: /* a whole one */
		region_drop(&thp, from / 512 * 512, 512);
		break;
	case 2:
		madvise(page_at(&thp, from / 512 * 512), HUGE, MADV_COLLAPSE); /* 6.1; advice only */
		break;
	default:
		for (size_t k = from; k < from + n; k++)
			page_write(&thp, k);
	}
}

/* sparse: opt.sparse bytes are reserved, 256 pages of them used; others are
 * looked at, and are zero. */
#define SPARSE_PAGES 256
static struct region sparse;
static uint8_t *sparse_base;
static uint64_t sparse_where[SPARSE_PAGES]; /* byte offset of page k */

static void sparse_setup(void)
{
	sparse_base = mmap(NULL, opt.sparse, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (sparse_base == MAP_FAILED)
		die("sparse: reserving %llu bytes: %s (--sparse takes a smaller size)", (unsigned long long)opt.sparse, strerror(errno));
	/* Guards, as allocators have them: the reservation becomes several mappings. */
	for (unsigned i = 1; i < 8; i++)
		if (mprotect(sparse_base + opt.sparse / 8 / PAGE * PAGE * i, PAGE, PROT_NONE))
			die("sparse: mprotect: %s", strerror(errno));
	region_init(&sparse, F_SPARSE, "sparse", sparse_base, SPARSE_PAGES);
	for (size_t k = 0; k < SPARSE_PAGES; k++) /* clear of the guards, one for each stretch */
		sparse_where[k] = (opt.sparse / SPARSE_PAGES * k + PAGE + rnd_below(opt.sparse / SPARSE_PAGES - 2 * PAGE)) / PAGE * PAGE;
}

static void sparse_step(void)
{
	size_t k = rnd_below(SPARSE_PAGES);
	struct region one = sparse; /* page k seen as page k of a region that begins elsewhere */
	one.at = sparse_base + sparse_where[k] - k * PAGE;
	switch (rnd_below(8)) {
	case 0:
		region_drop(&one, k, 1);
		sparse.sum = one.sum;
		return;
	case 1: {
		/* a page nobody wrote, right before or behind one that somebody did */
		const uint64_t *w = (const uint64_t *)(sparse_base + sparse_where[k] + PAGE);
		bool last = k + 1 == SPARSE_PAGES;
		if (!last && sparse_where[k] + PAGE != sparse_where[k + 1] && sparse_where[k] + PAGE < opt.sparse / SPARSE_PAGES * (k + 1))
			for (size_t i = 0; i < WORDS; i++)
				if (w[i]) {
					fail("sparse: word %zu of an unused page at %p is %#llx", i, (const void *)w, (unsigned long long)w[i]);
					break;
				}
		return;
	}
	default:
		page_write(&one, k);
		sparse.sum = one.sum;
	}
}

static void sparse_check(size_t k)
{
	struct region one = sparse;
	one.at = sparse_base + sparse_where[k] - k * PAGE;
	region_check(&one, k);
	sparse.sum = one.sum;
}

/* ---- the thread ------------------------------------------------------------- */

static void damage(void)
{
	enum damage d;
	if ((d = corrupt_kind(F_MAPS))) {
		struct mapslot *s = &maps[0];
		maps_unguard(s);
		if (s->r.at)
			munmap(s->r.at, s->r.pages * PAGE);
		maps_new(s);
		if (s->r.pages < 2)
			maps_move(s, 2);
		page_stamp(&s->r, 0);
		page_stamp(&s->r, 1);
		if (d == D_LOST) { /* the protection is lost, the content is right */
			s->guard_at = 0, s->guard_pages = 1, s->guard_prot = PROT_NONE;
			maps_unguard(s);
		} else {
			region_damage(&s->r, d);
			maps_check(s);
		}
	}
	if (blocks && (d = corrupt_kind(F_HEAP)))
		block[blocks / 2].at[block[blocks / 2].words / 2] ^= 1ull << 40;
	if ((d = corrupt_kind(F_THP)))
		region_damage(&thp, d);
	if ((d = corrupt_kind(F_SPARSE))) {
		struct region one = sparse;
		one.at = sparse_base + sparse_where[0];
		page_stamp(&one, 0);
		one.pages = 1;
		region_damage(&one, d);
		sparse.sum = one.sum;
	}
}

void *maps_thread(void *arg)
{
	struct thread t;
	size_t thp_cursor = 0;
	(void)arg;
	thread_begin(&t, "maps");
	for (int i = 0; has(F_MAPS) && i < SLOTS; i++) {
		region_init(&maps[i].r, F_MAPS, "maps", NULL, SLOT_PAGES);
		maps_new(&maps[i]);
	}
	if (has(F_THP))
		thp_setup();
	if (has(F_SPARSE))
		sparse_setup();
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	for (uint64_t n = 0; !stopping(); n++) {
		tick();
		damage();
		bool all = verify_wanted();
		/* The steps are few, because --rate shall say how much is written: about
		 * 4 MB/s in all come from here. */
		if (has(F_MAPS)) {
			if (n % 8 == 0) {
				maps_step();
				count(&st->steps[F_MAPS], 1);
			}
			for (int i = 0; i < SLOTS; i++)
				if (all || n % (16 * SLOTS) == 16u * (unsigned)i) {
					maps_check(&maps[i]);
					region_check_cells(&maps[i].r);
					tick();
				}
		}
		if (has(F_HEAP)) {
			heap_step();
			count(&st->steps[F_HEAP], 1);
			for (size_t i = 0; all && i < blocks; i++)
				heap_check(i);
			if (blocks && n % 2)
				heap_check(n / 2 % blocks);
		}
		if (has(F_STACK) && n % 8 == 0) {
			stack_step();
			count(&st->steps[F_STACK], 1);
		}
		if (has(F_THP)) {
			if (n % 4 == 0) {
				thp_step();
				count(&st->steps[F_THP], 1);
			}
			for (int i = 0; i < 8; i++, thp_cursor++)
				region_check(&thp, thp_cursor % thp.pages);
			if (all)
				region_check_all(&thp);
		}
		if (has(F_SPARSE)) {
			sparse_step();
			count(&st->steps[F_SPARSE], 1);
			sparse_check(n % SPARSE_PAGES);
			for (size_t k = 0; all && k < SPARSE_PAGES; k++)
				sparse_check(k);
			if (all)
				region_check_cells(&sparse);
		}
		if (all)
			verify_done();
		nap(2000);
	}
	thread_end(&t);
	return NULL;
}
