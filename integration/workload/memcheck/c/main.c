/* Options, processes, and their end. */
#include "memcheck.h"
#include <getopt.h>
#include <malloc.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

const char *const feature_names[F_COUNT] = {
	"plain", "maps", "heap", "stack", "thp", "sparse", "regs", "fork",
	"shared", "pipe", "socket", "loopback", "eventfd", "signal", "timer", "timerfd",
	"memfd", "shm", "private", "mapped", "log", "unlinked",
};
static const char *const damage_names[] = {"", "bit", "zero", "stale", "swap", "lost"};
#define GROUP(first, last) (((2ull << (last)) - 1) & ~((1ull << (first)) - 1))

struct options opt = {
	.size = 64 << 20, .rate = 8 << 20, .hot = 100, .compressible = 50,
	.procs = 2, .threads = 2, .verify_ms = 3000, .sparse = 16ull << 30,
	.dir = "/tmp/memcheck", .listen = "0.0.0.0:7070",
	.corrupt_after_ms = 1000, .features = (1ull << F_COUNT) - 1,
};

static pid_t worker[MAX_PROCS];

/* ---- options ---------------------------------------------------------------- */

static uint64_t parse_size(const char *name, const char *text)
{
	char *end;
	errno = 0;
	double v = strtod(text, &end);
	static const struct { const char *unit; double factor; } units[] = {
		{"", 1}, {"B", 1}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"k", 1 << 10}, {"m", 1 << 20}, {"g", 1 << 30},
		{"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"KB/s", 1e3}, {"MB/s", 1e6}, {"MiB/s", 1 << 20},
	};
	for (size_t i = 0; end != text && errno == 0 && v >= 0 && i < sizeof units / sizeof *units; i++)
		if (strcmp(end, units[i].unit) == 0 && v * units[i].factor < 1e15)
			return (uint64_t)(v * units[i].factor);
	die("--%s: %s is not a size (64MiB, 1GiB, 8MB/s, …)", name, text);
}

static unsigned parse_number(const char *name, const char *text, unsigned min, unsigned max)
{
	char *end;
	unsigned long v = strtoul(text, &end, 10);
	if (end == text || *end || v < min || v > max)
		die("--%s: %s is not a number from %u to %u", name, text, min, max);
	return (unsigned)v;
}

static uint64_t parse_features(char *list)
{
	uint64_t set = list[0] == '-' ? (1ull << F_COUNT) - 1 : 0;
	char *save = NULL;
	for (char *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
		bool minus = *name == '-';
		int f = 0;
		if (strcmp(name + minus, "all") == 0) {
			set = minus ? 0 : (1ull << F_COUNT) - 1;
			continue;
		}
		while (f < F_COUNT && strcmp(name + minus, feature_names[f]))
			f++;
		if (f == F_COUNT)
			die("--features: there is no %s", name + minus);
		set = minus ? set & ~(1ull << f) : set | 1ull << f;
	}
	return set;
}

static void usage(void)
{
	printf("memcheck [options]: a program that checks its own memory\n"
	       "  --size 64MiB        plain memory over all processes\n"
	       "  --rate 8MiB/s       how much of it is rewritten a second\n"
	       "  --hot 100           percent of it that is ever rewritten\n"
	       "  --compressible 50   percent of each page that compresses away\n"
	       "  --procs 2           worker processes; each has a peer besides\n"
	       "  --threads 2         plain threads in each\n"
	       "  --verify 3000       ms in which every page is looked at\n"
	       "  --sparse 16GiB      size of the sparse reservation\n"
	       "  --features LIST     a,b,c or all,-a,-b; of:\n                     ");
	for (int f = 0; f < F_COUNT; f++)
		printf(" %s%s", feature_names[f], f == F_COUNT / 2 ? "\n                     " : "");
	printf("\n  --dir /tmp/memcheck directory in the writable layer\n"
	       "  --listen 0.0.0.0:7070  control port: stat verify reset mark quit\n"
	       "  --clock-may-jump    CLOCK_MONOTONIC going back is no error\n"
	       "  --corrupt FEATURE[:bit|zero|stale|swap|lost]  damage something, to see it found\n"
	       "  --corrupt-after 1000   ms\n");
}

