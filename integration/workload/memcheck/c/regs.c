/* Registers that are kept across everything: values that exist nowhere else
 * while the thread spins, and while it sleeps inside a system call. */
#include "memcheck.h"
#include <fenv.h>
#include <sys/syscall.h>

#if defined(__x86_64__) && !defined(PORTABLE_REGS) /* so that the other half is compiled somewhere */
#define LANES 4 /* 64-bit words of a ymm register */

/* Both functions load the vector registers from `in`, keep them through the
 * work, and store them to `out`; general registers sum up what the caller can
 * compute without them. The kernel keeps all vector registers across a system
 * call, so they are live while this thread sleeps. */
#define EACH16(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define CLOBBER16 "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define XLOAD(n) "movdqu " #n "*32(%[in]), %%xmm" #n "\n\t"
#define XSTORE(n) "movdqu %%xmm" #n ", " #n "*32(%[out])\n\t"
#define YLOAD(n) "vmovdqu " #n "*32(%[in]), %%ymm" #n "\n\t"
#define YSTORE(n) "vmovdqu %%ymm" #n ", " #n "*32(%[out])\n\t"

#define SLEEP "mov %[nr], %%eax\n\t" "mov %[ts], %%rdi\n\t" "xor %%esi, %%esi\n\t" "syscall\n\t"
#define SPIN "1:\n\t" "lea 1(%%r8), %%r8\n\t" "rol $7, %%r9\n\t" "add %%r8, %%r9\n\t" "xor %%r9, %%r10\n\t" "dec %%r11\n\t" "jnz 1b\n\t"

#define HOLD(name, target_attr, load, store, work)                                                    \
	target_attr static uint64_t name(const uint64_t *in, uint64_t *out, uint64_t spins, struct timespec *ts) \
	{                                                                                              \
		register uint64_t a asm("r8") = in[0], b asm("r9") = in[1], c asm("r10") = in[2], n asm("r11") = spins; \
		asm volatile(EACH16(load) work EACH16(store)                                           \
			     : "+r"(a), "+r"(b), "+r"(c), "+r"(n)                                      \
			     : [in] "r"(in), [out] "r"(out), [ts] "r"(ts), [nr] "i"(SYS_nanosleep)     \
			     : "rax", "rcx", "rdi", "rsi", "memory", CLOBBER16);                       \
		return a ^ b ^ c;                                                                      \
	}
HOLD(spin_sse, , XLOAD, XSTORE, SPIN)
HOLD(sleep_sse, , XLOAD, XSTORE, SLEEP)
HOLD(spin_avx, __attribute__((target("avx"))), YLOAD, YSTORE, SPIN)
HOLD(sleep_avx, __attribute__((target("avx"))), YLOAD, YSTORE, SLEEP)

static uint64_t expected(const uint64_t *in, uint64_t spins)
{
	uint64_t a = in[0], b = in[1], c = in[2];
	for (uint64_t n = 0; n < spins; n++) {
		a++;
		b = b << 7 | b >> 57;
		b += a;
		c ^= b;
	}
	return a ^ b ^ c;
}

static void vector_step(bool sleep, bool damage)
{
	bool avx = __builtin_cpu_supports("avx");
	size_t used = avx ? LANES : 2;
	uint64_t in[16 * LANES], out[16 * LANES] = {0}, spins = 200000 + rnd_below(200000);
	struct timespec ts = {0, 3000000};
	for (size_t i = 0; i < 16 * LANES; i++)
		in[i] = rnd();
	uint64_t got = sleep ? (avx ? sleep_avx : sleep_sse)(in, out, spins, &ts) : (avx ? spin_avx : spin_sse)(in, out, spins, &ts);
	if (damage)
		out[7 * LANES + 1] ^= 1ull << 33;
	for (size_t i = 0; i < 16 * LANES; i++)
		if (i % LANES < used && out[i] != in[i])
			fail("regs: %s%zu lane %zu came back as %#llx instead of %#llx", avx ? "ymm" : "xmm", i / LANES, i % LANES,
			     (unsigned long long)out[i], (unsigned long long)in[i]);
	/* r11 is taken by the system call, r8 to r10 are kept */
	if (got != (sleep ? in[0] ^ in[1] ^ in[2] : expected(in, spins)))
		fail("regs: the sum in general registers came out as %#llx", (unsigned long long)got);
}
#else
/* Elsewhere the compiler chooses the registers: eight sums in floating point
 * registers, exact because they stay below 2^53. */
static void vector_step(bool sleep, bool damage)
{
	double v[8];
	for (int i = 0; i < 8; i++)
		v[i] = (double)i;
	uint64_t n = sleep ? 1000 : 200000;
	for (uint64_t j = 0; j < n; j++)
		for (int i = 0; i < 8; i++)
			v[i] += (double)(i + 1);
	if (sleep)
		nap(3000);
	if (damage)
		v[5] += 1;
	for (int i = 0; i < 8; i++)
		if (v[i] != (double)i + (double)(n * (uint64_t)(i + 1)))
			fail("regs: sum %d came out as %f", i, v[i]);
}
#endif

static __thread uint64_t tls_value; /* reached through the segment base */

void *regs_thread(void *arg)
{
	struct thread t;
	(void)arg;
	thread_begin(&t, "regs");
	uint64_t key = mix(t.rng);
	tls_value = key;
	/* A rounding mode that is not the default lives in MXCSR and in the x87
	 * control word, and nowhere else. */
	fesetround(FE_UPWARD);
	volatile double one = 1, three = 3;
	double third = one / three;
	long double lthird = (long double)one / (long double)three;
	atomic_fetch_add(&st->ready, 1);
	tick_forgive();
	for (uint64_t n = 0; !stopping(); n++) {
		tick();
		vector_step(n % 8 != 0, corrupt_kind(F_REGS) != D_NONE);
		if (tls_value != key)
			fail("regs: the thread-local value is %#llx instead of %#llx", (unsigned long long)tls_value, (unsigned long long)key);
		if (fegetround() != FE_UPWARD)
			fail("regs: the rounding mode is %d instead of upward", fegetround());
		if (one / three != third || (long double)one / (long double)three != lthird)
			fail("regs: a third is not what it was");
		count(&st->register_rounds, 1);
		count(&st->steps[F_REGS], 1);
		if (verify_wanted())
			verify_done();
	}
	thread_end(&t);
	return NULL;
}
