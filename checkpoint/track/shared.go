package track

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/osthread"
)

// Segment is an object of shared memory that a shard uses: anonymous memory
// mapped as shared, a memfd, or a System V segment. What is written to it is not
// tracked: a process can map it, write and be gone before anybody looks, or write
// without mapping it at all.
type Segment struct {
	// ID is its inode number, by which CRIU names it.
	ID uint64
	// Pages is as far as CRIU restores it: to its end, or, for anonymous memory,
	// to the last page that any process maps.
	Pages checkpoint.Pages

	file *os.File
}

// SharedSegments opens the shared memory that the processes map, or hold as
// memfd, in order of ID; the caller closes each. It leaves out huge pages, files
// in a tmpfs, System V segments that no process maps, and what went away while it
// looked.
func SharedSegments(procs []checkpoint.Process) ([]*Segment, error) {
	f, err := findShared(procs)
	if err != nil {
		return nil, err
	}
	segments := slices.Collect(maps.Values(f.segments))
	slices.SortFunc(segments, func(a, b *Segment) int { return cmp.Compare(a.ID, b.ID) })
	return segments, nil
}

// OtherShared says whether there is shared memory that CRIU dumps and that
// SharedSegments leaves out.
func OtherShared(procs []checkpoint.Process) (bool, error) {
	f, err := findShared(procs)
	if err != nil {
		return false, err
	}
	defer f.close()
	if f.other || len(procs) == 0 {
		return f.other, nil
	}
	ids, err := sysvSegments(procs[0].HostPID)
	if err != nil {
		return false, fmt.Errorf("shared memory: %w", err)
	}
	return slices.ContainsFunc(ids, func(id uint64) bool { return f.segments[id] == nil }), nil
}

// finder collects segments by ID.
type finder struct {
	dev      uint64
	segments map[uint64]*Segment
	other    bool // it has met some that it does not collect
}

func findShared(procs []checkpoint.Process) (*finder, error) {
	dev, err := sharedDevice()
	if err != nil {
		return nil, fmt.Errorf("shared memory: %w", err)
	}
	f := &finder{dev: dev, segments: map[uint64]*Segment{}}
	for _, p := range procs {
		err := f.mapped(p.HostPID)
		if err == nil {
			err = f.open(p.HostPID)
		}
		if err != nil && !errors.Is(err, errGone) {
			f.close()
			return nil, fmt.Errorf("shared memory of process %d: %w", p.PID, err)
		}
	}
	return f, nil
}

func (f *finder) close() {
	for _, s := range f.segments {
		_ = s.Close() // read only
	}
}

// sharedDevice is the kernel's own tmpfs (shm_mnt in mm/shmem.c), in which all
// shared memory lives that no user gave a path to.
var sharedDevice = sync.OnceValues(func() (uint64, error) {
	fd, err := unix.MemfdCreate("", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Dev, nil
})

// Names in /proc/PID/maps, of which huge pages have some as well.
const (
	memfdName = "/memfd:"
	sysvName  = "/SYSV"
	hugeName  = "/anon_hugepage"
)

func (f *finder) mapped(pid int) error {
	all, err := readMaps(pid)
	if err != nil {
		return err
	}
	for _, m := range all {
		memfd, sysv := strings.HasPrefix(m.name, memfdName), strings.HasPrefix(m.name, sysvName)
		if m.dev != f.dev {
			f.other = f.other || memfd || sysv || strings.HasPrefix(m.name, hugeName)
			continue
		}
		s := f.segments[m.inode]
		if s == nil {
			if s, err = f.add(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, m.start, m.end), m.inode); s == nil || err != nil {
				if err != nil {
					return err
				}
				continue
			}
			// Of anonymous memory CRIU keeps what is mapped (criu/shmem.c,
			// add_shmem_area), of the others all.
			if !memfd && !sysv {
				s.Pages = 0
			}
		}
		if !memfd && !sysv {
			s.Pages = max(s.Pages, checkpoint.Pages(m.offset/checkpoint.PageSize)+m.pages())
		}
	}
	return nil
}

// open finds what is open and not mapped: only a memfd can be.
func (f *finder) open(pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return procError(err)
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		if to, err := os.Readlink(path); err != nil || !strings.HasPrefix(to, memfdName) {
			continue // closed meanwhile, or something else
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || f.segments[st.Ino] != nil && st.Dev == f.dev {
			continue
		}
		if st.Dev != f.dev {
			f.other = true
			continue
		}
		if _, err := f.add(path, st.Ino); err != nil {
			return err
		}
	}
	return nil
}

// sysvSegments lists the ids of all System V segments in the ipc namespace of a
// process, which are their inode numbers (ipc/shm.c).
func sysvSegments(pid int) (ids []uint64, err error) {
	var raw []byte
	err = osthread.Do(func() error {
		ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/ipc", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(ns)
		if err := unix.Setns(ns, unix.CLONE_NEWIPC); err != nil {
			return err
		}
		raw, err = os.ReadFile("/proc/sysvipc/shm")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("segments of System V: %w", err)
	}
	for line := range bytes.Lines(raw) {
		fields := bytes.Fields(line)
		if len(fields) < 2 || string(fields[0]) == "key" {
			continue
		}
		id, err := strconv.ParseUint(string(fields[1]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("segments of System V: %q: %w", line, err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// add opens a segment; it returns nil if there is something else by now.
func (f *finder) add(path string, inode uint64) (*Segment, error) {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), file.Close())
	}
	if st.Dev != f.dev || st.Ino != inode {
		return nil, file.Close()
	}
	s := &Segment{ID: inode, Pages: checkpoint.Pages((st.Size + checkpoint.PageSize - 1) / checkpoint.PageSize), file: file}
	f.segments[inode] = s
	return s, nil
}

// Data calls visit for each run of pages that may hold something, by their
// number in the segment, ascending and not beyond Pages; what is swapped out
// counts. Not for several goroutines at once.
func (s *Segment) Data(visit func(first uint64, n checkpoint.Pages)) error {
	end := int64(s.Pages.Bytes())
	for at := int64(0); at < end; {
		from, err := s.file.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("shared memory %d: %w", s.ID, err)
		}
		to, err := s.file.Seek(from, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) { // it shrank
			return nil
		}
		if err != nil {
			return fmt.Errorf("shared memory %d: %w", s.ID, err)
		}
		// The end of a memfd need not be the end of a page.
		from -= from % checkpoint.PageSize
		to = min(to+(checkpoint.PageSize-to%checkpoint.PageSize)%checkpoint.PageSize, end)
		if from < to {
			visit(uint64(from/checkpoint.PageSize), checkpoint.Pages((to-from)/checkpoint.PageSize))
		}
		at = to
	}
	return nil
}

// Read fills dst, whole pages, from page first on. What is beyond the end reads
// as zero: a running shard may have cut it off.
func (s *Segment) Read(first uint64, dst []byte) error {
	n, err := s.file.ReadAt(dst, int64(first)*checkpoint.PageSize)
	if errors.Is(err, io.EOF) {
		clear(dst[n:])
		return nil
	}
	if err != nil {
		return fmt.Errorf("shared memory %d: %w", s.ID, err)
	}
	return nil
}

// Close lets go of the segment; as long as it is open its memory stays.
func (s *Segment) Close() error { return s.file.Close() }
