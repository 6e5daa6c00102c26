package image

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/checkpoint"
)

// WriteParent writes images of an earlier dump that never was: they say that
// they have every page of every process. A dump that is told to build on them
// only notes which pages there are, marked Parent, and touches none; a process
// that they do not name is dumped as ever. CRIU takes a process that started
// after an earlier dump for another one with the same id, so this one lies an
// hour ahead of uptime (microseconds since boot).
func WriteParent(dir string, pids []checkpoint.PID, uptime uint64) error {
	const hour = 3600 * 1e6
	err := writeFile(filepath.Join(dir, "inventory.img"), func(w io.Writer) error {
		img, err := newImage(w, inventoryMagic)
		if err != nil {
			return err
		}
		return img.message(&inventory.InventoryEntry{ImgVersion: proto.Uint32(2), DumpUptime: proto.Uint64(uptime + hour)})
	})
	if err != nil {
		return fmt.Errorf("parent images: %w", err)
	}
	const pagesID = 1
	if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("pages-%d.img", pagesID)), nil, 0o600); err != nil {
		return fmt.Errorf("parent images: %w", err)
	}
	everything := Pagemap{PagesID: pagesID}
	for at := uint64(0); at < parentSpace; at += parentRun * checkpoint.PageSize {
		everything.Runs = append(everything.Runs, Run{Addr: at, Pages: parentRun, Flags: Parent})
	}
	for _, pid := range pids {
		name := filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid))
		if err := writeFile(name, func(w io.Writer) error { return writePagemap(w, everything, true) }); err != nil {
			return fmt.Errorf("parent images: %w", err)
		}
	}
	return nil
}

// Discard makes a dump throw the pages away that it would write: it lets the first
// n pages images lead to the null device, to which CRIU splices pages without
// touching them. Settle and SettleShared then make the images whole.
func Discard(dir string, n int) error {
	for id := 1; id <= n; id++ {
		if err := os.Symlink(os.DevNull, filepath.Join(dir, fmt.Sprintf("pages-%d.img", id))); err != nil {
			return fmt.Errorf("discard pages: %w", err)
		}
	}
	return nil
}

// discarded says whether the pages that belong in an image were thrown away.
func discarded(name string) (bool, error) {
	fi, err := os.Lstat(name)
	return err == nil && fi.Mode().Type() == os.ModeSymlink, err
}

const (
	// parentSpace is all that a process of a 64-bit platform can map without
	// asking for more (48 bits on arm64, 47 on amd64).
	parentSpace = 1 << 48
	// parentRun fits the 32 bits in which CRIU before 4.2 counts a run's pages.
	parentRun = 1 << 30
)

// Memory reads a process's memory: all of buf, from addr on.
type Memory func(pid checkpoint.PID, addr uint64, buf []byte) error

// Settle decides, in a dump that was built on WriteParent's images, what becomes
// of each page marked Parent, by CRIU's own rule for a dump with lazy pages
// (generate_iovs in criu/mem.c): left to be placed lazily if its mapping can be,
// and no thread's stack pointer is in it, which is needed at once; else it goes
// into the pages image, read from the processes, which must still stand as they
// were dumped; so does what CRIU wrote and Discard threw away. After it the dump
// depends on no other. It returns how much it read.
//
// CRIU's restore reads a pagemap run by run and skips what is lazy; a heap may
// have a hundred thousand such runs with holes of a page between them. So it is
// given one in which they are joined over holes, and lazy-<pid>.img says which
// pages there really are: who places them has to go by that, or pages that the
// process gave back would come to life again.
func Settle(dir string, read Memory) (checkpoint.Bytes, error) {
	tasks, err := readFile(filepath.Join(dir, "pstree.img"), ReadProcessTree)
	if err != nil {
		return 0, err
	}
	var total checkpoint.Bytes
	for _, t := range tasks {
		n, err := settleTask(dir, t, read)
		total += n
		if err != nil {
			return total, fmt.Errorf("pages of process %d: %w", t.PID, err)
		}
	}
	return total, nil
}

