package profiler

import (
	"bytes"
	"errors"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

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
	instead                            profile.Mask
	stat, account, used, memory, block file
	pressure                           [3]file
	// inactive is the inactive page cache as of the last reading of memory.stat.
	inactive      float64
	knowsInactive bool
}

// file is read through a descriptor that stays open.
type file struct {
	path string // "" if there is none
	fd   int    // -1 until it could be opened
}

func newFile(path string) file { return file{path, -1} }

// anything that files know.
const anything = ^profile.Mask(0)

// pressures are v2's alone.
var pressures = [3]struct {
	controller, file string
	signal           profile.Signal
}{
	{"cpu", "cpu.pressure", profile.CPUPressure},
	{"memory", "memory.pressure", profile.MemoryPressure},
	{"blkio", "io.pressure", profile.IOPressure},
}

func newFiles(place runtime.Place, instead profile.Mask) *files {
	in := func(controller, v1, v2 string) file {
		d, ok := place.Dirs[controller]
		name := v1
		if d.V2 {
			name = v2
		}
		if !ok || name == "" {
			return file{}
		}
		return newFile(filepath.Join(d.Path, name))
	}
	f := &files{
		place: place, instead: instead,
		stat: in("cpu", "cpu.stat", "cpu.stat"), account: in("cpuacct", "cpuacct.usage", ""),
		used: in("memory", "memory.usage_in_bytes", "memory.current"), memory: in("memory", "memory.stat", "memory.stat"),
		// v1's files stand still unless a device is throttled (Linux 6.10).
		block: in("blkio", "", "io.stat"),
	}
	for i, p := range pressures {
		f.pressure[i] = in(p.controller, "", p.file)
	}
	return f
}

func (f *files) close() error {
	var errs []error
	for _, file := range []*file{&f.stat, &f.account, &f.used, &f.memory, &f.block, &f.pressure[0], &f.pressure[1], &f.pressure[2]} {
		errs = append(errs, file.close())
	}
	return errors.Join(errs...)
}

// close ends all reading of it.
func (f *file) close() error {
	open := f.path != "" && f.fd >= 0
	f.path = ""
	if !open {
		return nil
	}
	return unix.Close(f.fd)
}

// read returns the content, in buf; nil when it cannot be read.
func (f *file) read(buf []byte) []byte {
	if f.path == "" {
		return nil
	}
	if f.fd < 0 {
		var err error
		if f.fd, err = unix.Open(f.path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			f.fd = -1
			return nil
		}
	}
	n, err := unix.Pread(f.fd, buf, 0)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Pread(f.fd, buf, 0)
	}
	if n <= 0 || n == len(buf) {
		return nil // the cgroup is gone, or the file is longer than any of the kernel's
	}
	return buf[:n]
}

// read fills in what files know. tick numbers the seconds; buf is read into.
func (f *files) read(s *profile.Sample, tick int, buf []byte) {
	f.readCPU(s, buf)
	f.readMemory(s, tick, buf)
	f.readBlock(s, buf)
	for i := range f.pressure {
		if us, ok := parsePressure(f.pressure[i].read(buf)); ok {
			s.Set(pressures[i].signal, us/1e6)
		}
	}
}

func (f *files) readCPU(s *profile.Sample, buf []byte) {
	stat := f.stat.read(buf)
	if f.place.Dirs["cpu"].V2 {
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
		if ns, ok := single(f.account.read(buf)); ok {
			s.Set(profile.CPU, ns/1e9)
		}
	}
}

func (f *files) readMemory(s *profile.Sample, tick int, buf []byte) {
	used, haveUsed := single(f.used.read(buf))
	if haveUsed {
		s.Set(profile.MemoryBytes, used)
	}
	faults := f.instead.Has(profile.MinorFaults)
	if tick%workingSetEvery == 0 || !f.knowsInactive || faults {
		prefix := "total_"
		if f.place.Dirs["memory"].V2 {
			prefix = ""
		}
		stat := f.memory.read(buf)
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

func (f *files) readBlock(s *profile.Sample, buf []byte) {
	if !f.instead.Has(profile.ReadBytes) {
		return
	}
	raw := f.block.read(buf)
	if raw == nil {
		return
	}
	for name, signal := range map[string]profile.Signal{
		"rbytes": profile.ReadBytes, "wbytes": profile.WriteBytes, "rios": profile.ReadOps, "wios": profile.WriteOps,
	} {
		s.Set(signal, sumOf(raw, name))
	}
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
	for line := range bytes.Lines(raw) {
		if rest, ok := bytes.CutPrefix(line, []byte("some ")); ok {
			_, total, ok := bytes.Cut(bytes.TrimSuffix(rest, []byte("\n")), []byte("total="))
			n, err := strconv.ParseUint(string(total), 10, 64)
			return float64(n), ok && err == nil
		}
	}
	return 0, false
}
