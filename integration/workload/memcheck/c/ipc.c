/* A worker and its peer, a child without exec: shared memory, byte streams that
 * are never empty, an eventfd, queued signals, timers.
 *
 * They take turns. Who has the turn writes pages of its half of the shared
 * memory, adds to the eventfd, queues signals, and says in a message what it
 * did; the other one compares all of that with what it finds, and has the turn.
 * The streams run beside that, without turns.
 */
#include "memcheck.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#define HALF 128
#define NOTES 4
#define SIGNAL (SIGRTMIN + 1)
#define TIMER_SIGNAL (SIGRTMIN + 2)
#define TIMER_NS 10000000
/* Silence is counted in time that was seen to pass, at most 50 ms a look: a
 * blackout is not the peer's fault. */
#define SILENCE_NS 10000000000ull

pid_t ipc_peer;

static struct region half[2]; /* [0] the worker writes, [1] the peer */
static int channel[2] = {-1, -1}, event_fd = -1;
static bool is_peer;

/* ---- streams -------------------------------------------------------------------- */

struct stream {
	const char *name;
	enum feature feature;
	int fd[2]; /* the worker's and the peer's end */
	bool one_way;
	uint64_t key[2], wrote, read; /* bytes at this end */
};
static struct stream stream[3] = {
	{.name = "pipe", .feature = F_PIPE, .one_way = true},
	{.name = "socket", .feature = F_SOCKET},
	{.name = "loopback", .feature = F_LOOPBACK},
};

static uint8_t stream_byte(uint64_t key, uint64_t pos)
{
	return (uint8_t)(mix(key ^ pos >> 3) >> 8 * (pos & 7));
}

static void stream_write(struct stream *s)
{
	uint8_t buf[8192];
	size_t n = 1 + rnd_below(sizeof buf);
	int me = is_peer;
	for (size_t i = 0; i < n; i++)
		buf[i] = stream_byte(s->key[me], s->wrote + i);
	enum damage d = is_peer ? D_NONE : corrupt_kind(s->feature);
	if (d == D_LOST)
		s->wrote++; /* a byte that never arrives */
	else if (d)
		buf[0] ^= 4;
	ssize_t got = write(s->fd[me], buf, n);
	if (d && d != D_LOST && got <= 0)
		atomic_store(&st->corrupt_armed, 1); /* the queue was full: again */
	if (got > 0) {
		s->wrote += (uint64_t)got;
		count(&st->stream_bytes, (uint64_t)got);
	} else if (got < 0 && errno != EAGAIN && errno != EINTR && !stopping()) {
		fail("%s: write after %llu bytes: %s", s->name, (unsigned long long)s->wrote, strerror(errno));
		s->name = NULL;
	}
}

static void stream_read(struct stream *s)
{
	uint8_t buf[8192];
	int me = is_peer, queued = 0;
	/* Some bytes stay in the kernel's queue nearly always: they must move too. */
	if (ioctl(s->fd[me], FIONREAD, &queued) == 0 && queued < 16384 && rnd_below(8))
		return;
	size_t n = 1 + rnd_below(sizeof buf);
	ssize_t got = read(s->fd[me], buf, n);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got <= 0) {
		if (!stopping())
			fail("%s: read after %llu bytes: %s", s->name, (unsigned long long)s->read, got ? strerror(errno) : "closed");
		s->name = NULL;
		return;
	}
	for (ssize_t i = 0; i < got; i++)
		if (buf[i] != stream_byte(s->key[!me], s->read + (uint64_t)i)) {
			fail("%s: byte %llu is %#x instead of %#x", s->name, (unsigned long long)(s->read + (uint64_t)i), buf[i],
			     stream_byte(s->key[!me], s->read + (uint64_t)i));
			s->name = NULL;
			return;
		}
	s->read += (uint64_t)got;
}

static void streams_step(void)
{
	for (size_t i = 0; i < 3; i++) {
		struct stream *s = &stream[i];
		if (!s->name || !has(s->feature))
			continue;
		if ((!s->one_way || !is_peer) && rnd_below(4) == 0)
			stream_write(s);
		if (s->name && (!s->one_way || is_peer))
			stream_read(s);
		count(&st->steps[s->feature], 1);
	}
}

/* ---- turns ------------------------------------------------------------------------ */