func settleTask(dir string, t Task, read Memory) (checkpoint.Bytes, error) {
	name := filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", t.PID))
	old, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil // a zombie, or the memory of another one
	}
	if err != nil {
		return 0, err
	}
	defer old.Close()
	mm, err := readFile(filepath.Join(dir, fmt.Sprintf("mm-%d.img", t.PID)), ReadMM)
	if err != nil {
		return 0, err
	}
	s := settler{vmas: mm.VMAs, stacks: map[uint64]bool{}}
	for _, v := range mm.VMAs {
		s.guarded = s.guarded || v.Status&Guard != 0
	}
	for _, tid := range t.Threads {
		sp, err := readFile(filepath.Join(dir, fmt.Sprintf("core-%d.img", tid)), ReadStackPointer)
		if err != nil {
			return 0, err
		}
		s.stacks[sp&^(checkpoint.PageSize-1)] = true
	}
	var pages []storedRun
	var total checkpoint.Bytes
	err = replaceFile(name, func(joined io.Writer) error {
		var id uint32
		err := writeFile(filepath.Join(dir, fmt.Sprintf("lazy-%d.img", t.PID)), func(exact io.Writer) (err error) {
			// Run by run: a large process has a million of them.
			id, err = s.pagemap(joined, exact, old, func(r Run, fresh bool) {
				if r.Flags&Present != 0 {
					pages = append(pages, storedRun{r, fresh})
				}
			})
			return err
		})
		if err != nil {
			return err
		}
		name := filepath.Join(dir, fmt.Sprintf("pages-%d.img", id))
		gone, err := discarded(name)
		if err != nil {
			return err
		}
		for i := range pages {
			pages[i].fresh = pages[i].fresh || gone
		}
		if gone && len(pages) == 0 {
			return replaceFile(name, func(io.Writer) error { return nil })
		}
		total, err = settlePages(name, pages, func(addr uint64, buf []byte) error { return read(t.PID, addr, buf) })
		return err
	})
	return total, err
}

// storedRun is in the pages image; fresh ones are not in what CRIU wrote.
type storedRun struct {
	Run
	fresh bool
}

// settler gives each Parent page its fate. Runs come ascending; neighbours of
// those that it changed are joined.
type settler struct {
	vmas   []VMA
	stacks map[uint64]bool // pages with stack pointers
	at     int             // the mapping that was looked at last
	hole   int             // the same for holes
	// guarded: some holes are guard regions, which a restore makes anew.
	guarded bool
	last    uint64
	ours    Run // not yet given to emit; none if it has no pages
}

// pagemap rewrites one, twice: exactly, and with lazy runs joined over holes. It
// returns its id of pages.
func (s *settler) pagemap(joined, exact io.Writer, r io.Reader, tell func(Run, bool)) (id uint32, err error) {
	var out [2]*imageWriter
	for i, w := range []io.Writer{joined, exact} {
		if out[i], err = newImage(w, pagemapMagic); err != nil {
			return 0, err
		}
	}
	var b []byte
	put := func(w *imageWriter, r Run) error {
		b = appendRun(b[:0], r, false)
		return w.entry(b)
	}
	var before Run // not yet in joined
	emit := func(r Run, fresh bool) error {
		tell(r, fresh)
		if err := put(out[1], r); err != nil {
			return err
		}
		if s.joins(before, r) {
			before.Pages = checkpoint.Pages((r.End() - before.Addr) / checkpoint.PageSize)
			return nil
		}
		last := before
		before = r
		if last.Pages == 0 {
			return nil
		}
		return put(out[0], last)
	}
	err = eachRun(r, func(pagesID uint32) error {
		id = pagesID
		head := appendVarint(nil, 1, uint64(pagesID))
		return errors.Join(out[0].entry(head), out[1].entry(head))
	}, func(r Run) error { return s.run(r, emit) })
	if err == nil {
		err = s.flush(emit)
	}
	if err == nil && before.Pages > 0 {
		err = put(out[0], before)
	}
	return id, err
}

