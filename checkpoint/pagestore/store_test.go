package pagestore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

const page = checkpoint.PageSize

// newStore makes a store on /dev/shm, the one tmpfs that a user may write to.
func newStore(t *testing.T) *Store {
	t.Helper()
	base, err := os.MkdirTemp("/dev/shm", "tranship-pagestore-")
	if err != nil {
		testenv.Missing(t, "a writable tmpfs at /dev/shm: "+err.Error())
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	s, err := Create(filepath.Join(base, "store"))
	if errors.Is(err, ErrNotTmpfs) {
		testenv.Missing(t, "a tmpfs at /dev/shm")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// pattern is page content that names pid, address and round.
func pattern(pid checkpoint.PID, addr uint64, round uint32, pages int) []byte {
	out := make([]byte, pages*page)
	for i := 0; i < len(out); i += 16 {
		binary.LittleEndian.PutUint64(out[i:], addr+uint64(i))
		binary.LittleEndian.PutUint32(out[i+8:], uint32(pid))
		binary.LittleEndian.PutUint32(out[i+12:], round+1)
	}
	return out
}

func TestPagesAreFoundWhereTheyWerePut(t *testing.T) {
	const top = AddressLimit - page
	for _, tc := range []struct {
		name string
		addr uint64
	}{
		{"at the lowest address", 0},
		{"in the first mapping of a program", 0x400000},
		{"in the stack of a four-level process", 0x7ffd_1234_5000},
		{"at the last page of user space", top},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStore(t)
			want := pattern(7, tc.addr, 0, 1)
			if err := s.PutPages(7, tc.addr, want); err != nil {
				t.Fatal(err)
			}
			got := bytes.Repeat([]byte{0xee}, page)
			if err := s.ReadPages(7, tc.addr, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatal("other content came back")
			}
			if size, err := s.Bytes(); err != nil || size != page {
				t.Fatalf("takes %d bytes, %v; want one page", size, err)
			}
		})
	}
}

func TestImpossibleExtentsAreRefused(t *testing.T) {
	s := newStore(t)
	one := make([]byte, page)
	for _, tc := range []struct {
		name string
		pid  checkpoint.PID
		addr uint64
		data []byte
	}{
		{"pid zero", 0, page, one},
		{"negative pid", -3, page, one},
		{"address inside a page", 1, page + 8, one},
		{"part of a page", 1, page, one[:100]},
		{"nothing", 1, page, nil},
		{"past user space", 1, AddressLimit, one},
		{"reaching past user space", 1, AddressLimit - page, make([]byte, 2*page)},
		{"address that would be a negative offset", 1, 1 << 63, one},
		{"wrapping around", 1, ^uint64(0) - page + 1, one},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := s.PutPages(tc.pid, tc.addr, tc.data); !errors.Is(err, ErrExtent) {
				t.Errorf("PutPages: %v", err)
			}
			if err := s.ReadPages(tc.pid, tc.addr, tc.data); !errors.Is(err, ErrExtent) {
				t.Errorf("ReadPages: %v", err)
			}
		})
	}
	if err := s.ZeroPages(1, page, -1); !errors.Is(err, ErrExtent) {
		t.Errorf("ZeroPages of -1 pages: %v", err)
	}
	if err := s.Release(1, page, 1<<62); !errors.Is(err, ErrExtent) {
		t.Errorf("Release of 2^62 pages: %v", err)
	}
	if pids, err := s.Tasks(); len(pids) != 0 || err != nil {
		t.Errorf("a refused call left files for %v, %v", pids, err)
	}
}

