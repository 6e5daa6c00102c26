//go:build integration

package profile

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/internal/testenv"
)

// TestADatabaseUnderLoad drives a Redis shard from outside the pool and compares
// with the accounts of its cgroup and of its interface.
func TestADatabaseUnderLoad(t *testing.T) {
	h := host(t, "host-1")
	ip, pid := start(t, h, "redis", "redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no")
	eventually(t, "redis answers and is profiled", func() bool {
		out, err := theLab.Client().Exec(t.Context(), "redis-cli", "-h", ip, "ping")
		_, ok := series(scrape(t, h), "tranship_shard_cpu_seconds_total", shardLabel("redis"))
		return err == nil && strings.Contains(string(out), "PONG") && ok
	})
	// It goes on until it is told to stop.
	load := theLab.Client().Command(t.Context(), "redis-benchmark", "-h", ip, "-t", "set,get", "-n", "100000000", "-c", "20", "-q")
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			_ = load.Process.Kill()
			_ = load.Wait()
		}
	}
	defer stop()
	text0, cpu0 := cpuBesides(t, h, "redis")
	<-time.After(observe / 2)
	text1, cpu1 := cpuBesides(t, h, "redis")
	stop()
	gained := value(t, text1, "tranship_shard_cpu_seconds_total", shardLabel("redis")) - value(t, text0, "tranship_shard_cpu_seconds_total", shardLabel("redis"))
	within(t, "CPU time of redis under load", gained, cpu1-cpu0, 0.01)
	eventually(t, "the network's counts are the interface's", func() bool {
		text := scrape(t, h)
		rb, rp, tb, tp := deviceOf(t, h, pid)
		get := func(metric, direction string) float64 {
			return value(t, text, metric, shardLabel("redis"), fmt.Sprintf("direction=%q", direction))
		}
		return rb > 1e6 && rb == get("tranship_shard_network_bytes_total", "receive") && tb == get("tranship_shard_network_bytes_total", "transmit") &&
			rp == get("tranship_shard_network_packets_total", "receive") && tp == get("tranship_shard_network_packets_total", "transmit")
	})
}

// TestADiskUnderLoad runs fio in one shard and dd in another and compares with
// the accounts of their cgroups.
func TestADiskUnderLoad(t *testing.T) {
	h := host(t, "host-1")
	device := diskOf(t, h)
	for _, c := range []struct {
		name, load string
		mib        float64 // each way, at least
	}{
		{"fio", "fio --name=f --filename=/f --size=48m --rw=write --bs=64k --direct=1 --output=/dev/null && fio --name=f --filename=/f --size=48m --rw=randread --bs=16k --direct=1 --output=/dev/null", 48},
		{"dd", "dd if=/dev/zero of=/f bs=256k count=80 oflag=direct && dd if=/f of=/dev/null bs=64k iflag=direct", 20},
	} {
		_, pid := start(t, h, c.name, "sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; "+c.load+"; : >/done; sleep 600")
		accountBlock(t, h, c.name, device)
		must(t, h, "touch", fmt.Sprintf("/proc/%d/root/go", pid))
		eventually(t, c.name+" is done", func() bool {
			_, err := h.Exec(t.Context(), "test", "-e", fmt.Sprintf("/proc/%d/root/done", pid))
			return err == nil
		})
		text := fresh(t, h)
		in, out := blockOf(t, h, c.name)
		get := func(direction string) float64 {
			return value(t, text, "tranship_shard_block_bytes_total", shardLabel(c.name), fmt.Sprintf("direction=%q", direction))
		}
		within(t, "bytes that "+c.name+" read", get("read"), in, 0.01)
		within(t, "bytes that "+c.name+" wrote", get("write"), out, 0.01)
		if in < c.mib*(1<<20) || out < c.mib*(1<<20) {
			t.Errorf("%s did not reach the disk: %v in, %v out", c.name, in, out)
		}
	}
}

// diskOf is the disk that shards' files are on, as MAJOR:MINOR.
func diskOf(t *testing.T, h *lab.Host) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(h.Root(), "var/lib/containerd"), &st); err != nil {
		t.Fatal(err)
	}
	if unix.Major(st.Dev) == 0 {
		testenv.Missing(t, "a disk below the lab: its hosts' files are in memory or on another file system's file")
	}
	device := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	sys := "/sys/dev/block/" + device
	if _, err := os.Stat(sys + "/partition"); err == nil { // accounts are of whole disks
		sys, err = filepath.EvalSymlinks(sys)
		if err != nil {
			t.Fatal(err)
		}
		device = strings.TrimSpace(read(t, filepath.Join(filepath.Dir(sys), "dev")))
	}
	return device
}

// accountBlock turns the cgroup's account of a disk on: since Linux 6.10 v1 keeps
// one only of what is throttled, which it is then, at a rate that nothing reaches.
func accountBlock(t *testing.T, h *lab.Host, name, device string) {
	t.Helper()
	for _, way := range []string{"read", "write"} {
		path := cgroupFile(h, "blkio.throttle."+way+"_bps_device", "io.stat", name)
		if strings.HasSuffix(path, "io.stat") {
			return // v2 accounts for all
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "%s %d", device, uint64(1)<<40), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// blockOf is the cgroup's own account, in bytes.
func blockOf(t *testing.T, h *lab.Host, name string) (in, out float64) {
	t.Helper()
	for line := range strings.Lines(read(t, cgroupFile(h, "blkio.throttle.io_service_bytes_recursive", "io.stat", name))) {
		f := strings.Fields(line)
		if len(f) == 3 && (f[1] == "Read" || f[1] == "Write") {
			n, err := strconv.ParseFloat(f[2], 64)
			if err != nil {
				t.Fatal(err)
			}
			if f[1] == "Read" {
				in += n
			} else {
				out += n
			}
		}
		for _, pair := range f {
			var n float64
			if _, err := fmt.Sscanf(pair, "rbytes=%f", &n); err == nil {
				in += n
			} else if _, err := fmt.Sscanf(pair, "wbytes=%f", &n); err == nil {
				out += n
			}
		}
	}
	return in, out
}
