/* Memory that a file stands behind, and files themselves: a memfd with two
 * mappings, a file in /dev/shm, a private and a shared mapping of layer files, a
 * log with fsync'd records, and a file without a name. */
#include "memcheck.h"
#include <fcntl.h>
#include <sys/stat.h>

#define PAGES 128

static char path_shm[96], path_private[320], path_mapped[320], path_log[320], path_old[330];

static int open_file(const char *path, int flags)
{
	int fd = open(path, flags | O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die("open %s: %s", path, strerror(errno));
	return fd;
}

static uint8_t *map_file(int fd, int flags, const char *what)
{
	void *p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (p == MAP_FAILED)
		die("%s: mmap: %s", what, strerror(errno));
	return p;
}

/* pages_by_fd checks page k as a system call reads it, not as the mapping shows it. */
static void check_by_fd(struct region *r, size_t k, int fd, const char *via)
{
	uint64_t buf[WORDS];
	ssize_t n = pread(fd, buf, PAGE, (off_t)(k * PAGE));
	if (n != PAGE)
		fail("%s: reading page %zu through %s: got %zd bytes: %s", r->name, k, via, n, n < 0 ? strerror(errno) : "short");
	else if (!page_check(r, k, buf, via))
		page_stamp(r, k);
}

/* write_by_fd gives page k its next content by pwrite. */
static void write_by_fd(struct region *r, size_t k, int fd)
{
	uint64_t buf[WORDS];
	struct cell c = {r->cells[k].gen + 1, r->cells[k].gen + 1, CELL_STAMP};
	region_set(r, k, c);
	page_render(r, k, c, buf);
	if (pwrite(fd, buf, PAGE, (off_t)(k * PAGE)) != PAGE)
		fail("%s: pwrite of page %zu: %s", r->name, k, strerror(errno));
	count(&st->writes, 1);
}

/* resize cuts the file to `keep` pages and makes it long again: the rest must
 * read as zeros. Nobody touches the mapping between the two calls. */
static void resize(struct region *r, int fd, size_t keep)
{
	for (size_t k = keep; k < PAGES; k++)
		region_check(r, k);
	if (ftruncate(fd, (off_t)(keep * PAGE)) || ftruncate(fd, PAGES * PAGE))
		fail("%s: ftruncate: %s", r->name, strerror(errno));
	region_forget(r, keep, PAGES);
}

/* ---- memfd and /dev/shm ------------------------------------------------------ */

static struct region memfd_r, shm_r;
static int memfd_fd, shm_fd;
static uint8_t *memfd_alias;

static void memfd_setup(void)
{
	memfd_fd = memfd_create("memcheck", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (memfd_fd < 0 || ftruncate(memfd_fd, PAGES * PAGE))
		die("memfd: %s", strerror(errno));
	region_init(&memfd_r, F_MEMFD, "memfd", map_file(memfd_fd, MAP_SHARED, "memfd"), PAGES);
	memfd_alias = map_file(memfd_fd, MAP_SHARED, "memfd");
	if (fcntl(memfd_fd, F_ADD_SEALS, F_SEAL_SEAL))
		die("memfd: F_ADD_SEALS: %s", strerror(errno));
}

static void memfd_check(size_t k)
{
	region_check(&memfd_r, k);
	if (!page_check(&memfd_r, k, memfd_alias + k * PAGE, "the second mapping"))
		page_stamp(&memfd_r, k);
	check_by_fd(&memfd_r, k, memfd_fd, "the descriptor");
}

static void memfd_step(void)
{
	size_t k = rnd_below(PAGES), n = 1 + rnd_below(PAGES - k);
	int seals = fcntl(memfd_fd, F_GET_SEALS);
	if (seals != F_SEAL_SEAL)
		fail("memfd: the seals are %#x", seals);
	memfd_check(k);
	switch (rnd_below(64)) {
	case 0:
		for (size_t i = k; i < k + n; i++)
			region_check(&memfd_r, i);
		if (fallocate(memfd_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(k * PAGE), (off_t)(n * PAGE)))
			fail("memfd: punching a hole: %s", strerror(errno));
		region_forget(&memfd_r, k, k + n);
		break;
	case 1:
		resize(&memfd_r, memfd_fd, k);
		break;
	case 2 ... 20:
		write_by_fd(&memfd_r, k, memfd_fd);
		break;
	default:
		page_write(&memfd_r, k);
	}
}

void shm_path(char *path, size_t size, pid_t main_pid, int worker)
{
	snprintf(path, size, "/dev/shm/memcheck-%d-%d", main_pid, worker);
}

static void shm_setup(void)
{
	shm_path(path_shm, sizeof path_shm, getppid(), worker_index);
	shm_fd = open_file(path_shm, 0);
	if (ftruncate(shm_fd, PAGES * PAGE))
		die("shm: ftruncate: %s", strerror(errno));
	region_init(&shm_r, F_SHM, "shm", map_file(shm_fd, MAP_SHARED, "shm"), PAGES);
}

static void shm_step(void)
{
	size_t k = rnd_below(PAGES);
	check_by_fd(&shm_r, k, shm_fd, "the descriptor");
	if (rnd_below(64) == 0)
		resize(&shm_r, shm_fd, k);
	else
		page_write(&shm_r, k);
	if (rnd_below(64) == 0) {
		/* The name still leads to the same file. */
		int fd = open(path_shm, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			fail("shm: open %s: %s", path_shm, strerror(errno));
		else
			check_by_fd(&shm_r, k, fd, "its name");
		close(fd);
	}
}

/* ---- private and mapped: mappings of files in the writable layer ------------- */

static struct region private_r, origin_r, mapped_r;
static int private_fd, mapped_fd;

static void private_setup(void)
{
	uint64_t buf[WORDS];
	private_fd = open_file(path_private, 0);
	if (ftruncate(private_fd, PAGES * PAGE))
		die("private: ftruncate: %s", strerror(errno));
	region_init(&private_r, F_PRIVATE, "private", map_file(private_fd, MAP_PRIVATE, "private"), PAGES);
	for (size_t k = 0; k < PAGES; k++) {
		struct cell c = {1, 1, CELL_STAMP};
		region_set(&private_r, k, c);
		page_render(&private_r, k, c, buf);
		if (pwrite(private_fd, buf, PAGE, (off_t)(k * PAGE)) != PAGE)
			die("private: pwrite: %s", strerror(errno));
	}
	if (fsync(private_fd))
		die("private: fsync: %s", strerror(errno));
	/* What the file holds never changes, whatever the mapping does. */
	region_init(&origin_r, F_PRIVATE, "private (the file below)", private_r.at, PAGES);
	origin_r.id = private_r.id;
	for (size_t k = 0; k < PAGES; k++)
		region_set(&origin_r, k, (struct cell){1, 1, CELL_STAMP});
}

static void private_step(void)
{
	size_t k = rnd_below(PAGES);
	uint64_t buf[WORDS];
	if (pread(private_fd, buf, PAGE, (off_t)(k * PAGE)) != PAGE)
		fail("private: reading page %zu of the file: %s", k, strerror(errno));
	else
		page_check(&origin_r, k, buf, "the descriptor");
	if (rnd_below(8) == 0) {
		region_drop(&private_r, k, 1); /* falls back to the file */
		region_set(&private_r, k, (struct cell){1, 1, CELL_STAMP});
	} else if (k % 4) { /* a quarter is never copied */
		page_write(&private_r, k);
	}
	region_check(&private_r, private_r.cursor++ % PAGES);
}

static void mapped_setup(void)
{
	mapped_fd = open_file(path_mapped, 0);
	if (ftruncate(mapped_fd, PAGES * PAGE))
		die("mapped: ftruncate: %s", strerror(errno));
	region_init(&mapped_r, F_MAPPED, "mapped", map_file(mapped_fd, MAP_SHARED, "mapped"), PAGES);
	for (size_t k = 0; k < PAGES; k++)
		page_stamp(&mapped_r, k);
}

static void mapped_step(void)
{
	size_t k = rnd_below(PAGES);
	check_by_fd(&mapped_r, k, mapped_fd, "the descriptor");
	page_write(&mapped_r, k);
	check_by_fd(&mapped_r, k, mapped_fd, "the descriptor");
	region_check(&mapped_r, mapped_r.cursor++ % PAGES);
	if (rnd_below(256) == 0) {
		if (msync(mapped_r.at, PAGES * PAGE, MS_SYNC))
			fail("mapped: msync: %s", strerror(errno));
		tick_forgive();
	}
}

/* ---- log: records appended at the file offset, each fsync'd ------------------- */

#define RECORD_WORDS 64
#define LOG_RECORDS 1024 /* then a new file begins; the last one stays as .old */

static int log_fd;
static uint64_t log_key, log_seq, log_begin, log_old_begin = UINT64_MAX, log_cursor;

static void record_render(uint64_t seq, uint64_t *out)
{
	uint64_t sum = 0;
	out[0] = seq;
	for (size_t i = 1; i < RECORD_WORDS - 1; i++)
		sum ^= out[i] = mix(log_key ^ (seq << 8 | i));
	out[RECORD_WORDS - 1] = mix(sum ^ seq);
}

static void record_check(int fd, const char *path, uint64_t begin, uint64_t seq)
{
	uint64_t want[RECORD_WORDS], got[RECORD_WORDS];
	record_render(seq, want);
	ssize_t n = pread(fd, got, sizeof got, (off_t)((seq - begin) * sizeof got));
	if (n != sizeof got)
		fail("log: record %llu of %s: got %zd bytes: %s", (unsigned long long)seq, path, n, n < 0 ? strerror(errno) : "the file is short");
	else if (memcmp(want, got, sizeof got))
		fail("log: record %llu of %s says it is %llu, and differs", (unsigned long long)seq, path, (unsigned long long)got[0]);
	count(&st->verified, 1);
}

/* log_check reads both files by their names, as another program would. */
static void log_check(void)
{
	const char *paths[] = {path_old, path_log};
	uint64_t begin[] = {log_old_begin, log_begin}, end[] = {log_begin, log_seq};
	for (int i = 0; i < 2; i++) {
		if (begin[i] == UINT64_MAX)
			continue;
		int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
		struct stat s;
		if (fd < 0 || fstat(fd, &s)) {
			fail("log: open %s: %s", paths[i], strerror(errno));
			continue;
		}
		if ((uint64_t)s.st_size != (end[i] - begin[i]) * RECORD_WORDS * 8)
			fail("log: %s has %lld bytes instead of %llu records", paths[i], (long long)s.st_size, (unsigned long long)(end[i] - begin[i]));
		for (uint64_t seq = begin[i]; seq < end[i]; seq++) {
			record_check(fd, paths[i], begin[i], seq);
			if (seq % 64 == 63)
				tick();
		}
		close(fd);
	}
}

static void log_step(bool lose)
{
	uint64_t rec[RECORD_WORDS];
	if (log_seq - log_begin == LOG_RECORDS) {
		log_check();
		close(log_fd);
		if (rename(path_log, path_old))
			fail("log: rename %s: %s", path_log, strerror(errno));
		log_fd = open_file(path_log, 0);
		log_old_begin = log_begin;
		log_begin = log_seq;
	}
	off_t at = lseek(log_fd, 0, SEEK_CUR), want = (off_t)((log_seq - log_begin) * sizeof rec);
	if (at != want) {
		fail("log: the file offset is %lld instead of %lld", (long long)at, (long long)want);
		lseek(log_fd, want, SEEK_SET);
	}
	record_render(log_seq, rec);
	if (lose) /* acknowledged, but not there */
		lseek(log_fd, sizeof rec, SEEK_CUR);
	else if (write(log_fd, rec, sizeof rec) != sizeof rec)
		fail("log: write: %s", strerror(errno));
	tick();
	if (fsync(log_fd))
		fail("log: fsync: %s", strerror(errno));
	tick_forgive(); /* a disk may be slow; that is no pause of ours */
	log_seq++;
	count(&st->records, 1);
	if (log_cursor < log_begin || log_cursor >= log_seq)
		log_cursor = log_begin;
	record_check(log_fd, path_log, log_begin, log_cursor++);
}

/* ---- unlinked: an open file that no name leads to ------------------------------ */

#define UNLINKED_PAGES 64 /* CRIU carries such a file in its images: keep it below its limit of 1 MiB */
static struct region unlinked_r;
static int unlinked_fd;

static void unlinked_setup(const char *path)
{
	unlinked_fd = open_file(path, 0);
	if (unlink(path) || ftruncate(unlinked_fd, UNLINKED_PAGES * PAGE))
		die("unlinked: %s: %s", path, strerror(errno));
	/* page_check names an address; there is none */
	region_init(&unlinked_r, F_UNLINKED, "unlinked", NULL, UNLINKED_PAGES);
}

static void unlinked_check(size_t k)
{
	uint64_t buf[WORDS];
	if (pread(unlinked_fd, buf, PAGE, (off_t)(k * PAGE)) != PAGE)
		fail("unlinked: reading page %zu: %s", k, strerror(errno));
	else if (!page_check(&unlinked_r, k, buf, "the descriptor"))
		write_by_fd(&unlinked_r, k, unlinked_fd);
}

static void unlinked_step(void)
{
	size_t k = rnd_below(UNLINKED_PAGES);
	struct stat s;
	if (fstat(unlinked_fd, &s) || s.st_size != UNLINKED_PAGES * PAGE)
		fail("unlinked: its size is %lld", (long long)s.st_size);
	unlinked_check(k);
	write_by_fd(&unlinked_r, k, unlinked_fd);
	unlinked_check(unlinked_r.cursor++ % UNLINKED_PAGES);
}

/* ---- the thread ------------------------------------------------------------------ */

static void damage(void)
{
	enum damage d;
	if ((d = corrupt_kind(F_MEMFD)))
		page_stamp(&memfd_r, 0), page_stamp(&memfd_r, 1), region_damage(&memfd_r, d);
	if ((d = corrupt_kind(F_SHM)))
		page_stamp(&shm_r, 0), page_stamp(&shm_r, 1), region_damage(&shm_r, d);
	if ((d = corrupt_kind(F_PRIVATE)))
		region_damage(&private_r, d);
	if ((d = corrupt_kind(F_MAPPED)))
		region_damage(&mapped_r, d);
	if ((d = corrupt_kind(F_UNLINKED))) {
		write_by_fd(&unlinked_r, 5, unlinked_fd);
		if (pwrite(unlinked_fd, "x", 1, 5 * PAGE + 100) != 1)
			die("unlinked: pwrite: %s", strerror(errno));
	}
}

static void check_all(void)
{
	for (size_t k = 0; k < PAGES; k++) {
		if (has(F_MEMFD))
			memfd_check(k);
		if (has(F_SHM))
			check_by_fd(&shm_r, k, shm_fd, "the descriptor"), region_check(&shm_r, k);
		if (has(F_PRIVATE))
			region_check(&private_r, k);
		if (has(F_MAPPED))
			check_by_fd(&mapped_r, k, mapped_fd, "the descriptor"), region_check(&mapped_r, k);
		if (has(F_UNLINKED) && k < UNLINKED_PAGES)
			unlinked_check(k);
		tick();
	}
	if (has(F_LOG))
		log_check();
}

void *files_thread(void *arg)
{
	struct thread t;
	char path[320];
	(void)arg;
	thread_begin(&t, "files");
	snprintf(path_private, sizeof path_private, "%s/private-%d", opt.dir, worker_index);
	snprintf(path_mapped, sizeof path_mapped, "%s/mapped-%d", opt.dir, worker_index);
	snprintf(path_log, sizeof path_log, "%s/log-%d", opt.dir, worker_index);
	snprintf(path_old, sizeof path_old, "%s.old", path_log);
	snprintf(path, sizeof path, "%s/unlinked-%d", opt.dir, worker_index);
	if (has(F_MEMFD))
		memfd_setup();
	if (has(F_SHM))
		shm_setup();
	if (has(F_PRIVATE))
		private_setup();
	if (has(F_MAPPED))
		mapped_setup();
	if (has(F_LOG)) {
		log_key = rnd();
		log_fd = open_file(path_log, 0);
	}
	if (has(F_UNLINKED))
		unlinked_setup(path);
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	for (uint64_t n = 0; !stopping(); n++) {
		tick();
		damage();
		if (has(F_MEMFD))
			memfd_step(), count(&st->steps[F_MEMFD], 1);
		if (has(F_SHM))
			shm_step(), count(&st->steps[F_SHM], 1);
		if (has(F_PRIVATE))
			private_step(), count(&st->steps[F_PRIVATE], 1);
		if (has(F_MAPPED))
			mapped_step(), count(&st->steps[F_MAPPED], 1);
		if (has(F_UNLINKED))
			unlinked_step(), count(&st->steps[F_UNLINKED], 1);
		if (has(F_LOG) && n % 10 == 0)
			log_step(corrupt_kind(F_LOG) != D_NONE), count(&st->steps[F_LOG], 1);
		if (verify_wanted()) {
			check_all();
			verify_done();
		}
		nap(5000);
	}
	if (has(F_SHM))
		unlink(path_shm);
	const char *const left[] = {path_private, path_mapped, path_log, path_old};
	for (size_t i = 0; i < sizeof left / sizeof *left; i++)
		unlink(left[i]); /* those that were made */
	thread_end(&t);
	return NULL;
}