static void parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{"size", 1, 0, 's'}, {"rate", 1, 0, 'r'}, {"hot", 1, 0, 'h'}, {"compressible", 1, 0, 'C'}, {"procs", 1, 0, 'p'},
		{"threads", 1, 0, 't'}, {"verify", 1, 0, 'v'}, {"sparse", 1, 0, 'S'}, {"features", 1, 0, 'f'}, {"dir", 1, 0, 'd'},
		{"listen", 1, 0, 'l'}, {"clock-may-jump", 0, 0, 'j'}, {"corrupt", 1, 0, 'c'}, {"corrupt-after", 1, 0, 'a'},
		{"help", 0, 0, 'H'}, {0},
	};
	for (int c, i; (c = getopt_long(argc, argv, "", longs, &i)) != -1;)
		switch (c) {
		case 's': opt.size = parse_size("size", optarg); break;
		case 'r': opt.rate = parse_size("rate", optarg); break;
		case 'h': opt.hot = parse_number("hot", optarg, 1, 100); break;
		case 'C': opt.compressible = parse_number("compressible", optarg, 0, 100); break;
		case 'p': opt.procs = parse_number("procs", optarg, 1, MAX_PROCS); break;
		case 't': opt.threads = parse_number("threads", optarg, 1, 32); break;
		case 'v': opt.verify_ms = parse_number("verify", optarg, 100, 3600000); break;
		case 'S': opt.sparse = parse_size("sparse", optarg) >> 24 << 24; break;
		case 'f': opt.features = parse_features(optarg); break;
		case 'd': opt.dir = optarg; break;
		case 'l': snprintf(opt.listen, sizeof opt.listen, "%s", optarg); break;
		case 'j': opt.clock_may_jump = true; break;
		case 'c': snprintf(opt.corrupt, sizeof opt.corrupt, "%s", optarg); break;
		case 'a': opt.corrupt_after_ms = parse_number("corrupt-after", optarg, 0, 3600000); break;
		case 'H': usage(); exit(0);
		default: exit(2);
		}
	if (optind != argc)
		die("%s: there are no arguments besides options", argv[optind]);
	if (opt.sparse < 16 << 20)
		opt.sparse = 16 << 20;
	/* plain threads + watch maps regs fork files ipc + children, peer */
	if (opt.procs * (opt.threads + 10) > MAX_SLOTS)
		die("%u processes with %u threads are more than %d threads", opt.procs, opt.threads, MAX_SLOTS);
	if (opt.corrupt[0]) {
		char name[sizeof opt.corrupt];
		snprintf(name, sizeof name, "%s", opt.corrupt);
		char *kind = strchr(name, ':');
		if (kind)
			*kind++ = 0;
		if (!(opt.features & parse_features(name)))
			die("--corrupt: %s is not among the features", name);
		int d = D_BIT;
		while (kind && d <= D_LOST && strcmp(kind, damage_names[d]))
			d++;
		if (d > D_LOST)
			die("--corrupt: there is no damage called %s", kind);
		opt.damage = (enum damage)d;
		opt.corrupt[strlen(name)] = 0;
	}
}

/* ---- processes --------------------------------------------------------------- */

static void on_crash(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fail("died of signal %d at address %p (code %d)", sig, info->si_addr, info->si_code);
	/* SA_RESETHAND: the instruction runs again, and then it is really over */
}

static void on_stop(int sig)
{
	(void)sig;
	atomic_store(&st->stop, 1);
}

static void handlers(void)
{
	struct sigaction crash = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | (int)SA_RESETHAND};
	struct sigaction stop = {.sa_handler = on_stop, .sa_flags = SA_RESTART};
	sigset_t blocked;
	const int crashes[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
	for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++)
		sigaction(crashes[i], &crash, NULL);
	sigaction(SIGTERM, &stop, NULL);
	sigaction(SIGINT, &stop, NULL);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&blocked); /* ipc.c: signalfd, and sigtimedwait */
	sigaddset(&blocked, SIGRTMIN + 1);
	sigaddset(&blocked, SIGRTMIN + 2);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
}

static const struct { void *(*run)(void *); uint64_t features; } groups[] = {
	{watch_thread, ~0ull},
	{maps_thread, GROUP(F_MAPS, F_SPARSE)},
	{regs_thread, GROUP(F_REGS, F_REGS)},
	{fork_thread, GROUP(F_FORK, F_FORK)},
	{files_thread, GROUP(F_MEMFD, F_UNLINKED)},
	{ipc_thread, GROUP(F_SHARED, F_TIMERFD)},
};
#define GROUPS (sizeof groups / sizeof *groups)

/* expected_ready counts what reports that it is set up, in one worker. */
static unsigned expected_ready(void)
{
	unsigned n = has(F_PLAIN) ? opt.threads : 0;
	for (size_t i = 0; i < GROUPS; i++)
		n += (groups[i].features & opt.features) || groups[i].run == watch_thread;
	return n + ((GROUP(F_SHARED, F_TIMERFD) & opt.features) != 0); /* the peer */
}

