// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * CPU time, run-queue wait, context switches and page faults of every shard.
 * Linux 5.15 or newer, with BTF and CONFIG_SCHED_INFO.
 *
 * Nothing is measured: the kernel counts all of it for each task anyway. At a
 * switch the program adds what the counters of the task that leaves the CPU have
 * gained since it came (sum_exec_runtime, min_flt, maj_flt) to the slot of its
 * cgroup, and one switch, forced or voluntary by the kernel's own rule. So the
 * sums are the kernel's own, and a switch costs no reading of a clock. `flush`,
 * which user space runs on every CPU before it reads, does the same for the task
 * that is running just then, and `attach_task` for one that changes its cgroup.
 *
 * The wait before a turn is added with it: what run_delay has gained since the
 * task's last turn, which `seen` remembers by pid. The kernel adds to run_delay
 * when a task comes, which is after the switch, and when one that waits is moved
 * to another queue. Of a task that `seen` does not know, because it is new or
 * because another with the same pid modulo SEEN has taken the entry over, only
 * what was added when it came is counted.
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

/* A task's counters as of its last turn. */
struct seen {
	u64 delay; /* pid << 42 | run_delay in ns (42 bits) */
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
	r->delay = task->sched_info.run_delay;
}

/* waited adds the wait that the turn began with. */
static __always_inline void waited(struct cpu_state *r, struct task_struct *task, u64 pid, struct seen *entry, struct shard_usage *u)
{
	u64 delay = task->sched_info.run_delay;
	u64 now = pid << DELAY_BITS | (delay & DELAY_MASK), have = entry->delay;
	u64 wait = now - have;

	entry->delay = now;
	/* Another pid in the entry is at least SEEN off. */
	if (wait > DELAY_MASK / 2) {
		if ((now ^ have) >> DELAY_BITS) {
			wait = delay - r->delay;
			entry->min_flt = task->min_flt;
			entry->maj_flt = task->maj_flt;
		} else {
			wait &= DELAY_MASK; /* its 42 bits began anew */
			/* A younger task with that pid has waited less than its predecessor. */
			if (wait > DELAY_MASK / 2)
				wait = delay;
		}
	}
	u->wait_ns += wait;
	u32 b = bucket_of(wait);
	if (b < BUCKETS)
		u->wait[b]++;
}

/* charge adds what the task on the CPU has gained. */
static __always_inline struct shard_usage *charge(struct cpu_state *r, struct task_struct *task, u64 pid, u32 cpu)
{
	struct shard_usage *u = usage_of(r->slot, cpu);

	if (!u)
		return 0;
	struct seen *entry = seen_of(pid);
	u->cpu_ns += task->se.sum_exec_runtime - r->sum_exec;
	if (r->came)
		waited(r, task, pid, entry, u);
	u64 minor = task->min_flt, major = task->maj_flt;
	if (!((minor - r->min_flt) | (major - r->maj_flt)))
		return u; /* as in most turns */
	u->minor_faults += minor - r->min_flt;
	u->major_faults += major - r->maj_flt;
	if (entry->delay >> DELAY_BITS == pid) {
		entry->min_flt = minor;
		entry->maj_flt = major;
	}
	return u;
}

/* missed makes up for the arrival of a task that nobody saw come. It is rare, and
 * a function of its own so that a switch has the registers for itself. */
static __noinline int missed(struct cpu_state *r, struct task_struct *task, u64 pid)
{
	struct seen *entry = seen_of(pid);

	r->task = (u64)task;
	r->slot = slot_of_task(task, r);
	r->came = 1;
	remember(r, task);
	/* Other classes leave the mark alone. */
	if (task->prio >= MAX_RT_PRIO && task->policy != SCHED_EXT)
		r->sum_exec = task->se.prev_sum_exec_runtime;
	if (entry->delay >> DELAY_BITS == pid) {
		u32 minor = (u32)r->min_flt - entry->min_flt;
		u32 major = (u32)r->maj_flt - entry->maj_flt;

		/* A younger task with that pid has fewer than its predecessor. */
		if (!((minor | major) >> 31)) {
			r->min_flt -= minor;
			r->maj_flt -= major;
		}
	}
	return 0;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *r = bpf_map_lookup_elem(&percpu, &cpu);

	if (!r)
		return 0;
	u64 pid = (u32)prev->pid;
	if (pid) {
		if (r->task != (u64)prev)
			missed(r, prev, pid);
		struct shard_usage *u = charge(r, prev, pid, cpu);
		if (u) {
			if (preempt || !prev->__state)
				u->forced++;
			else
				u->voluntary++;
		}
	}
	if (!next->pid) { /* idle */
		r->task = 0;
		return 0;
	}
	r->task = (u64)next;
	r->slot = slot_of_task(next, r);
	r->came = 1;
	remember(r, next);
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
	if (charge(r, task, (u32)task->pid, cpu))
		r->came = 0;
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
		missed(r, task, (u32)task->pid);
	if (charge(r, task, (u32)task->pid, cpu))
		r->came = 0;
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
