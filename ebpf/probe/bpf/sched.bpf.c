// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * CPU time, run-queue wait, context switches and page faults of every shard.
 * Linux 5.15 or newer, with BTF, CONFIG_SCHED_INFO and CONFIG_FAIR_GROUP_SCHED.
 *
 * Nothing is measured: the kernel counts all of it for each task anyway. At a
 * switch the program adds what the counters of the task that leaves the CPU have
 * gained since it came (sum_exec_runtime, min_flt, maj_flt) to the slot of its
 * cgroup, and one switch, forced or voluntary by the kernel's own rule. So the sums are the kernel's own, and a switch costs
 * no reading of a clock. `flush`, which user space runs on every CPU before it
 * reads, does the same for the task that is running just then.
 *
 * The wait of the task that comes is the run queue's clock less last_queued,
 * which is what sched_info_arrive() is about to add to run_delay. A task that
 * was moved to another queue while it waited has had the first part of its wait
 * added to run_delay already; `delays` remembers run_delay as of the last
 * arrival, by pid, so that the part is counted. Another task with the same pid
 * modulo DELAYS takes the entry over; then only the last part is counted.
 *
 *   running  array  cpu           -> struct cpu_running (the task on that CPU)
 *   delays   array  pid % DELAYS  -> u64 pid << 42 | run_delay in ns (42 bits)
 */
#include "shards.h"

#define DELAYS 65536
#define DELAY_BITS 42
#define DELAY_MASK ((1ULL << DELAY_BITS) - 1)

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DELAYS);
	__type(key, u32);
	__type(value, u64);
} delays SEC(".maps");

static __always_inline u32 slot_of_task(struct task_struct *task, struct cpu_state *state)
{
	if (unified)
		return slot_of(&task->cgroups->dfl_cgrp->self, KIND_TASKS, state);
	return slot_of(task->cgroups->subsys[bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id)], KIND_TASKS, state);
}

static __always_inline void remember(struct cpu_state *r, struct task_struct *task)
{
	r->sum_exec = task->se.sum_exec_runtime;
	r->min_flt = task->min_flt;
	r->maj_flt = task->maj_flt;
}

static __always_inline struct shard_usage *charge(struct cpu_state *r, struct task_struct *task, u32 cpu)
{
	struct shard_usage *u = usage_of(r->slot, cpu);

	if (!u)
		return 0;
	u->cpu_ns += task->se.sum_exec_runtime - r->sum_exec;
	u->minor_faults += task->min_flt - r->min_flt;
	u->major_faults += task->maj_flt - r->maj_flt;
	return u;
}

static __always_inline void arrive(struct task_struct *task, u64 pid, u32 slot, u32 cpu)
{
	u64 queued = task->sched_info.last_queued, delay = task->sched_info.run_delay;
	u32 at = pid & (DELAYS - 1);
	u64 *entry = bpf_map_lookup_elem(&delays, &at);
	struct shard_usage *u = usage_of(slot, cpu);
	u64 wait = 0;

	if (!u || !entry)
		return;
	if (queued) {
		u64 clock = task->se.cfs_rq->rq->clock;
		if (clock > queued)
			wait = clock - queued;
	}
	u64 have = *entry, moved = 0;
	if (have >> DELAY_BITS == pid)
		moved = (delay - have) & DELAY_MASK;
	/* A younger task with that pid has waited less than its predecessor. */
	if (moved > DELAY_MASK / 2)
		moved = delay;
	*entry = pid << DELAY_BITS | ((delay + wait) & DELAY_MASK);
	wait += moved;
	u->wait_ns += wait;
	u32 b = bucket_of(wait);
	if (b < BUCKETS)
		u->wait[b]++;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);

	if (!r)
		return 0;
	if (r->task == (u64)prev) {
		struct shard_usage *u = charge(r, prev, cpu);
		if (u && (preempt || !prev->__state))
			u->forced++;
		else if (u)
			u->voluntary++;
	}
	u64 pid = (u32)next->pid;
	if (!pid) { /* idle */
		r->task = 0;
		return 0;
	}
	r->task = (u64)next;
	r->slot = slot_of_task(next, r);
	remember(r, next);
	arrive(next, pid, r->slot, cpu);
	return 0;
}

SEC("raw_tp")
int flush(void *ctx)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);
	struct task_struct *task = bpf_get_current_task_btf();

	if (!r || r->task != (u64)task)
		return 0;
	charge(r, task, cpu);
	remember(r, task);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
