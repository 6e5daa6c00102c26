/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
 *
 * The fields of kernel structures that the programs read, and nothing else.
 * Offsets come from the running kernel's BTF when a program is loaded (CO-RE),
 * so order, size and neighbours of the fields do not matter here; names and
 * meaning do, and are those of Linux 5.15 to 6.18.
 */
#ifndef TRANSHIP_KERNEL_H
#define TRANSHIP_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef _Bool bool;

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_QUEUE = 22,
};

enum {
	BPF_ANY = 0,
	BPF_F_MMAPABLE = 1024,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* fs/kernfs: on 64-bit machines the id is what stat(2) shows as inode number. */
struct kernfs_node {
	u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	u64 serial_nr; /* of all controllers together, never used again */
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	unsigned int subsys_mask; /* controllers of the hierarchy */
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

enum cgroup_subsys_id {
	cpu_cgrp_id = 1, /* the numbers are the kernel's own (CO-RE) */
	io_cgrp_id = 2,
};

struct css_set {
	struct cgroup_subsys_state *subsys[16];
	struct cgroup *dfl_cgrp;
};

struct sched_entity {
	u64 sum_exec_runtime;
	u64 prev_sum_exec_runtime;
};

struct sched_info {
	u64 run_delay;
};

struct task_struct {
	int pid;
	int prio;
	unsigned int policy;
	struct sched_entity se;
	struct sched_info sched_info;
	unsigned int __state;
	unsigned long min_flt;
	unsigned long maj_flt;
	struct css_set *cgroups;
};

struct blkcg {
	struct cgroup_subsys_state css;
};

struct blkcg_gq {
	struct blkcg *blkcg;
};

struct bio {
	struct blkcg_gq *bi_blkg;
};

struct request {
	unsigned int cmd_flags;
	unsigned int __data_len;
	struct bio *bio;
	u64 start_time_ns;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	u16 skc_family;
	possible_net_t skc_net;
};

struct sock {
	struct sock_common __sk_common;
	u16 sk_protocol;
};

struct tcp_sock {
	u32 srtt_us;
};

struct sk_buff {
	char cb[48];
};

struct tcp_skb_cb {
	u16 tcp_gso_segs;
};

#pragma clang attribute pop

#endif
