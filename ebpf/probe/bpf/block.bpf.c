// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Bytes, operations and latency of block requests by the cgroup that caused
 * them. Linux 5.15 or newer, with BTF and CONFIG_BLK_CGROUP.
 *
 * A request belongs to the blkcg of its bios, which are merged only within one
 * cgroup; under v1 that is a cgroup of the blkio hierarchy, and pages that the
 * kernel writes back are the root's. Bytes and operations are counted where a
 * request is issued to its device, less what the device handed back: device
 * mapper and md are counted once, below; devices without requests (zram, brd)
 * are not counted. An operation is a request, of which several may have been
 * merged. Latency is from the request's allocation to its completion, as in
 * /proc/diskstats.
 *
 * Not at completions, because they interrupt whatever runs: kernels that hide a
 * task from tracing (the agent of a virtual machine) run no program then, and
 * up to a tenth of a file's bytes would be missing. Latencies miss these.
 *
 * Each may come in an interrupt of another one: additions are atomic.
 */
#include "shards.h"

#define REQ_OP_MASK 0xff
#define REQ_OP_READ 0
#define REQ_OP_WRITE 1

/* account is where a request is counted, nothing if it is not. */
static __always_inline struct shard_usage *account(struct request *rq, u32 *op)
{
	u32 cpu = bpf_get_smp_processor_id();

	*op = rq->cmd_flags & REQ_OP_MASK;
	if (*op != REQ_OP_READ && *op != REQ_OP_WRITE)
		return 0;
	struct bio *bio = rq->bio;
	if (!bio || !bio->bi_blkg)
		return 0;
	struct cpu_state *state = bpf_map_lookup_elem(&percpu, &cpu);
	if (!state)
		return 0;
	return usage_of(slot_of(&bio->bi_blkg->blkcg->css, KIND_BLOCK, state), cpu);
}

/* sent counts what is left of a request. */
static __always_inline int sent(struct request *rq, long sign)
{
	u32 op;
	struct shard_usage *u = account(rq, &op);

	if (!u)
		return 0;
	if (op == REQ_OP_READ) {
		__sync_fetch_and_add(&u->read_bytes, sign * rq->__data_len);
		__sync_fetch_and_add(&u->read_ops, sign);
	} else {
		__sync_fetch_and_add(&u->write_bytes, sign * rq->__data_len);
		__sync_fetch_and_add(&u->write_ops, sign);
	}
	return 0;
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(block_rq_issue, struct request *rq)
{
	return sent(rq, 1);
}

/* The device was busy or did a part of it: the rest is issued again. */
SEC("tp_btf/block_rq_requeue")
int BPF_PROG(block_rq_requeue, struct request *rq)
{
	return sent(rq, -1);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(block_rq_complete, struct request *rq, int error, unsigned int bytes)
{
	u64 start = rq->start_time_ns, ns = 0;
	u32 op;

	if (bytes < rq->__data_len)
		return 0;
	struct shard_usage *u = account(rq, &op);
	if (!u)
		return 0;
	if (start)
		ns = bpf_ktime_get_ns() - start;
	u32 b = bucket_of(ns);
	if (b >= BUCKETS)
		return 0;
	if (op == REQ_OP_READ) {
		__sync_fetch_and_add(&u->read_ns, ns);
		__sync_fetch_and_add(&u->read[b], 1);
	} else {
		__sync_fetch_and_add(&u->write_ns, ns);
		__sync_fetch_and_add(&u->write[b], 1);
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
