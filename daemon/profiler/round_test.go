package profiler

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BenchmarkRound is what a second costs with a hundred shards that do nothing, in
// CPU time, with caches as the round before left them and as a second of other
// work does.
func BenchmarkRound(b *testing.B) {
	const shards = 100
	keepThread(b)
	p, _ := running(b, nil)
	for i := range shards {
		name := fmt.Sprint("round-", i)
		c, err := startContainerThat(name, "read end", unix.CLONE_NEWNET)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := c.stop(); err != nil {
				b.Error(err)
			}
		})
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprint("tsround", i)}, PeerName: "eth0", PeerNamespace: netlink.NsPid(c.task.PID)}
		if err := netlink.LinkAdd(link); err != nil {
			b.Fatal(err)
		}
		// It would go with the namespace, but later, and another run has the same names.
		b.Cleanup(func() {
			if err := netlink.LinkDel(link); err != nil {
				b.Error(err)
			}
		})
		p.begin(b.Context(), c.task)
	}
	if n := p.count(); n != shards {
		b.Fatalf("%d of %d shards are profiled", n, shards)
	}
	pollution := make([]byte, 64<<20)
	for name, size := range map[string]int{"warm": 0, "cold": len(pollution)} {
		b.Run(name, func(b *testing.B) {
			var used int64
			for range b.N {
				for i := 0; i < size; i += 64 {
					pollution[i]++
				}
				before := cpuTime(b)
				if err := p.sample(); err != nil {
					b.Fatal(err)
				}
				used += cpuTime(b) - before
			}
			b.ReportMetric(float64(used)/float64(b.N)/shards, "cpu-ns/shard")
		})
	}
}

// cpuTime is what this process has used, in nanoseconds.
func cpuTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
