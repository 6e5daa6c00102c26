package track

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

// inodeAt is the inode of what is mapped at an address of this process.
func inodeAt(t *testing.T, mem []byte) uint64 {
	t.Helper()
	all, err := readMaps(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("%p", mem)
	for _, m := range all {
		if fmt.Sprintf("0x%x", m.start) == at {
			return m.inode
		}
	}
	t.Fatalf("nothing is mapped at %s", at)
	return 0
}

func segmentsHere(t *testing.T) map[uint64]*Segment {
	t.Helper()
	all, err := SharedSegments([]checkpoint.Process{{PID: 1, HostPID: os.Getpid()}})
	if err != nil {
		t.Fatal(err)
	}
	out := map[uint64]*Segment{}
	for _, s := range all {
		t.Cleanup(func() { _ = s.Close() })
		out[s.ID] = s
	}
	return out
}

func content(t *testing.T, s *Segment) []byte {
	t.Helper()
	if s == nil {
		t.Fatal("the segment was not found")
	}
	out := make([]byte, s.Pages.Bytes())
	err := s.Data(func(first uint64, n checkpoint.Pages) {
		if err := s.Read(first, out[first*page:first*page+uint64(n.Bytes())]); err != nil {
			t.Fatal(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSharedMemoryIsFoundAndRead(t *testing.T) {
	testenv.NeedRoot(t)
	const size = 64 * page
	anon, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(anon)
	copy(anon[3*page:], "anonymous")
	anonID := inodeAt(t, anon)

	// A descriptor, written without ever being mapped, not a whole page long.
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Pwrite(fd, []byte("memfd"), 5*page+7); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}

	id, err := unix.SysvShmGet(unix.IPC_PRIVATE, size, unix.IPC_CREAT|0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	sysv, err := unix.SysvShmAttach(id, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.SysvShmDetach(sysv)
	copy(sysv[60*page:], "system five")

	found := segmentsHere(t)
	for _, c := range []struct {
		id    uint64
		pages checkpoint.Pages
		at    int
		text  string
	}{
		{anonID, 64, 3 * page, "anonymous"},
		{st.Ino, 6, 5*page + 7, "memfd"},
		{uint64(id), 64, 60 * page, "system five"}, // its inode is its id (ipc/shm.c)
	} {
		s := found[c.id]
		got := content(t, s)
		if s.Pages != c.pages {
			t.Errorf("%s: %d pages, want %d", c.text, s.Pages, c.pages)
		}
		if !bytes.HasPrefix(got[c.at:], []byte(c.text)) {
			t.Errorf("%s is not at %#x", c.text, c.at)
		}
		if bytes.Count(got, []byte{0}) != len(got)-len(c.text) {
			t.Errorf("%s: more than was written", c.text)
		}
	}

	// What nobody maps any more CRIU drops, so it must not be promised.
	// Another mapping keeps the place, or the whole would be unmapped at the end
	// together with what has come there since.
	if _, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&anon[32*page]), 32*page, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	if s := segmentsHere(t)[anonID]; s == nil || s.Pages != 32 {
		t.Errorf("half unmapped: %+v, want 32 pages", s)
	}
	// Given back: a hole again.
	if err := unix.Madvise(anon[:16*page], unix.MADV_REMOVE); err != nil {
		t.Fatal(err)
	}
	if got := content(t, segmentsHere(t)[anonID]); bytes.Count(got, []byte{0}) != len(got) {
		t.Error("what was given back is still there")
	}
}

func TestFilesInATmpfsAreNotSharedMemory(t *testing.T) {
	testenv.NeedRoot(t)
	f, err := os.CreateTemp("/dev/shm", "tranship-test-*")
	if err != nil {
		testenv.Missing(t, "a writable /dev/shm")
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if err := f.Truncate(page); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	mem[0] = 1
	if s := segmentsHere(t)[inodeAt(t, mem)]; s != nil {
		// Another file may have the same number, in the kernel's own tmpfs.
		if got := content(t, s); len(got) == page && got[0] == 1 {
			t.Error("it was found")
		}
	}
}
