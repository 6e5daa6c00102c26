package profiler

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
)

// workingSetEvery: memory.stat makes the kernel add up counters of all CPUs and
// cgroups below, some 50 µs a cgroup, so the inactive page cache in it, which
// changes slowly, is read every tenth second only.
const workingSetEvery = 10

// files reads what the kernel counts in a cgroup's files. A file that cannot be
// read is a signal that is absent, until it can be read again.
type files struct {
	place runtime.Place
	// instead says which signals come from files because no program counts them.
	instead profile.Mask
	open    map[fileName]*os.File
	buf     []byte
	// inactive is the inactive page cache as of the last reading of memory.stat.
	inactive      float64
	knowsInactive bool
}

type fileName struct{ dir, name string }

// anything that files know.
const anything = ^profile.Mask(0)

func newFiles(place runtime.Place, instead profile.Mask) *files {
	return &files{place: place, instead: instead, open: map[fileName]*os.File{}, buf: make([]byte, 16<<10)}
}

func (f *files) close() error {
	var errs []error
	for _, file := range f.open {
		errs = append(errs, file.Close())
	}
	f.open = nil
	return errors.Join(errs...)
}

// read fills in what files know. tick numbers the seconds.
func (f *files) read(s *profile.Sample, tick int) {
	f.readCPU(s)
	f.readMemory(s, tick)
	f.readBlock(s)
	for _, p := range []struct {
		controller, file string
		signal           profile.Signal
	}{{"cpu", "cpu.pressure", profile.CPUPressure}, {"memory", "memory.pressure", profile.MemoryPressure}, {"blkio", "io.pressure", profile.IOPressure}} {
		if d := f.place.Dirs[p.controller]; d.V2 {
			if us, ok := parsePressure(f.content(p.controller, p.file)); ok {
				s.Set(p.signal, us/1e6)
			}
		}
	}
}

func (f *files) readCPU(s *profile.Sample) {
	d, ok := f.place.Dirs["cpu"]
	if !ok {
		return
	}
	stat := f.content("cpu", "cpu.stat")
	if d.V2 {
		if us, ok := keyed(stat, "throttled_usec"); ok {
			s.Set(profile.Throttled, us/1e6)
		}
		if us, ok := keyed(stat, "usage_usec"); ok && f.instead.Has(profile.CPU) {
			s.Set(profile.CPU, us/1e6)
		}
		return
	}
	if ns, ok := keyed(stat, "throttled_time"); ok {
		s.Set(profile.Throttled, ns/1e9)
	}
	if f.instead.Has(profile.CPU) {
		if ns, ok := single(f.content("cpuacct", "cpuacct.usage")); ok {
			s.Set(profile.CPU, ns/1e9)
		}
	}
}

func (f *files) readMemory(s *profile.Sample, tick int) {
	d, ok := f.place.Dirs["memory"]
	if !ok {
		return
	}
	current, prefix := "memory.usage_in_bytes", "total_"
	if d.V2 {
		current, prefix = "memory.current", ""
	}
	used, haveUsed := single(f.content("memory", current))
	if haveUsed {
		s.Set(profile.MemoryBytes, used)
	}
	faults := f.instead.Has(profile.MinorFaults)
	if tick%workingSetEvery == 0 || !f.knowsInactive || faults {
		stat := f.content("memory", "memory.stat")
		if n, ok := keyed(stat, prefix+"inactive_file"); ok {
			f.inactive, f.knowsInactive = n, true
		}
		all, ok1 := keyed(stat, prefix+"pgfault")
		major, ok2 := keyed(stat, prefix+"pgmajfault")
		if faults && ok1 && ok2 {
			s.Set(profile.MinorFaults, all-major)
			s.Set(profile.MajorFaults, major)
		}
	}
	if haveUsed && f.knowsInactive {
		s.Set(profile.WorkingSet, max(0, used-f.inactive))
	}
}

func (f *files) readBlock(s *profile.Sample) {
	d, ok := f.place.Dirs["blkio"]
	if !ok || !d.V2 || !f.instead.Has(profile.ReadBytes) {
		// v1's files stand still unless a device is throttled (Linux 6.10).
		return
	}
	raw := f.content("blkio", "io.stat")
	if raw == nil {
		return
	}
	for name, signal := range map[string]profile.Signal{
		"rbytes": profile.ReadBytes, "wbytes": profile.WriteBytes, "rios": profile.ReadOps, "wios": profile.WriteOps,
	} {
		s.Set(signal, sumOf(raw, name))
	}
}

// content reads a file of a controller, through a descriptor that stays open;
// nil when it cannot be read. It is valid until the next call.
func (f *files) content(controller, name string) []byte {
	d, ok := f.place.Dirs[controller]
	if !ok || f.open == nil {
		return nil
	}
	at := fileName{d.Path, name}
	file := f.open[at]
	if file == nil {
		var err error
		if file, err = os.Open(filepath.Join(d.Path, name)); err != nil {
			return nil
		}
		f.open[at] = file
	}
	n, err := file.ReadAt(f.buf, 0)
	if n == 0 || n == len(f.buf) {
		// The cgroup is gone, or the file is longer than any of the kernel's.
		_ = err
		return nil
	}
	return f.buf[:n]
}

// single parses a file with one number.
func single(raw []byte) (float64, bool) {
	if raw == nil {
		return 0, false
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(raw)), 10, 64)
	return float64(n), err == nil
}

// keyed finds the line "key value".
func keyed(raw []byte, key string) (float64, bool) {
	for line := range bytes.Lines(raw) {
		name, value, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		if ok && string(name) == key {
			n, err := strconv.ParseUint(string(value), 10, 64)
			return float64(n), err == nil
		}
	}
	return 0, false
}

// sumOf adds up name=value over the lines of io.stat.
func sumOf(raw []byte, name string) float64 {
	sum := 0.0
	for _, field := range strings.Fields(string(raw)) {
		if value, ok := strings.CutPrefix(field, name+"="); ok {
			if n, err := strconv.ParseUint(value, 10, 64); err == nil {
				sum += float64(n)
			}
		}
	}
	return sum
}

// parsePressure returns the microseconds of the line "some" (PSI,
// Documentation/accounting/psi.rst).
func parsePressure(raw []byte) (float64, bool) {
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "some "); ok {
			_, total, ok := strings.Cut(strings.TrimSpace(rest), "total=")
			n, err := strconv.ParseUint(total, 10, 64)
			return float64(n), ok && err == nil
		}
	}
	return 0, false
}