static pthread_t start(void *(*run)(void *), void *arg)
{
	pthread_t t;
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 8 << 20); /* maps.c goes deep */
	int err = pthread_create(&t, &attr, run, arg);
	if (err)
		die("starting a thread: %s", strerror(err));
	return t;
}

static __attribute__((noreturn)) void worker_run(void)
{
	pthread_t thread[64 + GROUPS];
	unsigned n = 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* All of malloc in one heap at the program break, so that the break moves. */
	mallopt(M_ARENA_MAX, 1);
	mallopt(M_MMAP_THRESHOLD, 1 << 25);
	mallopt(M_TRIM_THRESHOLD, 64 << 10);
	if (GROUP(F_SHARED, F_TIMERFD) & opt.features)
		ipc_setup(); /* forks: before any thread exists */
	if (has(F_PLAIN)) {
		plain_setup();
		for (size_t i = 0; i < opt.threads; i++)
			thread[n++] = start(plain_thread, (void *)i);
	}
	for (size_t i = 0; i < GROUPS; i++)
		if ((groups[i].features & opt.features) || groups[i].run == watch_thread)
			thread[n++] = start(groups[i].run, NULL);
	while (!stopping()) {
		int status;
		if (ipc_peer && waitpid(ipc_peer, &status, WNOHANG) == ipc_peer) {
			if (!stopping())
				fail("the peer, pid %d, ended with status %#x", ipc_peer, status);
			ipc_peer = 0;
		}
		nap(20000);
	}
	while (n > 0)
		pthread_join(thread[--n], NULL);
	if (ipc_peer)
		waitpid(ipc_peer, NULL, 0);
	_exit(0);
}

/* reap notices the end of a worker. As pid 1 main also inherits orphans. */
void reap(void)
{
	int status;
	for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
		for (unsigned i = 0; i < opt.procs; i++)
			if (worker[i] == pid) {
				worker[i] = 0;
				if (!stopping())
					fail("worker %u, pid %d, ended with status %#x", i, pid, status);
			}
}

/* end waits for the workers, and then takes them by force: 10 s are far more
 * than any step takes. */
static void end(void)
{
	atomic_store(&st->stop, 1);
	for (int ms = 0; ms < 10000; ms += 5) {
		unsigned alive = 0;
		reap();
		for (unsigned i = 0; i < opt.procs; i++)
			alive += worker[i] != 0;
		if (alive == 0)
			break;
		nap(5000);
	}
	for (unsigned i = 0; i < opt.procs; i++)
		if (worker[i]) {
			fail("worker %u, pid %d, did not end", i, worker[i]);
			kill(worker[i], SIGKILL);
		}
	/* A worker that died could not remove it, and /dev/shm may be the machine's. */
	for (unsigned i = 0; i < opt.procs; i++) {
		char path[96];
		shm_path(path, sizeof path, getpid(), (int)i);
		unlink(path);
	}
}

static void await_ready(void)
{
	unsigned want = expected_ready() * opt.procs;
	while (atomic_load(&st->ready) < want) {
		reap();
		if (stopping() || atomic_load(&st->errors)) {
			end();
			exit(2);
		}
		nap(5000);
	}
}

int main(int argc, char **argv)
{
	char where[64];
	parse(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	struct stat dir;
	if ((mkdir(opt.dir, 0700) && errno != EEXIST) || stat(opt.dir, &dir))
		die("mkdir %s: %s", opt.dir, strerror(errno));
	if (!S_ISDIR(dir.st_mode))
		die("--dir: %s is not a directory", opt.dir);
	status_init();
	handlers();
	started_mono = now_ns(CLOCK_MONOTONIC);
	started_real = now_ns(CLOCK_REALTIME);
	int listener = control_listen(where, sizeof where);
	for (unsigned i = 0; i < opt.procs; i++) {
		worker_index = (int)i;
		worker[i] = fork();
		if (worker[i] < 0)
			die("fork: %s", strerror(errno));
		if (worker[i] == 0) {
			close(listener);
			worker_run();
		}
	}
	worker_index = -1;
	await_ready();
	started_mono = now_ns(CLOCK_MONOTONIC);
	printf("{\"ready\":true,\"listen\":\"%s\",\"pid\":%d}\n", where, getpid());
	fflush(stdout);
	control_run(listener);
	end();
	control_print();
	rmdir(opt.dir); /* only if it is empty, so that nobody else's files go */
	return atomic_load(&st->errors) ? 1 : 0;
}
