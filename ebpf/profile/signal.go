// Package profile holds what a shard or a host uses: the signals, one Sample of
// them, and a Profile, which turns samples into rates and rolls them up.
//
//	Sample (cumulative, each second) → Interval (rates, or a gap)
//	→ Point of 1 s, 10 s and 1 min → Block (an hour of minutes, for the disk)
//
// It refuses to read clocks or files, and never makes up a value: what was not
// measured is absent, in a Sample by its mask, in a Point by its coverage.
package profile

import "math/bits"

// Signal is one thing that is measured.
type Signal uint8

// The signals. Their numbers are stored on disk: append only.
const (
	CPU             Signal = iota // seconds of CPU time a second
	Wait                          // seconds that runnable tasks waited for a CPU, a second
	Voluntary                     // context switches a second of tasks that had to wait
	Forced                        // context switches a second of tasks that had more to do
	MinorFaults                   // page faults a second without I/O
	MajorFaults                   // page faults a second with I/O
	ReadBytes                     // from block devices, a second
	WriteBytes                    // to block devices, a second
	ReadOps                       // requests to block devices a second
	WriteOps                      // requests to block devices a second
	ReceiveBytes                  // through the network interfaces but loopback, a second
	TransmitBytes                 // the same, outward
	ReceivePackets                // a second
	TransmitPackets               // a second
	Retransmits                   // TCP segments sent again, a second
	Connections                   // open TCP connections
	RoundTrip                     // seconds, the mean over connections of TCP's smoothed one
	Throttled                     // seconds a second in which a quota held tasks back
	MemoryBytes                   // all memory that counts against the limit
	WorkingSet                    // MemoryBytes less inactive page cache
	CPUPressure                   // seconds a second in which some task waited (PSI)
	MemoryPressure                // the same for memory
	IOPressure                    // the same for I/O
	Instructions                  // a second
	CacheMisses                   // a second
	DirtyPages                    // pages written at least once in a second
	Signals                       // how many there are
)

// signals says what each is called and how it is summed up.
var signals = [Signals]struct {
	name    string
	counter bool
	// peaked: the highest second of a minute is stored beside the mean, because
	// it is what a forecast of room is about.
	peaked bool
}{
	CPU: {"cpu", true, true}, Wait: {"wait", true, false},
	Voluntary: {"voluntary_switches", true, false}, Forced: {"forced_switches", true, false},
	MinorFaults: {"minor_faults", true, false}, MajorFaults: {"major_faults", true, false},
	ReadBytes: {"read_bytes", true, true}, WriteBytes: {"write_bytes", true, true},
	ReadOps: {"read_ops", true, false}, WriteOps: {"write_ops", true, false},
	ReceiveBytes: {"receive_bytes", true, true}, TransmitBytes: {"transmit_bytes", true, true},
	ReceivePackets: {"receive_packets", true, false}, TransmitPackets: {"transmit_packets", true, false},
	Retransmits: {"retransmits", true, false}, Connections: {"connections", false, false},
	RoundTrip: {"round_trip", false, false}, Throttled: {"throttled", true, false},
	MemoryBytes: {"memory_bytes", false, true}, WorkingSet: {"working_set", false, true},
	CPUPressure: {"cpu_pressure", true, false}, MemoryPressure: {"memory_pressure", true, false},
	IOPressure: {"io_pressure", true, false}, Instructions: {"instructions", true, false},
	CacheMisses: {"cache_misses", true, false}, DirtyPages: {"dirty_pages", false, false},
}

// String is the signal's name in the API and in metrics.
func (s Signal) String() string {
	if s < Signals {
		return signals[s].name
	}
	return "unknown"
}

// Counter says that samples hold a running total, of which points hold the
// rate a second; other signals are values of the moment.
func (s Signal) Counter() bool { return s < Signals && signals[s].counter }

// Peaked says that minutes keep the highest second beside the mean.
func (s Signal) Peaked() bool { return s < Signals && signals[s].peaked }

// SignalNamed finds a signal by its name.
func SignalNamed(name string) (Signal, bool) {
	for s := range Signals {
		if signals[s].name == name {
			return s, true
		}
	}
	return 0, false
}

// Mask is a set of signals.
type Mask uint64

// Has says whether s is in the set.
func (m Mask) Has(s Signal) bool { return m>>s&1 == 1 }

// With returns the set with s.
func (m Mask) With(s Signal) Mask { return m | 1<<s }

// Len counts the signals.
func (m Mask) Len() int { return bits.OnesCount64(uint64(m)) }

// Buckets of a Histogram.
const Buckets = 24

// bucketShift: bucket b ends at 2^(b-20) seconds.
const bucketShift = 20

// Histogram counts durations by powers of two of a second: bucket b holds those
// above 2^(b-21) s up to 2^(b-20) s, the first also what is shorter (0.95 µs),
// the last also what is longer (4 s). It is cumulative over time, not over
// buckets, like the native histograms of Prometheus with schema 0.
type Histogram [Buckets]uint64

// UpperBound of a bucket in seconds.
func UpperBound(bucket int) float64 {
	if bucket >= bucketShift {
		return float64(uint64(1) << (bucket - bucketShift))
	}
	return 1 / float64(uint64(1)<<(bucketShift-bucket))
}

// NativeIndex is the bucket's number in a native histogram of schema 0, whose
// bucket i ends at 2^i seconds.
func NativeIndex(bucket int) int { return bucket - bucketShift }

// Count is how many durations are in it.
func (h *Histogram) Count() uint64 {
	var n uint64
	for _, c := range h {
		n += c
	}
	return n
}

// Since returns what was added after earlier; false when h is not a
// continuation of it, because somebody began to count anew.
func (h *Histogram) Since(earlier *Histogram) (Histogram, bool) {
	var d Histogram
	for i := range h {
		if h[i] < earlier[i] {
			return Histogram{}, false
		}
		d[i] = h[i] - earlier[i]
	}
	return d, true
}

// Add puts o on top.
func (h *Histogram) Add(o *Histogram) {
	for i := range h {
		h[i] += o[i]
	}
}

// Quantile estimates the q-quantile in seconds, as the upper bound of the bucket
// that holds it: never too low, at most twice too high. 0 when it is empty.
func (h *Histogram) Quantile(q float64) float64 {
	total := h.Count()
	if total == 0 {
		return 0
	}
	rank := q * float64(total)
	var seen uint64
	for i, c := range h {
		seen += c
		if c > 0 && float64(seen) >= rank {
			return UpperBound(i)
		}
	}
	return UpperBound(Buckets - 1)
}
