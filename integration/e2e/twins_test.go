//go:build integration

package e2e

import "testing"

// Where a shard of the same image runs already, its pages are not sent again: two
// servers with the same data, of which the second comes after the first.
func TestAShardBesideOneLikeItIsSentInPart(t *testing.T) {
	needChecks(t)
	const size = 32 << 20
	names := []string{"like-0", "like-1"}
	first := map[string]result{}
	for _, name := range names {
		ip := runShard(t, name, checksImage, "redis-server", "--save", "", "--protected-mode", "no")
		addr := ip + ":6379"
		awaitListening(t, ip, 6379)
		must(t, "client", checker(t), "redis", "load", "--addr", addr, "--bytes", "32MiB")
		c := startClient(t, name+" client", "redis", "run", "--addr", addr, "--no-reconnect", "--request-rate", "500", "--overwrite-rate", "1MB/s")
		awaitConnections(t, ip, 1)
		// Slowly, so that the answer is there before most of the pages went.
		first[name] = mustMigrate(t, name, "host-1", "host-2", "--bandwidth", "100mbit")
		c.mustGoOn(t, 200)
		c.end(t) // has compared every value with what it wrote
	}
	alone, beside := first[names[0]], first[names[1]]
	t.Logf("alone %d bytes sent, %+v; beside the other %d, %+v", alone.BytesSent, alone.Rounds[0].As, beside.BytesSent, beside.Rounds[0].As)
	if alone.Rounds[0].As.Twin != 0 {
		t.Errorf("%d pages of no other shard", alone.Rounds[0].As.Twin)
	}
	// Values are at the same place of a page in both only if they are large, and
	// all else of the heap is full of addresses.
	if twins := beside.Rounds[0].As.Twin * 4096; twins < size/4 || beside.BytesSent > alone.BytesSent*3/4 {
		t.Errorf("%d bytes of %d were taken from the other shard, %d were sent", twins, size, beside.BytesSent)
	}
}
