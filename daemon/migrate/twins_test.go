package migrate

import (
	"bytes"
	"context"
	"errors"
	"math"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

// searched goes through this process's own memory, as that of a shard.
func searched(ctx context.Context, limit checkpoint.Pages, found func(transfer.Twin, []byte) error) error {
	s := &twinSearch{left: limit, found: found, buf: make([]byte, readChunk)}
	return s.shard(ctx, runtime.Alike{Name: "self", Init: os.Getpid(), Processes: []int{os.Getpid()}})
}

func TestThePagesOfAShardAreFoundWhereTheyAre(t *testing.T) {
	const pages = 5
	mem, err := unix.Mmap(-1, 0, pages*checkpoint.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	page := func(i int) []byte { return mem[i*checkpoint.PageSize : (i+1)*checkpoint.PageSize] }
	for i := range pages {
		if i != 2 { // which stays unpopulated
			copy(page(i), bytes.Repeat([]byte{byte(0xa0 + i)}, checkpoint.PageSize))
		}
	}
	base := uint64(uintptr(unsafe.Pointer(&mem[0])))
	seen := map[uint64]bool{}
	err = searched(t.Context(), math.MaxInt32, func(at transfer.Twin, data []byte) error {
		if at.Process != os.Getpid() || len(data) != checkpoint.PageSize {
			t.Fatalf("%+v, %d bytes", at, len(data))
		}
		if at.Addr < base || at.Addr >= base+uint64(len(mem)) {
			return nil
		}
		i := int(at.Addr-base) / checkpoint.PageSize
		if !bytes.Equal(data, page(i)) {
			t.Errorf("page %d is another", i)
		}
		seen[at.Addr] = true
		again := make([]byte, checkpoint.PageSize)
		if err := new(incoming).ReadTwin(at, again); err != nil || !bytes.Equal(again, data) {
			t.Errorf("page %d, read again: %v", i, err)
		}
		return nil
	})
	if err != nil || len(seen) != pages-1 || seen[base+2*checkpoint.PageSize] {
		t.Errorf("%v; found %d pages of %d that are populated", err, len(seen), pages-1)
	}
	if err := new(incoming).ReadTwin(transfer.Twin{Process: os.Getpid(), Addr: checkpoint.PageSize}, make([]byte, checkpoint.PageSize)); err == nil {
		t.Error("a page is read where nothing is mapped")
	}
}

func TestASearchForPagesEnds(t *testing.T) {
	n := 0
	count := func(transfer.Twin, []byte) error { n++; return nil }
	if err := searched(t.Context(), 7, count); !errors.Is(err, errEnough) || n != 7 {
		t.Errorf("of seven pages: %v, %d were found", err, n)
	}
	broken := errors.New("nobody listens")
	if err := searched(t.Context(), 7, func(transfer.Twin, []byte) error { return broken }); !errors.Is(err, errFound) || !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	over := errors.New("the round is over")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(over)
	n = 0
	if err := searched(ctx, 7, count); !errors.Is(err, over) || n != 0 {
		t.Errorf("%v, %d were found", err, n)
	}
}

// A page that such a process has dropped since would be waited for.
func TestAProcessThatAnswersItsOwnFaultsIsLeftOut(t *testing.T) {
	const userModeOnly = 1 // UFFD_USER_MODE_ONLY, linux/userfaultfd.h
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly, 0, 0)
	if errno != 0 {
		t.Fatalf("userfaultfd: %v", errno)
	}
	defer unix.Close(int(fd))
	err := searched(t.Context(), math.MaxInt32, func(at transfer.Twin, _ []byte) error {
		t.Errorf("%+v was read", at)
		return errors.New("one is enough")
	})
	if err != nil {
		t.Error(err)
	}
}

func TestShardsThatStayAreLookedAt(t *testing.T) {
	key := shardKey{"default", "a"}
	arrived := make(chan struct{})
	close(arrived)
	for _, c := range []struct {
		name string
		busy string
		in   *incoming
		want bool
	}{
		{"one that no migration has", "", nil, true},
		{"one that leaves", "m-1", nil, false},
		{"one that has arrived", "m-1", &incoming{entry: &Entry{Mode: ModePreCopy}, ended: arrived}, true},
		{"one whose pages are on another host yet", "m-1", &incoming{entry: &Entry{Mode: ModePostCopy}, ended: arrived}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := &Manager{busy: map[shardKey]string{}, incoming: map[string]*incoming{}}
			if c.busy != "" {
				m.busy[key] = c.busy
			}
			if c.in != nil {
				m.incoming[c.busy] = c.in
			}
			if got := m.stays(t.Context(), key); got != c.want {
				t.Errorf("%v", got)
			}
		})
	}
	m := &Manager{busy: map[shardKey]string{key: "m-1"}, incoming: map[string]*incoming{"m-1": {entry: &Entry{Mode: ModePostCopy}, ended: arrived}}}
	m.incoming["m-1"].pull.whole.Store(true)
	if !m.stays(t.Context(), key) {
		t.Error("one whose pages have all come is left out")
	}
}
