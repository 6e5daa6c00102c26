/* Children by fork, without exec: they share every page with their parent until
 * one of the two writes. Both go on writing and verifying their own copy; the
 * child says in its exit status whether all was right. */
#include "memcheck.h"
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define PAGES 256
#define CHILDREN 2

static struct region r;
static struct { pid_t pid; uint64_t reap_at; } child[CHILDREN];

/* child_run may call nothing that takes a lock: the other threads of the
 * parent are gone and may have held it. */
static __attribute__((noreturn)) void child_run(uint64_t life_ns, bool damage)
{
	struct thread t;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	uint32_t errors = atomic_load(&st->errors);
	thread_begin(&t, "child");
	r.name = "fork (child)";
	region_check_all(&r);
	if (damage)
		region_damage(&r, D_BIT);
	uint64_t until = t.mono + life_ns;
	/* Counted in naps too, for CLOCK_MONOTONIC of another machine may lie ahead or back. */
	for (uint64_t naps = 0; t.mono < until && naps < life_ns / 5000000 && !stopping(); naps++) {
		tick();
		page_write(&r, rnd_below(PAGES));
		region_check(&r, r.cursor++ % PAGES);
		if (verify_wanted()) {
			region_check_all(&r);
			verify_done();
		}
		nap(5000);
	}
	region_check_all(&r);
	thread_end(&t);
	_exit(atomic_load(&st->errors) == errors ? 0 : 1);
}

static void children_step(void)
{
	for (int i = 0; i < CHILDREN; i++) {
		if (!child[i].pid) {
			bool damage = corrupt_kind(F_FORK) != D_NONE;
			if (!damage && rnd_below(20))
				continue;
			uint64_t life = 20000000 + rnd_below(1500) * 1000000;
			pid_t pid = fork();
			if (pid == 0)
				child_run(life, damage);
			if (pid < 0) {
				fail("fork: %s", strerror(errno));
				continue;
			}
			child[i].pid = pid;
			child[i].reap_at = 0;
			count(&st->forks, 1);
			continue;
		}
		siginfo_t info = {0};
		if (waitid(P_PID, (id_t)child[i].pid, &info, WEXITED | WNOHANG | WNOWAIT)) {
			fail("fork: child %d is gone without a status: %s", child[i].pid, strerror(errno));
			child[i].pid = 0;
		} else if (info.si_pid == 0) {
			continue;
		} else if (child[i].reap_at == 0) {
			/* A zombie for a while: a migration must carry it, and its status. */
			child[i].reap_at = 1 + rnd_below(60);
		} else if (--child[i].reap_at == 0) {
			int status;
			if (waitpid(child[i].pid, &status, 0) != child[i].pid)
				fail("fork: waiting for child %d: %s", child[i].pid, strerror(errno));
			else if (!WIFEXITED(status) || (WEXITSTATUS(status) != 0 && atomic_load(&st->errors) == 0))
				fail("fork: child %d ended with status %#x", child[i].pid, status);
			child[i].pid = 0;
		}
	}
}

void *fork_thread(void *arg)
{
	struct thread t;
	(void)arg;
	thread_begin(&t, "fork");
	void *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		die("fork: mmap: %s", strerror(errno));
	region_init(&r, F_FORK, "fork (parent)", at, PAGES);
	for (size_t k = 0; k < PAGES; k++)
		page_stamp(&r, k);
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	while (!stopping()) {
		tick();
		children_step();
		page_write(&r, rnd_below(PAGES));
		region_check(&r, r.cursor++ % PAGES);
		count(&st->steps[F_FORK], 1);
		if (verify_wanted()) {
			region_check_all(&r);
			verify_done();
		}
		nap(5000);
	}
	for (int i = 0; i < CHILDREN; i++) /* they see the stop themselves */
		if (child[i].pid)
			waitpid(child[i].pid, NULL, 0);
	thread_end(&t);
	return NULL;
}
