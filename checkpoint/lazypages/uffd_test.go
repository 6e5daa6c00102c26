package lazypages

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
	"github.com/tranship/tranship/internal/testenv"
)

// TestAnAbsentMappingHasBeenAnnounced replaces a mapping while another thread
// asks for it all the time: "absent" before the event was read would be taken
// for content that nobody needs.
func TestAnAbsentMappingHasBeenAnnounced(t *testing.T) {
	testenv.NeedRoot(t)
	fd, err := openUffd()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	at, err := mmap(0, page, unix.PROT_NONE, 0) // keeps the place
	if err != nil {
		t.Fatal(err)
	}
	defer unix.MunmapPtr(pointer(at), page) //nolint:errcheck // the test is over
	const rounds = 300
	content := make([]byte, page)
	early := 0
	for range rounds {
		if err := mapAt(at, page, unix.MAP_FIXED); err != nil {
			t.Fatal(err)
		}
		if err := register(fd, at, page); err != nil {
			t.Fatal(err)
		}
		replaced := make(chan error, 1)
		go func() {
			replaced <- osthread.Do(func() error {
				// Returns when its event has been read.
				_, err := mmap(at, page, unix.PROT_NONE, unix.MAP_FIXED)
				return err
			})
		}()
		for asking := true; asking; {
			_, out, err := copyTo(fd, at, content)
			if err != nil {
				t.Fatal(err)
			}
			if out == placed || out == present {
				continue
			}
			announced := readOne(t, fd)
			if out == absent && announced {
				early++
			}
			asking = !announced
		}
		if err := <-replaced; err != nil {
			t.Fatal(err)
		}
	}
	if early > 0 {
		t.Errorf("%d times of %d a mapping was absent before its event was read", early, rounds)
	}
}

// readOne reads an event, if there is one.
func readOne(t *testing.T, fd int) bool {
	t.Helper()
	var raw [msgSize]byte
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&raw[0])), msgSize)
	if errno == unix.EAGAIN {
		return false
	}
	if errno != 0 || n != msgSize {
		t.Fatalf("read an event: %d bytes, %v", n, errno)
	}
	if m, err := decodeMessage(raw[:]); err != nil || m.event != eventUnmap {
		t.Fatalf("event %#x: %v", m.event, err)
	}
	return true
}