func TestTheLastRoundWins(t *testing.T) {
	s := newStore(t)
	const addr = 0x10000
	for round := range uint32(3) {
		if err := s.PutPages(1, addr+uint64(round)*page, pattern(1, addr, round, 4)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ZeroPages(1, addr+5*page, 1); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 7*page)
	if err := s.ReadPages(1, addr, got); err != nil {
		t.Fatal(err)
	}
	var want []byte
	want = append(want, pattern(1, addr, 0, 1)...)
	want = append(want, pattern(1, addr, 1, 1)...)
	want = append(want, pattern(1, addr, 2, 3)...)
	want = append(want, make([]byte, 2*page)...)
	if !bytes.Equal(got, want) {
		t.Fatal("content of an older round survived")
	}
}

func TestUnknownProcessesReadAsZero(t *testing.T) {
	s := newStore(t)
	got := bytes.Repeat([]byte{1}, page)
	if err := s.ReadPages(99, page, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, make([]byte, page)) {
		t.Fatal("not zero")
	}
	if err := s.Extents(99, 0, AddressLimit, func(uint64, checkpoint.Pages) error {
		t.Error("has an extent")
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

type run struct {
	addr  uint64
	pages checkpoint.Pages
}

func extents(t *testing.T, s *Store, pid checkpoint.PID, from, to uint64) []run {
	t.Helper()
	var runs []run
	if err := s.Extents(pid, from, to, func(addr uint64, n checkpoint.Pages) error {
		runs = append(runs, run{addr, n})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return runs
}

func TestExtentsAreTheRunsOfData(t *testing.T) {
	s := newStore(t)
	const high = 0x7fff_0000_0000
	for _, r := range []run{{0x10000, 3}, {0x20000, 1}, {high, 2}} {
		if err := s.PutPages(1, r.addr, pattern(1, r.addr, 0, int(r.pages))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ZeroPages(1, 0x11000, 1); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		from, to uint64
		want     []run
	}{
		{"everywhere", 0, AddressLimit, []run{{0x10000, 1}, {0x12000, 1}, {0x20000, 1}, {high, 2}}},
		{"cut at both ends", 0x12000, high + page, []run{{0x12000, 1}, {0x20000, 1}, {high, 1}}},
		{"only a hole", 0x30000, 0x40000, nil},
		{"past the last page", high + 2*page, AddressLimit, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := extents(t, s, 1, tc.from, tc.to)
			if len(got) != len(tc.want) {
				t.Fatalf("got %v, want %v", got, tc.want)
			}
			for i := range got {
				if got[i] != tc.want[i] {
					t.Fatalf("got %v, want %v", got, tc.want)
				}
			}
		})
	}
	stop := errors.New("enough")
	if err := s.Extents(1, 0, AddressLimit, func(uint64, checkpoint.Pages) error { return stop }); !errors.Is(err, stop) {
		t.Fatalf("visit's error became %v", err)
	}
}

func TestAStoreIsFoundAgainAfterItsWriterDied(t *testing.T) {
	s := newStore(t)
	want := pattern(3, 0x5000, 1, 2)
	if err := s.PutPages(3, 0x5000, want); err != nil {
		t.Fatal(err)
	}
	if err := s.PutPages(4, 0x9000, want); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(4, 0x9000, 1); err != nil {
		t.Fatal(err)
	}
	again, err := Open(s.dir) // while the first still has it open, as after a fork
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	got := make([]byte, 2*page)
	if err := again.ReadPages(3, 0x5000, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("other content, %v", err)
	}
	if err := again.ReadPages(4, 0x9000, got); !errors.Is(err, ErrReleased) {
		t.Fatalf("a page that was placed before the crash was answered: %v", err)
	}
	if err := again.ReadPages(4, 0xa000, got[:page]); err != nil || !bytes.Equal(got[:page], want[page:]) {
		t.Fatalf("the neighbour of a placed page: %v", err)
	}
}

func TestDataThatVanishedIsNotAZeroPage(t *testing.T) {
	s := newStore(t)
	const addr = 0x10000
	if err := s.PutPages(1, addr, pattern(1, addr, 0, 4)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4*page)
	if err := s.ReadData(1, addr, got); err != nil || !bytes.Equal(got, pattern(1, addr, 0, 4)) {
		t.Fatalf("what is there: %v", err)
	}
	if err := s.ZeroPages(1, addr+2*page, 1); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name        string
		pid         checkpoint.PID
		addr, pages uint64
	}{
		{"a hole inside", 1, addr, 4},
		{"a hole at the end", 1, addr, 3},
		{"a hole at the beginning", 1, addr + 2*page, 2},
		{"past the end", 1, addr + 3*page, 2},
		{"no data at all", 1, 0x40000, 1},
		{"an unknown process", 2, addr, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := s.ReadData(tc.pid, tc.addr, make([]byte, tc.pages*page)); !errors.Is(err, ErrLost) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if err := s.ReadData(1, addr+3*page, make([]byte, page)); err != nil {
		t.Fatalf("what is there beside it: %v", err)
	}
	if err := s.Release(1, addr, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadData(1, addr, make([]byte, page)); !errors.Is(err, ErrReleased) {
		t.Fatalf("what was released: %v", err)
	}
}

func TestAReaderFollowsAWriterAndAnotherReader(t *testing.T) {
	s := newStore(t)
	reader, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	want := pattern(3, 0x5000, 0, 1)
	if err := s.PutPages(3, 0x5000, want); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, page)
	if err := reader.ReadPages(3, 0x5000, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("pages of a process that came after Open: %v", err)
	}
	if pids, err := reader.Tasks(); err != nil || len(pids) != 1 || pids[0] != 3 {
		t.Fatalf("tasks %v, %v", pids, err)
	}
	if placing, err := s.Placing(3); err != nil || placing {
		t.Fatalf("placing before anything was released: %v, %v", placing, err)
	}
	if err := reader.Release(3, 0x5000, 1); err != nil {
		t.Fatal(err)
	}
	if placing, err := s.Placing(3); err != nil || !placing {
		t.Fatalf("placing after another process released: %v, %v", placing, err)
	}
	if err := s.ReadPages(3, 0x5000, got); !errors.Is(err, ErrReleased) {
		t.Fatalf("what another process released was answered: %v", err)
	}
	if size, err := s.Bytes(); err != nil || size != 0 {
		t.Fatalf("takes %d bytes, %v", size, err)
	}
}

// A crash between the record and the punch leaves both the data and the bit:
// the page counts as placed, which it was.
func TestAPageRecordedButNotPunchedCountsAsReleased(t *testing.T) {
	s := newStore(t)
	if err := s.PutPages(1, 0x5000, pattern(1, 0x5000, 0, 1)); err != nil {
		t.Fatal(err)
	}
	f, err := s.file(1, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.placed.add(0x5000, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadPages(1, 0x5000, make([]byte, page)); !errors.Is(err, ErrReleased) {
		t.Fatalf("read: %v", err)
	}
}

func TestReleasedPagesGiveTheirMemoryBackAndAreNeverAnswered(t *testing.T) {
	s := newStore(t)
	const addr, pages = 0x7000_0000, 64
	if err := s.PutPages(1, addr, pattern(1, addr, 0, pages)); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(1, addr+3*page, 10); err != nil {
		t.Fatal(err)
	}
	if size, err := s.Bytes(); err != nil || size != (pages-10)*page {
		t.Fatalf("takes %d bytes, %v", size, err)
	}
	for i := range uint64(pages) {
		err := s.ReadPages(1, addr+i*page, make([]byte, page))
		if released := i >= 3 && i < 13; released != errors.Is(err, ErrReleased) || !released && err != nil {
			t.Errorf("page %d: %v", i, err)
		}
	}
	if err := s.PutPages(1, addr, make([]byte, page)); !errors.Is(err, ErrReleased) {
		t.Errorf("put after placing began: %v", err)
	}
	if err := s.ZeroPages(1, addr, 1); !errors.Is(err, ErrReleased) {
		t.Errorf("zero after placing began: %v", err)
	}
	if err := s.Release(1, addr, pages); err != nil {
		t.Fatal(err)
	}
	if size, err := s.Bytes(); err != nil || size != 0 {
		t.Fatalf("takes %d bytes, %v, when all was released", size, err)
	}
	if got := extents(t, s, 1, 0, AddressLimit); got != nil {
		t.Fatalf("has extents %v", got)
	}
}

func TestTheRecordOfPlacedPagesIsExact(t *testing.T) {
	s := newStore(t)
	if err := s.PutPages(1, 0, make([]byte, page)); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	const pages = 5000
	model := make([]bool, pages)
	for range 200 {
		at, n := rng.Uint64N(pages-100), 1+rng.Uint64N(100)
		if err := s.Release(1, at*page, checkpoint.Pages(n)); err != nil {
			t.Fatal(err)
		}
		for i := at; i < at+n; i++ {
			model[i] = true
		}
	}
	for i, want := range model {
		if got, err := s.Released(1, uint64(i)*page, 1); err != nil || got != want {
			t.Fatalf("page %d: released %v, %v; want %v", i, got, err, want)
		}
	}
	// A lookup and a release longer than one piece of the record.
	const far, long = uint64(1 << 40), checkpoint.Pages(recordChunk*pagesPerByte + 3)
	if got, err := s.Released(1, far, long); err != nil || got {
		t.Fatalf("untouched range: %v, %v", got, err)
	}
	if err := s.Release(1, far+uint64((long-1).Bytes()), 1); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Released(1, far, long); err != nil || !got {
		t.Fatalf("last page of a long range: %v, %v", got, err)
	}
}

func TestWritersOfDifferentAddressesDoNotDisturbEachOther(t *testing.T) {
	s := newStore(t)
	const workers, pages = 8, 64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range pages {
				pid := checkpoint.PID(1 + i%2)
				addr := uint64(i*workers+w+1) * 2 * page
				if err := s.PutPages(pid, addr, pattern(pid, addr, 0, 1)); err != nil {
					t.Error(err)
				}
				if i%4 == 3 {
					if err := s.ZeroPages(pid, addr, 1); err != nil {
						t.Error(err)
					}
				}
				if err := s.Extents(pid, 0, AddressLimit, func(uint64, checkpoint.Pages) error { return nil }); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	for w := range workers {
		for i := range pages {
			pid := checkpoint.PID(1 + i%2)
			addr := uint64(i*workers+w+1) * 2 * page
			want := pattern(pid, addr, 0, 1)
			if i%4 == 3 {
				want = make([]byte, page)
			}
			got := make([]byte, page)
			if err := s.ReadPages(pid, addr, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("pid %d %#x: %v", pid, addr, err)
			}
		}
	}
	if size, err := s.Bytes(); err != nil || size != workers*pages*3/4*page {
		t.Fatalf("takes %d bytes, %v", size, err)
	}
}

func TestOnlyAnEmptyDirectoryBecomesAStore(t *testing.T) {
	s := newStore(t)
	if _, err := Create(s.dir); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("a store was made over another: %v", err)
	}
	if _, err := Open(filepath.Dir(s.dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a directory that is no store was opened: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "x.pages"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir); err == nil || !strings.Contains(err.Error(), "x.pages") {
		t.Fatalf("a foreign file was overlooked: %v", err)
	}
	if err := s.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("Remove left the directory")
	}
	if err := s.Remove(); err != nil {
		t.Fatalf("second Remove: %v", err)
	}
}

func TestOtherFileSystemsAreRefused(t *testing.T) {
	dir := t.TempDir()
	if onTmpfs(dir) == nil {
		t.Skip("the temporary directory is a tmpfs here")
	}
	if _, err := Create(filepath.Join(dir, "s")); !errors.Is(err, ErrNotTmpfs) {
		t.Fatalf("got %v", err)
	}
}

func TestAFullTmpfsIsSaidClearlyAndTakesPagesAgainWhenThereIsRoom(t *testing.T) {
	testenv.NeedRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=256k,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := Create(filepath.Join(mnt, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var full error
	last := uint64(0)
	for addr := uint64(page); full == nil; addr += page {
		if addr > 1<<20 {
			t.Fatal("1 MiB went into 256 KiB")
		}
		full = s.PutPages(1, addr, pattern(1, addr, 0, 1))
		last = addr
	}
	if !errors.Is(full, ErrFull) || !errors.Is(full, unix.ENOSPC) {
		t.Fatalf("got %v", full)
	}
	if msg := full.Error(); !strings.Contains(msg, "pid 1") || !strings.Contains(msg, "page store is full") {
		t.Fatalf("unclear: %s", msg)
	}
	if err := s.PutPages(2, page, pattern(2, page, 0, 1)); !errors.Is(err, ErrFull) {
		t.Fatalf("a second process: %v", err)
	}
	if err := s.ZeroPages(1, page, 8); err != nil {
		t.Fatal(err)
	}
	if err := s.PutPages(1, last, pattern(1, last, 0, 1)); err != nil {
		t.Fatalf("with room again: %v", err)
	}
	got := make([]byte, page)
	if err := s.ReadPages(1, last, got); err != nil || !bytes.Equal(got, pattern(1, last, 0, 1)) {
		t.Fatalf("content after a full store: %v", err)
	}
}
