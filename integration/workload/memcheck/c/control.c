/* The control port: lines over TCP, answered by one line of JSON each.
 *
 *   stat      what was counted, all pauses, the first errors
 *   verify    every thread looks at all it owns, now; answers when all have
 *   reset     forget the longest pauses (not the errors)
 *   mark N    remember N, answer the mark before: an asker who finds an older
 *             one than its own last knows that the whole shard was rolled back
 *   quit      end; answers with the last stat
 */
#include "memcheck.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define MAX_CONNECTIONS 64
#define VERIFY_TIMEOUT_NS 120000000000ull

uint64_t started_mono, started_real;

static struct connection {
	int fd;
	char line[256];
	size_t used;
	uint32_t verify;          /* request it waits for, 0: none */
	uint64_t verify_mono, verify_left_ns;
	uint64_t requests;
	char peer[32];
} connection[MAX_CONNECTIONS];
static uint64_t accepted, requests, closed_early;
/* The mark lies in two places that differ in kind: private memory here, and a
 * page that is shared by all processes. */
static uint64_t mark_private, *mark_shared;

static char out[1 << 18];
static size_t out_used;

static void put(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void put(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(out + out_used, sizeof out - out_used, fmt, ap);
	va_end(ap);
	if (n > 0)
		out_used += (size_t)n < sizeof out - out_used ? (size_t)n : sizeof out - out_used - 1;
}

static void put_string(const char *s)
{
	put("\"");
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			put("\\%c", *s);
		else if ((unsigned char)*s < 0x20 || (unsigned char)*s > 0x7e)
			put("\\u%04x", (unsigned char)*s);
		else
			put("%c", *s);
	put("\"");
}

static struct pause pause_of(struct slot *s)
{
	struct pause p = {0};
	for (int i = 0; i < 1000; i++) {
		uint32_t seq = atomic_load(&s->seq);
		p = s->longest;
		atomic_thread_fence(memory_order_acquire);
		if (seq % 2 == 0 && seq == atomic_load(&s->seq))
			break;
	}
	if (atomic_load(&s->reset_seen) != atomic_load(&st->reset_request))
		return (struct pause){0}; /* it has not ticked since the reset */
	return p;
}

static void put_stat(void)
{
	struct pause longest = {0}, watch = {0};
	uint64_t slowest_pass = 0;
	unsigned open = 0, threads = 0, processes = 0;
	for (int i = 0; i < MAX_CONNECTIONS; i++)
		open += connection[i].fd > 0;
	put("\"ok\":%s,\"error_count\":%u,\"errors\":[", atomic_load(&st->errors) ? "false" : "true", atomic_load(&st->errors));
	for (int i = 0, n = 0; i < MAX_ERRORS; i++)
		if (atomic_load(&st->error_ready[i])) {
			put("%s", n++ ? "," : "");
			put_string(st->error[i]);
		}
	put("],\"verified_pages\":%llu,\"writes\":%llu,\"forks\":%llu,\"records\":%llu,\"messages\":%llu,\"stream_bytes\":%llu",
	    (unsigned long long)st->verified, (unsigned long long)st->writes, (unsigned long long)st->forks, (unsigned long long)st->records,
	    (unsigned long long)st->messages, (unsigned long long)st->stream_bytes);
	put(",\"mremap_refused\":%llu", (unsigned long long)st->mremap_refused);
	put(",\"map_ops\":%llu,\"register_rounds\":%llu,\"signals\":%llu,\"clock_backwards\":%llu", (unsigned long long)st->map_ops,
	    (unsigned long long)st->register_rounds, (unsigned long long)st->signals, (unsigned long long)st->clock_backwards);
	put(",\"steps\":{");
	for (int f = 0, n = 0; f < F_COUNT; f++)
		if (has((enum feature)f))
			put("%s\"%s\":%llu", n++ ? "," : "", feature_names[f], (unsigned long long)st->steps[f]);
	put("},\"threads\":[");
	int32_t pids[MAX_SLOTS];
	for (int i = 0; i < MAX_SLOTS; i++) {
		struct slot *s = &st->slot[i];
		if (atomic_load(&s->used) != SLOT_LIVE)
			continue;
		struct pause p = pause_of(s);
		const char *role = strchr(s->name, '/') + 1;
		if (p.mono_ns > longest.mono_ns)
			longest = p;
		if (strcmp(role, "watch") == 0 && p.mono_ns > watch.mono_ns)
			watch = p;
		if (s->pass_ms > slowest_pass)
			slowest_pass = s->pass_ms;
		put("%s{\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"longest_pause_ms\":%.3f,\"ticks\":%llu}", threads++ ? "," : "", s->name, s->pid, s->tid,
		    (double)p.mono_ns / 1e6, (unsigned long long)s->ticks);
		pids[processes] = s->pid;
		for (unsigned j = 0; j <= processes; j++)
			if (pids[j] == s->pid) {
				processes += j == processes;
				break;
			}
	}
	put("],\"processes\":%u", processes + 1 /* main */);
	put(",\"longest_pause_ms\":%.3f,\"longest_pause_boottime_ms\":%.3f,\"longest_pause_realtime_ms\":%.3f,\"longest_pause_at_unix_ns\":%llu",
	    (double)longest.mono_ns / 1e6, (double)longest.boot_ns / 1e6, (double)longest.real_ns / 1e6, (unsigned long long)longest.at_real_ns);
	put(",\"watch_pause_ms\":%.3f,\"watch_pause_at_unix_ns\":%llu,\"slowest_pass_ms\":%llu", (double)watch.mono_ns / 1e6,
	    (unsigned long long)watch.at_real_ns, (unsigned long long)slowest_pass);
	put(",\"pid\":%d,\"uptime_ms\":%llu,\"uptime_realtime_ms\":%llu", getpid(),
	    (unsigned long long)(now_ns(CLOCK_MONOTONIC) - started_mono) / 1000000, (unsigned long long)(now_ns(CLOCK_REALTIME) - started_real) / 1000000);
	put(",\"unix_ns\":%llu,\"monotonic_ns\":%llu,\"boottime_ns\":%llu", (unsigned long long)now_ns(CLOCK_REALTIME),
	    (unsigned long long)now_ns(CLOCK_MONOTONIC), (unsigned long long)now_ns(CLOCK_BOOTTIME));
	put(",\"connections\":{\"accepted\":%llu,\"open\":%u,\"requests\":%llu,\"failed\":%llu}", (unsigned long long)accepted, open,
	    (unsigned long long)requests, (unsigned long long)closed_early);
}

static void hang_up(struct connection *c)
{
	close(c->fd);
	memset(c, 0, sizeof *c);
}

static void answer(struct connection *c)
{
	put("}\n");
	for (size_t sent = 0; sent < out_used;) {
		ssize_t n = send(c->fd, out + sent, out_used - sent, MSG_NOSIGNAL);
		if (n <= 0) { /* gone, or it has not read for SO_SNDTIMEO */
			closed_early++;
			hang_up(c);
			return;
		}
		sent += (size_t)n;
	}
}

static void begin(const char *kind)
{
	out_used = 0;
	put("{\"schema_version\":1,\"answer\":\"%s\",", kind);
}

static bool command(struct connection *c, char *line)
{
	char *end;
	c->requests++;
	requests++;
	if (strcmp(line, "stat") == 0) {
		status_check();
		begin("stat");
		put("\"your_requests\":%llu,", (unsigned long long)c->requests);
		put_stat();
		answer(c);
	} else if (strcmp(line, "verify") == 0) {
		c->verify = atomic_fetch_add(&st->verify_request, 1) + 1;
		c->verify_mono = now_ns(CLOCK_MONOTONIC);
		c->verify_left_ns = VERIFY_TIMEOUT_NS;
	} else if (strcmp(line, "reset") == 0) {
		atomic_fetch_add(&st->reset_request, 1);
		begin("reset");
		put("\"ok\":%s", atomic_load(&st->errors) ? "false" : "true");
		answer(c);
	} else if (strncmp(line, "mark ", 5) == 0 && (errno = 0, line[5] >= '0' && line[5] <= '9')) {
		uint64_t n = strtoull(line + 5, &end, 10);
		if (mark_private != *mark_shared)
			fail("mark: %llu in private memory, %llu in shared memory", (unsigned long long)mark_private, (unsigned long long)*mark_shared);
		begin("mark");
		put("\"previous\":%llu,\"your_requests\":%llu,\"ok\":%s", (unsigned long long)mark_private, (unsigned long long)c->requests,
		    atomic_load(&st->errors) ? "false" : "true");
		mark_private = *mark_shared = n;
		answer(c);
	} else if (strcmp(line, "quit") == 0) {
		begin("quit");
		put_stat();
		answer(c);
		return false;
	} else {
		begin("error");
		put("\"error\":\"stat, verify, reset, mark N or quit\"");
		answer(c);
	}
	return true;
}

/* verify_poll answers those whose pass is complete. */
static bool verify_poll(void)
{
	bool waiting = false;
	uint64_t now = now_ns(CLOCK_MONOTONIC);
	for (int i = 0; i < MAX_CONNECTIONS; i++) {
		struct connection *c = &connection[i];
		if (c->fd <= 0 || !c->verify)
			continue;
		int behind = -1;
		for (int j = 0; j < MAX_SLOTS; j++)
			if (atomic_load(&st->slot[j].used) == SLOT_LIVE && (int32_t)(c->verify - atomic_load(&st->slot[j].verify_seen)) > 0)
				behind = j;
		if (behind >= 0) {
			waiting = true;
			/* as in ipc.c: time that was seen to pass, for a blackout is no fault */
			uint64_t gap = now - c->verify_mono < 50000000 ? now - c->verify_mono : 50000000;
			c->verify_mono = now;
			if (c->verify_left_ns > gap) {
				c->verify_left_ns -= gap;
				continue;
			}
			fail("verify: thread %s of pid %d has not answered", st->slot[behind].name, st->slot[behind].pid);
		}
		begin("verify");
		put("\"complete\":%s,\"verify_ms\":%.1f,\"your_requests\":%llu,", behind < 0 ? "true" : "false",
		    (double)(VERIFY_TIMEOUT_NS - c->verify_left_ns) / 1e6, (unsigned long long)c->requests);
		c->verify = 0;
		put_stat();
		answer(c);
	}
	return waiting;
}

int control_listen(char *where, size_t size)
{
	struct sockaddr_in a = {.sin_family = AF_INET};
	socklen_t len = sizeof a;
	char host[64] = "0.0.0.0";
	const char *colon = strrchr(opt.listen, ':');
	int on = 1;
	if (!colon || (size_t)(colon - opt.listen) >= sizeof host)
		die("--listen: %s is not ADDRESS:PORT", opt.listen);
	if (colon != opt.listen) {
		memcpy(host, opt.listen, (size_t)(colon - opt.listen));
		host[colon - opt.listen] = 0;
	}
	a.sin_port = htons((uint16_t)atoi(colon + 1));
	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		die("--listen: %s is not an IPv4 address", host);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(fd, (struct sockaddr *)&a, sizeof a) ||
	    listen(fd, 16) || getsockname(fd, (struct sockaddr *)&a, &len))
		die("listen on %s: %s", opt.listen, strerror(errno));
	inet_ntop(AF_INET, &a.sin_addr, host, sizeof host);
	snprintf(where, size, "%s:%d", host, ntohs(a.sin_port));
	mark_shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mark_shared == MAP_FAILED)
		die("control: mmap: %s", strerror(errno));
	return fd;
}

