package profiler

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
)

func TestParsersOfCgroupFiles(t *testing.T) {
	if v, ok := single([]byte("4096\n")); v != 4096 || !ok {
		t.Error(v, ok)
	}
	for _, bad := range []string{"", "max\n", "-1\n", "1 2\n"} {
		if v, ok := single([]byte(bad)); ok {
			t.Errorf("%q is %v", bad, v)
		}
	}
	if _, ok := single(nil); ok {
		t.Error("a file that cannot be read has a number")
	}
	stat := []byte("usage_usec 10\nnr_throttled 3\nthrottled_usec 77\n")
	if v, ok := keyed(stat, "throttled_usec"); v != 77 || !ok {
		t.Error(v, ok)
	}
	if _, ok := keyed(stat, "throttled"); ok {
		t.Error("half a key was found")
	}
	if v := sumOf([]byte("8:0 rbytes=5 wbytes=7 rios=1\n253:0 rbytes=6 wbytes=x rios=2\n"), "rbytes"); v != 11 {
		t.Error(v)
	}
	if v, ok := parsePressure([]byte("some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\nfull avg10=0 total=9\n")); v != 1234 || !ok {
		t.Error(v, ok)
	}
	if _, ok := parsePressure([]byte("some avg10=0.00\n")); ok {
		t.Error("a line without a total has one")
	}
}

// stats is a datagram with one interface.
func stats(index uint32, counters ...uint64) []byte {
	body := make([]byte, statsHeader)
	binary.NativeEndian.PutUint32(body[4:], index)
	attr := []byte{0, 0, link64, 0}
	for _, c := range counters {
		attr = binary.NativeEndian.AppendUint64(attr, c)
	}
	binary.NativeEndian.PutUint16(attr, uint16(len(attr)))
	return message(unix.RTM_NEWSTATS, append(body, attr...))
}

func message(kind uint16, body []byte) []byte {
	raw := make([]byte, unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN+len(body))
	binary.NativeEndian.PutUint32(raw, uint32(unix.NLMSG_HDRLEN+len(body)))
	binary.NativeEndian.PutUint16(raw[4:], kind)
	return append(raw, body...)
}

func TestParseStats(t *testing.T) {
	raw := append(stats(1, 1, 2, 3, 4, 5), stats(7, 10, 20, 30, 40, 50)...)
	done, out, err := parseStats(nil, append(raw, message(unix.NLMSG_DONE, make([]byte, 4))...))
	if err != nil || !done || len(out) != 2 {
		t.Fatal(done, out, err)
	}
	if want := (linkCounters{7, 10, 20, 30, 40}); out[1] != want {
		t.Errorf("%+v", out[1])
	}
	for n := 1; n < len(raw); n++ {
		if _, out, err := parseStats(nil, raw[:n]); err == nil && len(out) > 1 {
			t.Errorf("%d of %d bytes are two interfaces", n, len(raw))
		}
	}
	code := -int32(unix.EPERM)
	refused := binary.NativeEndian.AppendUint32(nil, uint32(code))
	if _, _, err := parseStats(nil, message(unix.NLMSG_ERROR, refused)); !errors.Is(err, unix.EPERM) {
		t.Error(err)
	}
}

func FuzzParseStats(f *testing.F) {
	f.Add(stats(2, 1, 2, 3, 4))
	f.Add(message(unix.NLMSG_ERROR, nil))
	f.Fuzz(func(_ *testing.T, raw []byte) { _, _, _ = parseStats(nil, raw) })
}

func TestWithoutAnyProgramSignalsFallBackOneByOne(t *testing.T) {
	why := errors.New("operation not permitted")
	v1 := runtime.Place{Dirs: map[string]runtime.Dir{"cpu": {}, "cpuacct": {}, "memory": {}, "blkio": {}}}
	v2 := runtime.Place{Dirs: map[string]runtime.Dir{"cpu": {V2: true}, "cpuacct": {V2: true}, "memory": {V2: true}, "blkio": {V2: true}}}
	for _, tt := range []struct {
		name   string
		place  runtime.Place
		signal profile.Signal
		want   string
	}{
		{"v1", v1, profile.CPU, "cgroup:cpuacct.usage"},
		{"v2", v2, profile.CPU, "cgroup:cpu.stat"},
		{"v1", v1, profile.MinorFaults, "cgroup:memory.stat"},
		{"v1", v1, profile.ReadBytes, Absent},
		{"v2", v2, profile.ReadBytes, "cgroup:io.stat"},
		{"v1", v1, profile.Wait, Absent},
		{"v1", v1, profile.Retransmits, "procfs:net/snmp"},
		{"v1", v1, profile.ReceiveBytes, "netlink"},
		{"v1", v1, profile.MemoryBytes, "cgroup:memory.usage_in_bytes"},
		{"v2", v2, profile.MemoryBytes, "cgroup:memory.current"},
		{"a host without cgroups", runtime.Place{}, profile.MemoryBytes, Absent},
	} {
		all := sources(nil, why, tt.place, "")
		got := all[tt.signal]
		if got.From != tt.want {
			t.Errorf("%s: %v from %s, not %s", tt.name, tt.signal, got.From, tt.want)
		}
		for _, s := range all {
			if s.From == "" || s.From == Absent && s.Why == "" {
				t.Errorf("%s: %v comes from %q because of %q", tt.name, s.Signal, s.From, s.Why)
			}
		}
	}
}