// joins says whether between two lazy runs there is nothing but a hole in one
// mapping that can be lazy.
func (s *settler) joins(a, b Run) bool {
	if a.Pages == 0 || a.Flags != Lazy || b.Flags != Lazy || s.guarded {
		return false
	}
	for s.hole < len(s.vmas) && s.vmas[s.hole].End < b.Addr {
		s.hole++
	}
	if s.hole == len(s.vmas) {
		return false
	}
	vma := s.vmas[s.hole]
	return vma.Lazy() && vma.Start <= a.End() && b.Addr <= vma.End
}

func (s *settler) run(r Run, emit func(Run, bool) error) error {
	if r.Addr < s.last {
		return malformed("run at %#x after %#x", r.Addr, s.last)
	}
	s.last = r.End()
	if r.Flags&Parent == 0 {
		if err := s.flush(emit); err != nil {
			return err
		}
		return emit(r, false)
	}
	for addr := r.Addr; addr < r.End(); {
		for s.at < len(s.vmas) && (s.vmas[s.at].Status&Guard != 0 || s.vmas[s.at].End <= addr) {
			s.at++
		}
		if s.at == len(s.vmas) || addr < s.vmas[s.at].Start {
			return malformed("page %#x is in no mapping", addr)
		}
		vma := s.vmas[s.at]
		end, flags := min(r.End(), vma.End), Present
		switch {
		case !vma.Lazy():
		case s.stacks[addr]:
			end = addr + checkpoint.PageSize
		default:
			flags = Lazy
			for sp := range s.stacks {
				if sp > addr && sp < end {
					end = sp
				}
			}
		}
		next := Run{Addr: addr, Pages: checkpoint.Pages((end - addr) / checkpoint.PageSize), Flags: flags}
		if s.ours.Pages > 0 && s.ours.End() == addr && s.ours.Flags == flags {
			s.ours.Pages += next.Pages
		} else {
			if err := s.flush(emit); err != nil {
				return err
			}
			s.ours = next
		}
		addr = end
	}
	return nil
}

func (s *settler) flush(emit func(Run, bool) error) error {
	r := s.ours
	s.ours = Run{}
	if r.Pages == 0 {
		return nil
	}
	return emit(r, true)
}

// settlePages rewrites a pages image: runs in their order, those that are not
// fresh from the file itself.
func settlePages(name string, runs []storedRun, read func(addr uint64, buf []byte) error) (total checkpoint.Bytes, err error) {
	if !slices.ContainsFunc(runs, func(r storedRun) bool { return r.fresh }) {
		return 0, nil
	}
	old, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer old.Close()
	err = replaceFile(name, func(w io.Writer) error {
		buf := make([]byte, settleChunk)
		for _, r := range runs {
			for addr := r.Addr; addr < r.End(); {
				b := buf[:min(uint64(len(buf)), r.End()-addr)]
				if r.fresh {
					err = read(addr, b)
					total += checkpoint.Bytes(len(b))
				} else {
					_, err = io.ReadFull(old, b)
				}
				if err == nil {
					_, err = w.Write(b)
				}
				if err != nil {
					return fmt.Errorf("%d bytes at %#x: %w", len(b), addr, err)
				}
				addr += uint64(len(b))
			}
		}
		return nil
	})
	return total, err
}

// replaceFile writes a file anew, which may be read meanwhile.
func replaceFile(name string, write func(w io.Writer) error) error {
	tmp := name + ".new"
	if err := writeFile(tmp, write); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, name)
}

// settleChunk is read and written at once: a few of these hold all that is not
// lazy of most processes.
const settleChunk = 256 << 10

func writeFile(name string, write func(w io.Writer) error) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, settleChunk)
	err = write(w)
	if err == nil {
		err = w.Flush()
	}
	return errors.Join(err, f.Close())
}
