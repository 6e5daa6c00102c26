/* Pages that say who they are.
 *
 * word 0  generation
 * word 1  identity: region and page number (not the address: mremap moves it)
 * word 2  checksum of the two, so that a foreign or old page can be told from garbage
 * rest    derived from identity and the last full rewrite, with one word replaced
 *         for each small write since
 *
 * The owner keeps the same numbers in cells, in other memory. So a page that
 * came back older, zero, from elsewhere, or damaged is seen; only a rollback of
 * everything at once is not, and that is what marks from outside are for
 * (control.c).
 */
#include "memcheck.h"

#define BODY 3
#define SMALL_MAX (WORDS - BODY - 1) /* small writes until they would repeat a word */

static uint64_t cell_hash(size_t k, struct cell c)
{
	return mix(mix(k ^ ((uint64_t)c.kind << 56)) ^ ((uint64_t)c.gen << 32 | c.base));
}

void region_init(struct region *r, enum feature f, const char *name, void *at, size_t pages)
{
	static _Atomic uint64_t ids = 1;
	memset(r, 0, sizeof *r);
	r->name = name;
	r->feature = f;
	r->id = ((uint64_t)getpid() << 20 | atomic_fetch_add(&ids, 1)) & 0xffffffffffull;
	r->at = at;
	r->pages = r->cell_count = pages;
	r->stride = 1;
	r->cells = mmap(NULL, pages * sizeof *r->cells + PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (r->cells == MAP_FAILED)
		die("%s: mmap of the cells: %s", name, strerror(errno));
	for (size_t k = 0; k < pages; k++)
		r->sum += cell_hash(k, r->cells[k]);
}

void region_set(struct region *r, size_t k, struct cell c)
{
	r->sum += cell_hash(k, c) - cell_hash(k, r->cells[k]);
	r->cells[k] = c;
}

void region_check_cells(struct region *r)
{
	uint64_t sum = 0;
	for (size_t k = 0; k < r->cell_count; k++)
		sum += cell_hash(k, r->cells[k]);
	if (sum != r->sum)
		fail("%s: the record of what %zu pages should hold is damaged", r->name, r->pages);
}

static uint64_t identity(const struct region *r, size_t k) { return r->id << 24 | (uint64_t)k; }
static uint64_t header_sum(uint64_t gen, uint64_t ident) { return mix(gen ^ mix(ident)); }

void page_render(const struct region *r, size_t k, struct cell c, uint64_t *out)
{
	if (c.kind == CELL_ZERO) {
		memset(out, 0, PAGE);
		return;
	}
	uint64_t ident = identity(r, k), key = mix(mix(ident) ^ c.base);
	size_t same = BODY + (size_t)(WORDS - BODY) * opt.compressible / 100;
	out[0] = c.gen;
	out[1] = ident;
	out[2] = header_sum(c.gen, ident);
	for (size_t i = BODY; i < same; i++)
		out[i] = i & 15;
	for (size_t i = same; i < WORDS; i++) {
		uint64_t x = key + i * 0x9e3779b97f4a7c15ull;
		out[i] = x ^ x >> 31;
	}
	for (uint32_t g = c.base + 1; g <= c.gen; g++)
		out[BODY + g % SMALL_MAX] = mix(key ^ g);
}

void page_stamp(struct region *r, size_t k)
{
	struct cell c = {r->cells[k].gen + 1, r->cells[k].gen + 1, CELL_STAMP};
	region_set(r, k, c);
	page_render(r, k, c, page_at(r, k));
	count(&st->writes, 1);
}

void page_write(struct region *r, size_t k)
{
	/* Nothing is overwritten unseen: the write could hide the damage. */
	if (!region_check(r, k))
		return;
	struct cell c = r->cells[k];
	uint64_t dice = rnd();
	if (c.kind != CELL_STAMP || c.gen - c.base >= SMALL_MAX || dice % 4 == 0) {
		page_stamp(r, k);
		return;
	}
	uint64_t *w = page_at(r, k);
	if (dice % 64 == 1) {
		/* Zeros over content: a sender that skips zero pages would leave the
		 * old content at the destination. The generation goes on. */
		c.kind = CELL_ZERO;
		region_set(r, k, c);
		memset(w, 0, PAGE);
	} else {
		uint64_t key = mix(mix(identity(r, k)) ^ c.base);
		c.gen++;
		region_set(r, k, c);
		w[0] = c.gen;
		w[2] = header_sum(c.gen, w[1]);
		w[BODY + c.gen % SMALL_MAX] = mix(key ^ c.gen);
	}
	count(&st->writes, 1);
}

bool all_zero(const uint64_t *w)
{
	uint64_t any = 0;
	for (size_t i = 0; i < WORDS; i++)
		any |= w[i];
	return any == 0;
}

/* explain names the kind of damage: it is the first thing one wants to know. */
static void explain(const struct region *r, size_t k, struct cell c, const uint64_t *got, const uint64_t *want, const char *via)
{
	size_t i = 0, words = 0, bits = 0;
	for (size_t j = WORDS; j-- > 0;)
		if (got[j] != want[j]) {
			i = j;
			words++;
			bits += (size_t)__builtin_popcountll(got[j] ^ want[j]);
		}
	char what[160];
	if (all_zero(got))
		snprintf(what, sizeof what, "it is all zero");
	else if (got[2] == header_sum(got[0], got[1]) && got[1] != identity(r, k))
		snprintf(what, sizeof what, "it holds generation %llu of page %llu of region %llx",
			 (unsigned long long)got[0], (unsigned long long)(got[1] & 0xffffff), (unsigned long long)(got[1] >> 24));
	else if (got[2] == header_sum(got[0], got[1]) && got[0] != c.gen)
		snprintf(what, sizeof what, "it holds generation %llu", (unsigned long long)got[0]);
	else
		snprintf(what, sizeof what, "%zu words and %zu bits differ", words, bits);
	fail("%s: page %zu at %p%s%s should hold generation %u (base %u, kind %u), but %s; word %zu is %#llx instead of %#llx",
	     r->name, k, (const void *)page_at(r, k), via ? " seen through " : "", via ? via : "", c.gen, c.base, c.kind, what,
	     i, (unsigned long long)got[i], (unsigned long long)want[i]);
}

bool page_check(struct region *r, size_t k, const void *at, const char *via)
{
	uint64_t want[WORDS];
	const uint64_t *got = at;
	struct cell c = r->cells[k];
	count(&st->verified, 1);
	if (c.kind == CELL_FREED) {
		if (all_zero(got)) {
			c.kind = CELL_ZERO; /* once dropped it cannot come back */
			region_set(r, k, c);
			return true;
		}
	}
	page_render(r, k, c, want);
	if (memcmp(want, got, PAGE) == 0)
		return true;
	uint64_t copy[WORDS]; /* as it was: the words may be shared with another process */
	memcpy(copy, got, PAGE);
	explain(r, k, c, copy, want, via);
	return false;
}

bool region_check(struct region *r, size_t k)
{
	if (page_check(r, k, page_at(r, k), NULL))
		return true;
	page_stamp(r, k);
	return false;
}

void region_forget(struct region *r, size_t from, size_t to)
{
	for (size_t k = from; k < to; k++)
		region_set(r, k, (struct cell){r->cells[k].gen, 0, CELL_ZERO});
}

void region_drop(struct region *r, size_t from, size_t n)
{
	for (size_t k = from; k < from + n; k++)
		region_check(r, k);
	if (madvise(page_at(r, from), n * PAGE, MADV_DONTNEED))
		fail("%s: MADV_DONTNEED of %zu pages: %s", r->name, n, strerror(errno));
	region_forget(r, from, from + n);
}

void region_check_all(struct region *r)
{
	for (size_t k = 0; k < r->pages; k++) {
		region_check(r, k);
		if (k % 16 == 15)
			tick();
	}
	region_check_cells(r);
}

/* region_damage does what a bad migration could do to memory. */
void region_damage(struct region *r, enum damage d)
{
	size_t k = 0;
	while (k + 1 < r->pages && (r->cells[k].kind != CELL_STAMP || r->cells[k + 1].kind != CELL_STAMP))
		k++;
	uint64_t *w = page_at(r, k), tmp[WORDS];
	struct cell old = r->cells[k];
	switch (d) {
	case D_ZERO:
		memset(w, 0, PAGE);
		break;
	case D_STALE:
		page_stamp(r, k);
		page_render(r, k, old, w);
		break;
	case D_SWAP:
		memcpy(tmp, w, PAGE);
		memcpy(w, page_at(r, k + 1), PAGE);
		memcpy(page_at(r, k + 1), tmp, PAGE);
		break;
	default:
		((uint8_t *)w)[1 + rnd_below(PAGE - 1)] ^= (uint8_t)(1u << rnd_below(8));
	}
}
