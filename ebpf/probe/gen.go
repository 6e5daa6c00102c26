package probe

// The objects are committed, so that building needs no clang. `make generate`
// makes them anew; what differs from the commit is a mistake, and CI says so.
// The programs read no registers: -target chooses the file names and the ABI
// of the generated Go types only.
//
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target amd64,arm64 -type shard_usage -type cpu_state sched bpf/sched.bpf.c -- -O2 -g -Wall -Werror
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target amd64,arm64 block bpf/block.bpf.c -- -O2 -g -Wall -Werror
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target amd64,arm64 -type tcp_now tcp bpf/tcp.bpf.c -- -O2 -g -Wall -Werror
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target amd64,arm64 -type birth births bpf/births.bpf.c -- -O2 -g -Wall -Werror
