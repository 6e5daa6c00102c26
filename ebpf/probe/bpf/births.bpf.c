// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Cgroups that are made, so that a shard counts from its first instruction on
 * and is not lost if it has ended before anybody in user space hears of it.
 * Linux 5.15 or newer, with BTF.
 *
 * A cgroup that appears below the host's root and in no shard may be a shard's:
 * it gets a slot at once, before a task can enter it, from those that user space
 * keeps in `spares`. The slot is provisional. User space claims it for the shard
 * whose cgroup it turns out to be, or takes it back after a while; what it
 * counted is the host's then. Below a provisional cgroup the same is done again:
 * it may be a directory of shards.
 *
 * Under v1 a container has a cgroup of the same path in every hierarchy; those
 * that are of interest share a slot, by a hash of the path. The kernel makes one
 * cgroup at a time (cgroup_mutex), which is why one scratch buffer is enough.
 *
 *   spares  queue  u32 slot
 *   births  array  slot             -> struct birth (mmap); born_ns 0: not provisional
 *   paths   hash   u64 hash of path -> u32 slot
 */
#include "shards.h"

#define SPARES 128
#define MAX_PATH 1024 /* TRACE_CGROUP_PATH_LEN */
#define TAIL 160      /* of a path: the names of a container and of what it is in */

struct birth {
	u64 born_ns;  /* CLOCK_MONOTONIC, as the next one */
	u64 ended_ns; /* 0: it is still there */
	u64 tasks;    /* ids, as in `cgroups` */
	u64 block;
	u64 hash;
	u32 length; /* of path, the end of the cgroup's */
	u32 spare;
	char path[TAIL];
};

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, SPARES);
	__uint(key_size, 0);
	__uint(value_size, sizeof(u32));
} spares SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct birth);
} births SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SLOTS);
	__type(key, u64);
	__type(value, u32);
} paths SEC(".maps");

struct scratch {
	char path[MAX_PATH];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* kinds of a cgroup, as bits; 0 if its hierarchy is of no interest. */
static __always_inline u32 kinds_of(struct cgroup *cg)
{
	u32 mask = cg->root->subsys_mask, kinds = 0;

	if (mask & 1 << bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id))
		kinds |= 1 << KIND_TASKS;
	if (bpf_core_enum_value_exists(enum cgroup_subsys_id, io_cgrp_id) &&
	    mask & 1 << bpf_core_enum_value(enum cgroup_subsys_id, io_cgrp_id))
		kinds |= 1 << KIND_BLOCK;
	return kinds;
}

/* take returns the slot of a path, a new one if it has none; NO_SLOT if all are
 * taken. */
static __always_inline u32 take(struct scratch *s, u32 length)
{
	u64 hash = 14695981039346656037ULL; /* FNV-1a */

	for (u32 i = 0; i < MAX_PATH && i < length; i++)
		hash = (hash ^ (u8)s->path[i]) * 1099511628211ULL;
	u32 *have = bpf_map_lookup_elem(&paths, &hash), slot;
	struct birth *b;
	if (have) {
		slot = *have;
		b = bpf_map_lookup_elem(&births, &slot);
		/* The same path again, of a shard that came and went: another birth. */
		if (b && b->born_ns && !b->ended_ns)
			return slot;
	}
	if (bpf_map_pop_elem(&spares, &slot))
		return NO_SLOT;
	b = bpf_map_lookup_elem(&births, &slot);
	if (!b)
		return NO_SLOT;
	b->ended_ns = 0;
	b->tasks = 0;
	b->block = 0;
	b->hash = hash;
	b->length = length < TAIL ? length : TAIL;
	b->born_ns = bpf_ktime_get_ns();
	u32 skip = length - b->length;
	if (skip < MAX_PATH - TAIL)
		bpf_probe_read_kernel(b->path, TAIL, s->path + skip);
	bpf_map_update_elem(&paths, &hash, &slot, BPF_ANY);
	return slot;
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(cgroup_mkdir, struct cgroup *cg, const char *path)
{
	u32 kinds = kinds_of(cg), zero = 0;

	if (!kinds)
		return 0;
	struct cgroup_subsys_state *above = cg->self.parent;
	if (!above)
		return 0;
	u32 slot = walk(above->cgroup, kinds & 1 << KIND_TASKS ? KIND_TASKS : KIND_BLOCK);
	if (slot == NO_SLOT)
		return 0;
	struct birth *b = bpf_map_lookup_elem(&births, &slot);
	if (slot && (!b || !b->born_ns))
		return 0; /* within a shard */
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	if (!s)
		return 0;
	long n = bpf_probe_read_kernel_str(s->path, MAX_PATH, path);
	if (n < 2 || n > MAX_PATH)
		return 0;
	slot = take(s, n - 1);
	b = bpf_map_lookup_elem(&births, &slot);
	if (slot == NO_SLOT || !b)
		return 0;
	u64 id = cg->kn->id, key;
	if (kinds & 1 << KIND_TASKS) {
		b->tasks = id;
		key = (u64)KIND_TASKS << 60 | id;
		bpf_map_update_elem(&cgroups, &key, &slot, BPF_ANY);
	}
	if (kinds & 1 << KIND_BLOCK) {
		b->block = id;
		key = (u64)KIND_BLOCK << 60 | id;
		bpf_map_update_elem(&cgroups, &key, &slot, BPF_ANY);
	}
	return 0;
}

SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(cgroup_rmdir, struct cgroup *cg, const char *path)
{
	u32 kinds = kinds_of(cg);

	if (!(kinds & 1 << KIND_TASKS))
		return 0;
	u64 key = (u64)KIND_TASKS << 60 | cg->kn->id;
	u32 *slot = bpf_map_lookup_elem(&cgroups, &key);
	if (!slot)
		return 0;
	struct birth *b = bpf_map_lookup_elem(&births, slot);
	if (b && b->born_ns && b->tasks == cg->kn->id)
		b->ended_ns = bpf_ktime_get_ns();
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