struct message {
	uint64_t seq, chain, events, signals;
	struct { uint32_t page; struct cell cell; } note[NOTES];
};
static uint64_t turn_seq, turn_chain, events_total, signals_total;

static uint64_t message_chain(const struct message *m)
{
	uint64_t h = turn_chain ^ m->seq ^ m->events << 20 ^ m->signals << 40;
	for (int i = 0; i < NOTES; i++)
		h = mix(h ^ ((uint64_t)m->note[i].page << 32 | m->note[i].cell.gen));
	return h;
}

static void turn_send(void)
{
	struct message m = {.seq = ++turn_seq};
	struct region *mine = &half[is_peer];
	for (int i = 0; i < NOTES; i++) {
		size_t k = rnd_below(HALF);
		if (has(F_SHARED))
			page_write(mine, k);
		m.note[i].page = (uint32_t)k;
	}
	for (int i = 0; i < NOTES; i++) /* the same page may have been written twice */
		m.note[i].cell = mine->cells[m.note[i].page];
	if (!is_peer && has(F_EVENTFD)) {
		uint64_t add = 1 + rnd_below(1000);
		events_total += add;
		if (corrupt_kind(F_EVENTFD))
			add++;
		if (write(event_fd, &add, 8) != 8)
			fail("eventfd: write: %s", strerror(errno));
		count(&st->steps[F_EVENTFD], 1);
	}
	for (uint64_t n = rnd_below(4); !is_peer && has(F_SIGNAL) && n > 0; n--) {
		union sigval v = {.sival_int = (int)++signals_total};
		if (!corrupt_kind(F_SIGNAL) && sigqueue(ipc_peer, SIGNAL, v))
			fail("signal: queueing %llu for pid %d: %s", (unsigned long long)signals_total, ipc_peer, strerror(errno));
		count(&st->signals, 1);
		count(&st->steps[F_SIGNAL], 1);
	}
	m.events = events_total;
	m.signals = signals_total;
	turn_chain = m.chain = message_chain(&m);
	if (send(channel[is_peer], &m, sizeof m, MSG_NOSIGNAL) != sizeof m && !stopping())
		fail("shared: message %llu was not sent: %s", (unsigned long long)m.seq, strerror(errno));
	count(&st->messages, 1);
	count(&st->steps[F_SHARED], 1);
}

/* turn_receive says whether a message was there, and compares it. */
static bool turn_receive(void)
{
	struct message m;
	struct region *theirs = &half[!is_peer];
	ssize_t n = recv(channel[is_peer], &m, sizeof m, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n != sizeof m) {
		if (!stopping())
			fail("shared: message %llu: got %zd bytes: %s", (unsigned long long)turn_seq + 1, n, n < 0 ? strerror(errno) : "closed");
		nap(100000);
		return false;
	}
	if (m.seq != ++turn_seq || m.chain != message_chain(&m))
		fail("shared: message %llu came instead of %llu, or is damaged", (unsigned long long)m.seq, (unsigned long long)turn_seq);
	turn_seq = m.seq;
	turn_chain = m.chain;
	for (int i = 0; i < NOTES && has(F_SHARED); i++) {
		size_t k = m.note[i].page % HALF;
		region_set(theirs, k, m.note[i].cell);
	}
	for (int i = 0; i < NOTES && has(F_SHARED); i++)
		region_check(theirs, m.note[i].page % HALF);
	if (is_peer) {
		events_total = m.events;
		signals_total = m.signals;
	}
	return true;
}

/* While one has the turn, the other writes nothing: both halves can be checked. */
static void halves_check(bool all)
{
	if (!has(F_SHARED))
		return;
	for (int i = 0; i < 2; i++) {
		if (all)
			region_check_all(&half[i]);
		region_check(&half[i], half[i].cursor++ % HALF);
	}
}

/* ---- timers ------------------------------------------------------------------------- */

static uint64_t silent(uint64_t *since, uint64_t *total, bool heard)
{
	uint64_t gap = self->mono - *since;
	*since = self->mono;
	*total = heard ? 0 : *total + (gap > 50000000 ? 50000000 : gap);
	return *total;
}