static void control_accept(int listener)
{
	struct timeval slow = {10, 0};
	int on = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0)
		return;
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &slow, sizeof slow);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	for (int i = 0; i < MAX_CONNECTIONS; i++)
		if (connection[i].fd <= 0) {
			memset(&connection[i], 0, sizeof connection[i]);
			connection[i].fd = fd;
			accepted++;
			return;
		}
	close(fd);
	closed_early++;
}

/* control_read takes what is there; false means that somebody said quit. */
static bool control_read(struct connection *c)
{
	ssize_t n = recv(c->fd, c->line + c->used, sizeof c->line - c->used, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (n <= 0) {
		if (n < 0)
			closed_early++;
		hang_up(c);
		return true;
	}
	c->used += (size_t)n;
	for (char *nl; c->fd > 0 && (nl = memchr(c->line, '\n', c->used));) {
		char line[sizeof c->line];
		size_t len = (size_t)(nl - c->line);
		memcpy(line, c->line, len);
		line[len > 0 && line[len - 1] == '\r' ? len - 1 : len] = 0;
		c->used -= len + 1;
		memmove(c->line, nl + 1, c->used);
		if (!command(c, line))
			return false;
	}
	if (c->fd > 0 && c->used == sizeof c->line)
		hang_up(c); /* no command is that long */
	return true;
}

void control_run(int listener)
{
	while (!stopping()) {
		struct pollfd p[MAX_CONNECTIONS + 1] = {{listener, POLLIN, 0}};
		bool waiting = verify_poll();
		for (int i = 0; i < MAX_CONNECTIONS; i++)
			p[i + 1] = (struct pollfd){connection[i].fd > 0 ? connection[i].fd : -1, POLLIN, 0};
		poll(p, MAX_CONNECTIONS + 1, waiting ? 2 : 50);
		reap();
		if (p[0].revents)
			control_accept(listener);
		for (int i = 0; i < MAX_CONNECTIONS; i++)
			if (p[i + 1].revents && connection[i].fd == p[i + 1].fd && !control_read(&connection[i]))
				return;
		if (opt.corrupt[0] && !atomic_load(&st->corrupt_armed) &&
		    now_ns(CLOCK_MONOTONIC) - started_mono > opt.corrupt_after_ms * 1000000ull)
			atomic_store(&st->corrupt_armed, 1);
	}
}

void control_print(void)
{
	begin("end");
	put_stat();
	put("}\n");
	for (size_t sent = 0; sent < out_used;) {
		ssize_t n = write(STDOUT_FILENO, out + sent, out_used - sent);
		if (n <= 0)
			return;
		sent += (size_t)n;
	}
}
