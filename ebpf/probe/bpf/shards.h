/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
 *
 * What the programs share: which shard a cgroup or a network namespace belongs
 * to, and where its counters are.
 *
 * Every shard has a slot. Slot 0 is the host: whatever lies below the host's own
 * root cgroup and in no shard. User space fills `cgroups` and `netns`, and raises
 * the generation of every CPU after each change. Counters of a slot are one
 * `shard_usage` per possible CPU, written by that CPU alone, so that user space
 * adds them up from a memory mapping without a system call.
 *
 *   cgroups  hash   u64 kind<<60 | kernfs id -> u32 slot
 *   netns    hash   u32 inode number         -> u32 slot
 *   usage    array  slot * cpus + cpu        -> struct shard_usage (mmap)
 *   percpu   array  cpu                      -> struct cpu_state   (mmap)
 *
 * cpu_state.recent remembers which slot a cgroup resolved to: the answer takes a
 * hash, for a nested cgroup a walk to the root, and for any more loads than there
 * should be at a switch. It is by the serial number of the cgroup's state for one
 * controller, which all hierarchies share and which is not used again. An entry
 * is one word, so that an interrupt sees it whole: serial number (32 bits) |
 * generation (20) | slot + 2 (12).
 */
#ifndef TRANSHIP_SHARDS_H
#define TRANSHIP_SHARDS_H

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define MAX_SLOTS 1024
#define NO_SLOT 0xffffffff
#define BUCKETS 24
#define RECENT 64
#define MAX_DEPTH 24 /* of nested cgroups; deeper ones count to the host */

/* Hierarchies number their cgroups each for itself. */
enum kind { KIND_TASKS = 1, KIND_BLOCK = 2 };

/* Durations are counted in powers of two of 2^-30 s (0.93 ns), the units in
 * which the buckets of a Prometheus native histogram (schema 0) are powers of
 * two of a second. Bucket b ends at 2^(b-20) s: 0.95 us … 8 s; the last one
 * also takes what is longer. */
struct shard_usage {
	u64 cpu_ns;
	u64 voluntary;
	u64 forced;
	u64 minor_faults;
	u64 major_faults;
	u64 wait_ns;
	u64 read_bytes;
	u64 write_bytes;
	u64 read_ops;
	u64 write_ops;
	u64 read_ns;
	u64 write_ns;
	u64 retransmits;
	u64 connects;
	u64 spare[2];
	u64 wait[BUCKETS];
	u64 read[BUCKETS];
	u64 write[BUCKETS];
};

/* One map for all that a switch needs of its CPU: in a virtual machine a miss of
 * the TLB costs more than the rest of the program. */
struct cpu_state {
	/* The task on the CPU, by address; 0 is the idle task, or nothing known. */
	u64 task;
	/* Its counters when it came. */
	u64 sum_exec;
	u64 min_flt;
	u64 maj_flt;
	u64 delay;
	u32 slot;
	u32 came; /* its wait is not counted yet */
	/* Written by user space. */
	u32 generation;
	u32 connections_lost; /* `connections` was full */
	u32 spare[2];
	u64 recent[RECENT];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4 * MAX_SLOTS);
	__type(key, u64);
	__type(value, u32);
} cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * MAX_SLOTS);
	__type(key, u32);
	__type(value, u32);
} netns SEC(".maps");

/* The loader multiplies the entries of the next two by the number of CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct shard_usage);
} usage SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct cpu_state);
} percpu SEC(".maps");

/* Set by the loader. */
const volatile u32 cpus = 1;
const volatile u32 unified = 0; /* cgroup v2 alone */

static __always_inline struct shard_usage *usage_of(u32 slot, u32 cpu)
{
	u32 at = slot * cpus + cpu; /* of NO_SLOT beyond the end */

	return bpf_map_lookup_elem(&usage, &at);
}

/* walk asks for each cgroup from cg up to the root. */
static __always_inline u32 walk(struct cgroup *cg, u64 kind)
{
	for (int depth = 0; depth < MAX_DEPTH && cg; depth++) {
		u64 key = kind << 60 | cg->kn->id;
		u32 *slot = bpf_map_lookup_elem(&cgroups, &key);

		if (slot)
			return *slot;
		struct cgroup_subsys_state *parent = cg->self.parent;
		if (!parent)
			break;
		cg = parent->cgroup;
	}
	return NO_SLOT;
}

/* slot_of is the shard of a cgroup, 0 for the host, NO_SLOT for what is outside
 * (another host of the lab). */
static __always_inline u32 slot_of(struct cgroup_subsys_state *css, u64 kind, struct cpu_state *state)
{
	u64 serial = css->serial_nr;
	u64 *entry = &state->recent[serial & (RECENT - 1)];
	u64 tag = serial << 32 | (u64)(state->generation & 0xfffff) << 12;
	u64 have = *(volatile u64 *)entry;
	/* Of the same tag there remains slot + 2, which is not 0. */
	u64 slot_and_1 = (have ^ tag) - 1;
	if (slot_and_1 < 0xfff)
		return (u32)slot_and_1 - 1;
	u32 slot = walk(css->cgroup, kind);
	*(volatile u64 *)entry = tag | (((u64)slot + 2) & 0xfff);
	return slot;
}

/* Durations are as good as random, so that branches on them cost more than all of
 * this. The compiler would make branches of it, if it knew how large v can be. */
static __always_inline u32 bucket_of(u64 ns)
{
	if (ns > 1ULL << 36)
		ns = 1ULL << 36;
	u64 v = (ns + (ns * 77324 >> 20)) >> 10; /* 2^30 / 10^9 = 1 + 77324 / 2^20 */
	u64 b = 0, more;
	barrier_var(v);
#pragma unroll
	for (int log = 4; log >= 2; log--) {
		more = ((1ULL << (1 << log)) - 1 - v) >> 63 << log;
		v >>= more;
		b += more;
	}
	/* The bits of v: the first bucket ends where it becomes 1. What is left of it
	 * is below 16, and nibble v of the constant is how many bits it has. */
	b += 0x4444444433332210ULL >> (v << 2) & 15;
	return b < BUCKETS ? b : BUCKETS - 1;
}

#endif