static void timer_setup(timer_t *timer)
{
	struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = TIMER_SIGNAL};
	struct itimerspec every = {{0, TIMER_NS}, {0, TIMER_NS}};
	if (timer_create(CLOCK_MONOTONIC, &e, timer) || timer_settime(*timer, 0, &every, NULL))
		die("timer: %s", strerror(errno));
}

static bool timer_heard(timer_t timer)
{
	sigset_t set;
	siginfo_t info;
	struct timespec now = {0, 0};
	struct itimerspec left;
	sigemptyset(&set);
	sigaddset(&set, TIMER_SIGNAL);
	if (timer_gettime(timer, &left))
		fail("timer: timer_gettime: %s", strerror(errno));
	count(&st->steps[F_TIMER], 1);
	return sigtimedwait(&set, &info, &now) == TIMER_SIGNAL;
}

/* ---- the peer ------------------------------------------------------------------------- */

static uint64_t signals_seen, events_seen;

static void peer_collect(int signal_fd)
{
	struct signalfd_siginfo info;
	while (signal_fd >= 0 && read(signal_fd, &info, sizeof info) == sizeof info)
		if ((uint32_t)info.ssi_int != (uint32_t)++signals_seen) {
			fail("signal: %u came instead of %u", (uint32_t)info.ssi_int, (uint32_t)signals_seen);
			signals_seen = (uint32_t)info.ssi_int;
		}
	uint64_t add;
	if (event_fd >= 0 && read(event_fd, &add, 8) == 8)
		events_seen += add;
}

static void epoll_add(int ep, int fd)
{
	struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e))
		die("epoll: %s", strerror(errno));
}

static __attribute__((noreturn)) void peer_run(void)
{
	struct thread t;
	is_peer = true;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	thread_begin(&t, "peer");
	int ep = epoll_create1(EPOLL_CLOEXEC), signal_fd = -1, timer_fd = -1;
	epoll_add(ep, channel[1]);
	for (size_t i = 0; i < 3; i++)
		if (has(stream[i].feature))
			close(stream[i].fd[0]);
	close(channel[0]);
	if (has(F_SIGNAL)) {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, SIGNAL);
		signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
		epoll_add(ep, signal_fd);
	}
	if (has(F_EVENTFD))
		epoll_add(ep, event_fd);
	if (has(F_TIMERFD)) {
		struct itimerspec every = {{0, TIMER_NS}, {0, TIMER_NS}};
		timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
		if (timer_fd < 0 || timerfd_settime(timer_fd, 0, &every, NULL))
			die("timerfd: %s", strerror(errno));
		epoll_add(ep, timer_fd);
	}
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	uint64_t timer_since = t.mono, timer_quiet = 0, turn_since = t.mono, turn_quiet = 0;
	while (!stopping()) {
		struct epoll_event ev[8];
		int n = epoll_wait(ep, ev, 8, 20);
		bool timer = false, turn = false;
		tick();
		for (int i = 0; i < n; i++) {
			uint64_t expired;
			if (ev[i].data.fd == timer_fd)
				timer = read(timer_fd, &expired, 8) == 8 && expired > 0;
			if (ev[i].data.fd == channel[1] && rnd_below(2))
				turn = turn_receive();
		}
		if (turn) {
			peer_collect(signal_fd);
			if (has(F_EVENTFD) && events_seen != events_total)
				fail("eventfd: %llu was added, %llu was read", (unsigned long long)events_total, (unsigned long long)events_seen);
			if (has(F_SIGNAL) && signals_seen != signals_total)
				fail("signal: %llu were queued, %llu came", (unsigned long long)signals_total, (unsigned long long)signals_seen);
			events_seen = events_total;
			signals_seen = signals_total;
			bool all = verify_wanted();
			halves_check(all);
			if (all)
				verify_done();
			turn_send();
		}
		if (has(F_TIMERFD)) {
			struct itimerspec off = {0};
			count(&st->steps[F_TIMERFD], 1);
			if (corrupt_kind(F_TIMERFD))
				timerfd_settime(timer_fd, 0, &off, NULL);
			/* CRIU restores a periodic timer that had expired, unread, as one that
			 * never fires again (checkpoint-restore/criu#3162). */
			if (silent(&timer_since, &timer_quiet, timer) > SILENCE_NS / 4) {
				fail("timerfd: it has not fired for %llu ms", (unsigned long long)timer_quiet / 1000000);
				timer_quiet = 0;
			}
		}
		if (silent(&turn_since, &turn_quiet, turn) > SILENCE_NS) {
			fail("shared: the worker has been silent for %llu ms", (unsigned long long)turn_quiet / 1000000);
			turn_quiet = 0;
		}
		streams_step();
		if (!timer)
			nap(2000);
	}
	thread_end(&t);
	_exit(0);
}

