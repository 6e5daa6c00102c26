//go:build integration

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/workload/memcheck"
)

const (
	// daemonMemory is what all processes of a host's transhipd may have in memory
	// while a large shard moves; the page store is tmpfs and counts as memory of
	// its own.
	daemonMemory = 256 << 20
	largeShard   = 4 << 30
)

// TestADaemonStaysSmallWhileALargeShardMoves moves a shard of 4 GiB, or of 2 GiB
// on a machine without room for two copies of that.
func TestADaemonStaysSmallWhileALargeShardMoves(t *testing.T) {
	size := int64(largeShard)
	// While it moves, source and store hold it once each, and what is placed
	// leaves the store; half as much again is the machine's own.
	if available := memoryAvailable(t); available < size*5/2 {
		size /= 2
		if available < size*5/2 {
			t.Fatalf("%d MiB of memory are available, the test needs %d", available>>20, size*5/2>>20)
		}
	}
	needChecks(t)
	ip := runShard(t, "large", checksImage, "memcheck", "--features=plain",
		fmt.Sprintf("--size=%dMiB", size>>20), "--rate=16MiB/s", "--hot=5", "--compressible=90", "--procs=2", "--threads=1", "--verify=30000")
	addr := ip + ":" + strconv.Itoa(memcheck.DefaultPort)
	awaitListening(t, ip, memcheck.DefaultPort)
	askMemcheck(t, "client", addr, "stat") // answers once all of it is written
	c := startClient(t, "watch", "memcheck", "watch", "--addr", addr)
	awaitConnections(t, ip, 1)

	peaks := watchMemory(t, "host-1", "host-2")
	r := mustMigrate(t, "large", "host-1", "host-2")
	c.mustGoOn(t, 20)
	await(t, "the store is empty", func() bool { return storeBytes(t, "host-2") == 0 })
	for host, peak := range peaks() {
		t.Logf("transhipd of %s: at most %d MiB", host, peak>>20)
		if peak > daemonMemory {
			t.Errorf("transhipd of %s had %d MiB in memory, more than %d", host, peak>>20, daemonMemory>>20)
		}
		if peak < 4<<20 {
			t.Errorf("transhipd of %s had %d bytes in memory: it was not measured", host, peak)
		}
	}
	// memcheck fills a few pages with zeros now and then, and those do not travel.
	if moved := r.Pages * 4096; moved < size*3/4 {
		t.Errorf("%d MiB were moved, and the shard has %d", moved>>20, size>>20)
	}
	c.end(t) // verifies every page
}

func memoryAvailable(t *testing.T) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemAvailable:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("/proc/meminfo has no MemAvailable")
	return 0
}

// storeBytes is what a host's page store holds.
func storeBytes(t *testing.T, host string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(hostOf(t, host).Root(), "run/tranship/store"), &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// watchMemory samples what the processes of each host's transhipd, the page
// server included, have in memory of their own, and returns what ends that and
// gives the peaks. Pages of the store that they have mapped are left out, which
// is why the kernel's own peak (VmHWM) will not do.
func watchMemory(t *testing.T, hosts ...string) (peaks func() map[string]int64) {
	t.Helper()
	roots := map[string]string{}
	for _, h := range hosts {
		roots[h] = hostOf(t, h).Root()
	}
	most := map[string]int64{}
	stop := make(chan struct{})
	var sampler sync.WaitGroup
	sampler.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			for host, root := range roots {
				most[host] = max(most[host], daemonBytes(root))
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	end := sync.OnceFunc(func() {
		close(stop)
		sampler.Wait()
	})
	t.Cleanup(end)
	return func() map[string]int64 { end(); return most }
}

// daemonBytes sums what the transhipd processes below a host's root have in
// memory, apart from tmpfs. A child that is about to execute something else shares
// its parent's memory, and is left out.
func daemonBytes(root string) int64 {
	var sum int64
	statuses, _ := filepath.Glob(root + "/proc/[0-9]*/status")
	for _, path := range statuses {
		raw, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(raw, []byte("Name:\ttranshipd\n")) || isAboutToExec(filepath.Dir(path), raw) {
			continue // it ended meanwhile, or is another program
		}
		for line := range strings.Lines(string(raw)) {
			f := strings.Fields(line)
			if len(f) == 3 && (f[0] == "RssAnon:" || f[0] == "RssFile:") {
				kib, _ := strconv.ParseInt(f[1], 10, 64)
				sum += kib << 10
			}
		}
	}
	return sum
}

// isAboutToExec says that a process, of a directory of /proc and with that status,
// has its parent's command line, in its parent's memory, and is younger than a
// second: milliseconds are usual, more on a busy machine. What transhipd starts of
// its own program has words of its own from the first instruction on; only the
// holder of a page server has those of the server, and lives longer.
func isAboutToExec(dir string, status []byte) bool {
	_, rest, _ := bytes.Cut(status, []byte("\nPPid:"))
	parent, _, _ := bytes.Cut(rest, []byte("\n"))
	own, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	theirs, err2 := os.ReadFile(filepath.Join(filepath.Dir(dir), string(bytes.TrimSpace(parent)), "cmdline"))
	return err == nil && err2 == nil && bytes.Equal(own, theirs) && ageOf(dir) < time.Second
}

// ageOf is how long the process of a directory of /proc has been there, 0 if it
// has ended.
func ageOf(dir string) time.Duration {
	raw, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0
	}
	const userHZ = 100 // the unit of starttime, field 22 in proc_pid_stat(5), everywhere
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	ticks, err := strconv.ParseInt(f[22-3], 10, 64)
	var up unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return 0
	}
	return time.Duration(up.Nano()) - time.Duration(ticks)*time.Second/userHZ
}
