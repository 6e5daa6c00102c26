// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Bytes, operations and latency of block requests by the cgroup that caused
 * them. Linux 5.15 or newer, with BTF and CONFIG_BLK_CGROUP.
 *
 * A request belongs to the blkcg of its bios, which are merged only within one
 * cgroup; under v1 that is a cgroup of the blkio hierarchy, and pages that the
 * kernel writes back are the root's. Requests are seen where a device completes
 * them: device mapper and md are counted once, below; devices without requests
 * (zram, brd) are not counted. An operation is a request, of which several may
 * have been merged. Latency is from the request's allocation to its completion,
 * as in /proc/diskstats.
 *
 * A completion may come in an interrupt of another one: additions are atomic.
 */
#include "shards.h"

#define REQ_OP_MASK 0xff
#define REQ_OP_READ 0
#define REQ_OP_WRITE 1

SEC("tp_btf/block_rq_complete")
int BPF_PROG(block_rq_complete, struct request *rq, int error, unsigned int bytes)
{
	u32 cpu = bpf_get_smp_processor_id();
	u32 op = rq->cmd_flags & REQ_OP_MASK;

	if (op != REQ_OP_READ && op != REQ_OP_WRITE)
		return 0;
	struct bio *bio = rq->bio;
	if (!bio || !bio->bi_blkg)
		return 0;
	struct cpu_state *state = bpf_map_lookup_elem(&percpu, &cpu);
	if (!state)
		return 0;
	struct shard_usage *u = usage_of(slot_of(&bio->bi_blkg->blkcg->css, KIND_BLOCK, state), cpu);
	if (!u)
		return 0;
	u64 start = rq->start_time_ns, ns = 0;
	bool last = bytes >= rq->__data_len;
	if (start)
		ns = bpf_ktime_get_ns() - start;
	if (op == REQ_OP_READ)
		__sync_fetch_and_add(&u->read_bytes, bytes);
	else
		__sync_fetch_and_add(&u->write_bytes, bytes);
	if (!last)
		return 0;
	u32 b = bucket_of(ns);
	if (b >= BUCKETS)
		return 0;
	if (op == REQ_OP_READ) {
		__sync_fetch_and_add(&u->read_ops, 1);
		__sync_fetch_and_add(&u->read_ns, ns);
		__sync_fetch_and_add(&u->read[b], 1);
	} else {
		__sync_fetch_and_add(&u->write_ops, 1);
		__sync_fetch_and_add(&u->write_ns, ns);
		__sync_fetch_and_add(&u->write[b], 1);
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