/* ---- the worker's side ------------------------------------------------------------------ */

static void tcp_pair(int fd[2])
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof a;
	int l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (l < 0 || fd[0] < 0 || bind(l, (struct sockaddr *)&a, sizeof a) || listen(l, 1) || getsockname(l, (struct sockaddr *)&a, &len) ||
	    connect(fd[0], (struct sockaddr *)&a, sizeof a) || (fd[1] = accept4(l, NULL, NULL, SOCK_CLOEXEC)) < 0)
		die("loopback: %s (is lo up? --features=-loopback goes without)", strerror(errno));
	close(l);
}

void ipc_setup(void)
{
	uint8_t *at = mmap(NULL, 2 * HALF * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel))
		die("shared: %s", strerror(errno));
	/* Both copies of the cells begin equal; ids are given before the fork. */
	region_init(&half[0], F_SHARED, "shared (worker's half)", at, HALF);
	region_init(&half[1], F_SHARED, "shared (peer's half)", at + HALF * PAGE, HALF);
	for (size_t i = 0; i < 3; i++) {
		int fd[2];
		if (!has(stream[i].feature))
			continue;
		switch (stream[i].feature) {
		case F_PIPE:
			if (pipe2(fd, O_CLOEXEC))
				die("pipe: %s", strerror(errno));
			stream[i].fd[0] = fd[1], stream[i].fd[1] = fd[0];
			break;
		case F_SOCKET:
			if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stream[i].fd))
				die("socket: %s", strerror(errno));
			break;
		default:
			tcp_pair(stream[i].fd);
		}
		for (int j = 0; j < 2; j++) {
			stream[i].key[j] = mix(now_ns(CLOCK_REALTIME) + i * 2 + (unsigned)j);
			fcntl(stream[i].fd[j], F_SETFL, fcntl(stream[i].fd[j], F_GETFL) | O_NONBLOCK);
		}
	}
	if (has(F_EVENTFD) && (event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) < 0)
		die("eventfd: %s", strerror(errno));
	ipc_peer = fork();
	if (ipc_peer < 0)
		die("fork: %s", strerror(errno));
	if (ipc_peer == 0)
		peer_run();
	close(channel[1]);
	for (size_t i = 0; i < 3; i++)
		if (has(stream[i].feature))
			close(stream[i].fd[1]);
}

void *ipc_thread(void *arg)
{
	struct thread t;
	timer_t timer = 0;
	(void)arg;
	thread_begin(&t, "ipc");
	if (has(F_TIMER))
		timer_setup(&timer);
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	uint64_t turn_since = t.mono, turn_quiet = 0, timer_since = t.mono, timer_quiet = 0;
	for (bool mine = true; !stopping();) {
		tick();
		bool heard = false;
		if (mine) {
			bool all = verify_wanted();
			halves_check(all);
			if (all)
				verify_done();
			enum damage d = corrupt_kind(F_SHARED);
			if (d)
				region_damage(&half[0], d);
			turn_send();
			mine = false;
		} else {
			mine = heard = turn_receive();
		}
		if (silent(&turn_since, &turn_quiet, heard) > SILENCE_NS) {
			fail("shared: the peer, pid %d, has been silent for %llu ms", ipc_peer, (unsigned long long)turn_quiet / 1000000);
			turn_quiet = 0;
		}
		struct itimerspec off = {0};
		if (corrupt_kind(F_TIMER))
			timer_settime(timer, 0, &off, NULL);
		if (has(F_TIMER) && silent(&timer_since, &timer_quiet, timer_heard(timer)) > SILENCE_NS / 4) {
			fail("timer: the POSIX timer has not fired for %llu ms", (unsigned long long)timer_quiet / 1000000);
			timer_quiet = 0;
		}
		streams_step();
		nap(3000);
	}
	thread_end(&t);
	return NULL;
}
