// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * CPU time, run-queue wait, context switches and page faults of every shard.
 * Linux 5.15 or newer, with BTF, CONFIG_SCHED_INFO and CONFIG_FAIR_GROUP_SCHED.
 *
 * Nothing is measured: the kernel counts all of it for each task anyway. At a
 * switch the program adds what the counters of the task that leaves the CPU have
 * gained since it came (sum_exec_runtime, min_flt, maj_flt) to the slot of its
 * cgroup, and one switch, forced or voluntary by the kernel's own rule. So the
 * sums are the kernel's own, and a switch costs no reading of a clock. `flush`,
 * which user space runs on every CPU before it reads, does the same for the task
 * that is running just then, and `attach_task` for one that changes its cgroup.
 *
 * The wait of the task that comes is the run queue's clock less last_queued,
 * which is what sched_info_arrive() is about to add to run_delay. A task that
 * was moved to another queue while it waited has had the first part of its wait
 * added to run_delay already; `seen` remembers run_delay as of the last arrival,
 * by pid, so that the part is counted. Another task with the same pid modulo SEEN
 * takes the entry over; then only the last part is counted.
 *
 * Kernels that hide a task from tracing (the agent of a virtual machine) run no
 * program when it gives way. The task that comes then is noticed when it leaves:
 * the kernel's own mark of where its turn began (prev_sum_exec_runtime) and what
 * `seen` has of it make up for its arrival. Whoever exits is taken out of its
 * autogroup, which sets that mark anew (Linux 6.14): what it has used of its turn
 * is added before.
 *
 *   percpu  array  cpu         -> struct cpu_state (the task on that CPU)
 *   seen    array  pid % SEEN  -> struct seen (global data)
 */
#include "shards.h"

#define SEEN 65536
#define DELAY_BITS 42
#define DELAY_MASK ((1ULL << DELAY_BITS) - 1)

#define MAX_RT_PRIO 100 /* include/linux/sched/prio.h */
#define SCHED_EXT 7

struct seen {
	u64 arrival; /* pid << 42 | run_delay in ns (42 bits) */
	/* Page faults that are counted: as of its last turn that had any. */
	u32 min_flt;
	u32 maj_flt;
};

/* Global, not a map of its own: nobody else reads it, and it needs no look-up. */
struct seen seen[SEEN];

static __always_inline struct seen *seen_of(u64 pid)
{
	return &seen[pid & (SEEN - 1)];
}

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

static __always_inline struct shard_usage *charge(struct cpu_state *r, struct task_struct *task, u64 pid, u32 cpu)
{
	struct shard_usage *u = usage_of(r->slot, cpu);

	if (!u)
		return 0;
	u->cpu_ns += task->se.sum_exec_runtime - r->sum_exec;
	u64 minor = task->min_flt, major = task->maj_flt;
	if (minor == r->min_flt && major == r->maj_flt)
		return u; /* as in most turns */
	u->minor_faults += minor - r->min_flt;
	u->major_faults += major - r->maj_flt;
	struct seen *entry = seen_of(pid);
	if (entry->arrival >> DELAY_BITS == pid) {
		entry->min_flt = minor;
		entry->maj_flt = major;
	}
	return u;
}

static __always_inline void arrive(struct task_struct *task, u64 pid, struct shard_usage *u)
{
	u64 queued = task->sched_info.last_queued, delay = task->sched_info.run_delay;
	struct seen *entry = seen_of(pid);
	u64 wait = 0;

	if (!u)
		return;
	if (queued) {
		u64 clock = task->se.cfs_rq->rq->clock;
		if (clock > queued)
			wait = clock - queued;
	}
	u64 have = entry->arrival, moved = 0;
	if (have >> DELAY_BITS == pid) {
		moved = (delay - have) & DELAY_MASK;
	} else {
		entry->min_flt = task->min_flt;
		entry->maj_flt = task->maj_flt;
	}
	/* A younger task with that pid has waited less than its predecessor. */
	if (moved > DELAY_MASK / 2)
		moved = delay;
	entry->arrival = pid << DELAY_BITS | ((delay + wait) & DELAY_MASK);
	wait += moved;
	u->wait_ns += wait;
	u32 b = bucket_of(wait);
	if (b < BUCKETS)
		u->wait[b]++;
}

/* missed makes up for the arrival of a task that nobody saw come. It is rare, and
 * a function of its own so that a switch has the registers for itself. */
static __noinline int missed(struct cpu_state *r, struct task_struct *task, u64 pid, u32 cpu)
{
	struct seen *entry = seen_of(pid);

	r->task = (u64)task;
	r->slot = slot_of_task(task, r);
	remember(r, task);
	if (r->slot == NO_SLOT)
		return 0;
	/* Other classes leave the mark alone. */
	if (task->prio >= MAX_RT_PRIO && task->policy != SCHED_EXT)
		r->sum_exec = task->se.prev_sum_exec_runtime;
	if (entry->arrival >> DELAY_BITS == pid) {
		u32 minor = (u32)r->min_flt - entry->min_flt;
		u32 major = (u32)r->maj_flt - entry->maj_flt;

		/* A younger task with that pid has fewer than its predecessor. */
		if (!((minor | major) >> 31)) {
			r->min_flt -= minor;
			r->maj_flt -= major;
		}
	}
	arrive(task, pid, usage_of(r->slot, cpu));
	return 0;
}

/* leave adds what prev has gained, and one switch. */
static __always_inline struct shard_usage *leave(struct cpu_state *r, struct task_struct *prev, u64 pid, bool forced, u32 cpu)
{
	struct shard_usage *u = charge(r, prev, pid, cpu);

	if (!u)
		return 0;
	if (forced)
		u->forced++;
	else
		u->voluntary++;
	return u;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);

	if (!r)
		return 0;
	u64 pid = (u32)prev->pid;
	struct shard_usage *u = 0;
	if (pid) {
		if (r->task != (u64)prev)
			missed(r, prev, pid, cpu);
		u = leave(r, prev, pid, preempt || !prev->__state, cpu);
	}
	pid = (u32)next->pid;
	if (!pid) { /* idle */
		r->task = 0;
		return 0;
	}
	r->task = (u64)next;
	u32 slot = slot_of_task(next, r);
	if (!u || slot != r->slot)
		u = usage_of(slot, cpu);
	r->slot = slot;
	remember(r, next);
	arrive(next, pid, u);
	return 0;
}

/* A task that moves itself has used its turn so far where it came from. One that
 * is moved by another is not running, or will be charged at its next switch. */
SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(attach_task, struct cgroup *to, const char *path, struct task_struct *task, bool threadgroup)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);

	if (!r || r->task != (u64)task)
		return 0;
	charge(r, task, (u32)task->pid, cpu);
	remember(r, task);
	r->slot = slot_of_task(task, r);
	return 0;
}

/* settle adds what the task that is running has gained so far. */
static __always_inline void settle(struct task_struct *task)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);

	if (!r || !task->pid)
		return;
	if (r->task != (u64)task)
		missed(r, task, (u32)task->pid, cpu);
	charge(r, task, (u32)task->pid, cpu);
	remember(r, task);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(exit_task, struct task_struct *task)
{
	settle(task);
	return 0;
}

SEC("raw_tp")
int flush(void *ctx)
{
	settle(bpf_get_current_task_btf());
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
