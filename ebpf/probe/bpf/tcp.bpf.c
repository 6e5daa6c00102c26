// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * TCP of every shard, by network namespace: open connections, their smoothed
 * round-trip time, and segments sent again. Linux 5.15 or newer, with BTF.
 *
 * No program runs for a packet. `set_state` notes connections when they are
 * established and forgets them when one side closes; `survey`, which user space
 * runs before it reads, looks at the noted sockets. A socket that vanished
 * between the two would be read as garbage, not crash: reads are checked, and a
 * namespace that is nobody's is skipped. Connections that were established
 * before the program was attached are not seen.
 *
 *   connections  hash   u64 address of struct sock -> u32 network namespace
 *   tcp          array  slot                       -> struct tcp_now (mmap);
 *                user space clears it before each survey
 */
#include "shards.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define TCP_ESTABLISHED 1
#define TCP_CLOSE_WAIT 8
#define MAX_CONNECTIONS 16384

struct tcp_now {
	u64 open;
	u64 rtt_sum_us;
	u64 rtt_max_us;
	u64 measured; /* of the open ones, those that have a round-trip time */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CONNECTIONS);
	__type(key, u64);
	__type(value, u32);
} connections SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct tcp_now);
} tcp SEC(".maps");

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(set_state, const struct sock *sk, int oldstate, int newstate)
{
	u64 key = (u64)sk;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (newstate == TCP_CLOSE_WAIT)
		return 0; /* the peer has closed, the shard may go on sending */
	if (newstate != TCP_ESTABLISHED) {
		if (oldstate == TCP_ESTABLISHED || oldstate == TCP_CLOSE_WAIT)
			bpf_map_delete_elem(&connections, &key);
		return 0;
	}
	u32 inum = sk->__sk_common.skc_net.net->ns.inum;
	u32 *slot = bpf_map_lookup_elem(&netns, &inum);
	if (!slot)
		return 0;
	u32 cpu = bpf_get_smp_processor_id();
	struct shard_usage *u = usage_of(*slot, cpu);
	if (u)
		__sync_fetch_and_add(&u->connects, 1);
	if (bpf_map_update_elem(&connections, &key, &inum, BPF_ANY)) {
		struct cpu_state *state = bpf_map_lookup_elem(&percpu, &cpu);
		if (state)
			__sync_fetch_and_add(&state->connections_lost, 1);
	}
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int BPF_PROG(retransmit, const struct sock *sk, const struct sk_buff *skb)
{
	u32 inum = sk->__sk_common.skc_net.net->ns.inum;
	u32 *slot = bpf_map_lookup_elem(&netns, &inum);

	if (!slot)
		return 0;
	struct shard_usage *u = usage_of(*slot, bpf_get_smp_processor_id());
	if (!u)
		return 0;
	/* As the kernel adds it to RetransSegs: a super-packet is many segments. */
	u16 segments = BPF_CORE_READ((struct tcp_skb_cb *)&skb->cb, tcp_gso_segs);
	__sync_fetch_and_add(&u->retransmits, segments ? segments : 1);
	return 0;
}

static long look(void *map, u64 *key, u32 *inum, void *ctx)
{
	u32 *slot = bpf_map_lookup_elem(&netns, inum);
	if (!slot)
		return 0;
	struct tcp_now *now = bpf_map_lookup_elem(&tcp, slot);
	if (!now)
		return 0;
	struct tcp_sock *sk = (void *)*key;
	u32 rtt = BPF_CORE_READ(sk, srtt_us) >> 3; /* the kernel keeps eighths */
	now->open++;
	if (!rtt)
		return 0;
	now->measured++;
	now->rtt_sum_us += rtt;
	if (rtt > now->rtt_max_us)
		now->rtt_max_us = rtt;
	return 0;
}

SEC("raw_tp")
int survey(void *ctx)
{
	bpf_for_each_map_elem(&connections, look, 0, 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
