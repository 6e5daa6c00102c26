package track

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// mapping is one line of /proc/PID/maps.
type mapping struct {
	start, end uint64
	private    bool
	exec       bool
	inode      uint64
	// offset is where in its file the mapping begins, in bytes; dev the file's device.
	offset, dev uint64
	// anonymous says that the line names no device: neither a file nor shared
	// memory stands behind the mapping.
	anonymous bool
	name      string

	// What only smaps tells; zero when it was not read.
	locked, huge, droppable bool
	// empty says that no page of it was populated when smaps was read.
	empty bool
}

func (m mapping) pages() checkpoint.Pages {
	return checkpoint.Pages((m.end - m.start) / checkpoint.PageSize)
}

// sparseLimit is the size from which a mapping without any page is worth
// finding out by smaps where PAGEMAP_SCAN is missing: reading pagemap costs 8
// bytes for every page that could be there, 2 MiB for this many.
const sparseLimit = 1 << 30

// eligible says whether CRIU leaves the mapping's pages out of its images when
// it dumps with lazy_pages: criu/include/vma.h vma_entry_can_be_lazy, with the
// flags as criu/proc_parse.c sets them.
func (m mapping) eligible() bool {
	switch {
	case !m.private, m.locked, m.huge, m.droppable:
		return false
	case m.anonymous:
		return !specialMapping(m.name)
	default:
		// A private mapping of the zero device is anonymous memory to the kernel.
		// CRIU 4.2 writes it into its images, others may not: it is rare, and too
		// much is harmless.
		return m.name == "/dev/zero"
	}
}

// specialMapping names what the kernel maps by itself and fills by itself.
func specialMapping(name string) bool {
	switch name {
	case "[vdso]", "[vsyscall]", "[vectors]", "[sigpage]", "[uprobes]":
		return true
	}
	return strings.HasPrefix(name, "[vvar")
}

// eligibleMappings lists the mappings to track, in order of address. A process
// without memory, as a zombie is, is errGone.
func eligibleMappings(pid int, needEmpty bool) ([]mapping, error) {
	all, err := readMaps(pid)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errGone
	}
	locked, err := hasLockedMemory(pid)
	if err != nil {
		return nil, err
	}
	if needEmpty {
		needEmpty = false
		for _, m := range all {
			needEmpty = needEmpty || m.end-m.start >= sparseLimit
		}
	}
	// smaps walks the page tables of the whole process, so it is read only for
	// what maps does not tell.
	if locked || needEmpty {
		if all, err = readSmaps(pid); err != nil {
			return nil, err
		}
	}
	keep := all[:0]
	var end uint64
	for _, m := range all {
		// The kernel writes the list page by page, without a lock in between: a
		// mapping that grew meanwhile may overlap the one before it.
		m.start = max(m.start, end)
		if m.start >= m.end || !m.eligible() {
			continue
		}
		end = m.end
		keep = append(keep, m)
	}
	return keep, nil
}

func readMaps(pid int) ([]mapping, error) {
	return readMappings(fmt.Sprintf("/proc/%d/maps", pid))
}

func readSmaps(pid int) ([]mapping, error) {
	return readMappings(fmt.Sprintf("/proc/%d/smaps", pid))
}

func readMappings(path string) ([]mapping, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, procError(err)
	}
	defer f.Close()
	all, err := parseMappings(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, procError(err))
	}
	return all, nil
}

// parseMappings reads the text of /proc/PID/maps or smaps (proc_pid_maps(5),
// Documentation/filesystems/proc.rst).
func parseMappings(r io.Reader) ([]mapping, error) {
	var all []mapping
	s := bufio.NewScanner(r)
	// A path may be as long as PATH_MAX and is escaped threefold in the worst
	// case.
	s.Buffer(make([]byte, 0, 64<<10), 64<<10)
	for s.Scan() {
		line := s.Bytes()
		// In smaps the details of a mapping follow it as "Key: value"; a mapping
		// starts with lower-case digits.
		if len(line) > 0 && line[0] >= 'A' && line[0] <= 'Z' {
			if len(all) == 0 {
				return nil, fmt.Errorf("a detail before any mapping: %q", line)
			}
			if err := all[len(all)-1].detail(line); err != nil {
				return nil, err
			}
			continue
		}
		m, err := parseMapping(line)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	return all, nil
}

// parseMapping reads "start-end perms offset dev inode  name".
func parseMapping(line []byte) (mapping, error) {
	malformed := func() (mapping, error) { return mapping{}, fmt.Errorf("mapping %q: malformed", line) }
	fields := bytes.SplitN(line, []byte(" "), 6)
	if len(fields) < 5 || len(fields[1]) != 4 {
		return malformed()
	}
	from, to, ok := bytes.Cut(fields[0], []byte("-"))
	if !ok {
		return malformed()
	}
	var m mapping
	var err error
	if m.start, err = strconv.ParseUint(string(from), 16, 64); err != nil {
		return malformed()
	}
	if m.end, err = strconv.ParseUint(string(to), 16, 64); err != nil {
		return malformed()
	}
	if m.end <= m.start || m.start%checkpoint.PageSize != 0 || m.end%checkpoint.PageSize != 0 {
		return malformed()
	}
	if m.inode, err = strconv.ParseUint(string(fields[4]), 10, 64); err != nil {
		return malformed()
	}
	if m.offset, err = strconv.ParseUint(string(fields[2]), 16, 64); err != nil {
		return malformed()
	}
	major, minor, ok := bytes.Cut(fields[3], []byte(":"))
	if !ok {
		return malformed()
	}
	hi, err := strconv.ParseUint(string(major), 16, 32)
	if err != nil {
		return malformed()
	}
	lo, err := strconv.ParseUint(string(minor), 16, 32)
	if err != nil {
		return malformed()
	}
	m.dev = unix.Mkdev(uint32(hi), uint32(lo))
	m.exec = fields[1][2] == 'x'
	m.private = fields[1][3] == 'p'
	m.anonymous = m.inode == 0 && string(fields[3]) == "00:00"
	if len(fields) == 6 {
		m.name = string(bytes.TrimLeft(fields[5], " "))
	}
	return m, nil
}

// detail takes in one "Key: value" line of smaps. Rss comes before Swap.
func (m *mapping) detail(line []byte) error {
	key, value, ok := bytes.Cut(line, []byte(":"))
	if !ok {
		return fmt.Errorf("mapping detail %q: malformed", line)
	}
	value = bytes.TrimSpace(value)
	switch string(key) {
	case "Rss":
		m.empty = string(value) == "0 kB"
	case "Swap":
		m.empty = m.empty && string(value) == "0 kB"
	case "VmFlags":
		for _, flag := range bytes.Fields(value) {
			switch string(flag) {
			case "lo":
				m.locked = true
			case "ht":
				m.huge = true
			case "dp":
				m.droppable = true
			}
		}
	}
	return nil
}

// hasLockedMemory reads VmLck, the size of all locked mappings.
func hasLockedMemory(pid int) (bool, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false, procError(err)
	}
	value, ok := statusField(raw, "VmLck")
	if !ok {
		return false, errGone
	}
	return value != "0 kB", nil
}

// statusField returns one value of /proc/PID/status.
func statusField(raw []byte, key string) (string, bool) {
	for line := range bytes.Lines(raw) {
		if k, v, ok := bytes.Cut(line, []byte(":")); ok && string(k) == key {
			return string(bytes.TrimSpace(v)), true
		}
	}
	return "", false
}

// procError turns what /proc says about a process that has ended into errGone.
func procError(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return errGone
	}
	return err
}
