package leak

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

func TestBPFObjectsAreReadFromTheirDescriptors(t *testing.T) {
	for _, c := range []struct{ fdinfo, id, what string }{
		{
			"pos:\t0\nflags:\t02000002\nmap_type:\t1\nkey_size:\t8\nvalue_size:\t4\nmax_entries:\t4096\nmap_flags:\t0x0\nmap_id:\t17\nfrozen:\t0\n",
			"map 17", "map of type 1, 8 + 4 bytes, 4096 entries",
		},
		{"pos:\t0\nprog_type:\t26\nprog_jited:\t1\nprog_tag:\t0123456789abcdef\nprog_id:\t9\n", "program 9", "program of type 26, 0123456789abcdef"},
		{"link_type:\ttracing\nlink_id:\t3\nprog_tag:\tfe01\nprog_id:\t9\nattach_type:\t23\n", "link 3", "link of type tracing to program fe01"},
		{"pos:\t0\nflags:\t02\nmnt_id:\t13\n", "", ""},
		{"", "", ""},
	} {
		id, what, ok := bpfInfo(c.fdinfo)
		if id != c.id || what != c.what || ok != (c.id != "") {
			t.Errorf("%q: %q %q %v", c.fdinfo, id, what, ok)
		}
	}
}

// makeMap makes a map of an odd size, so that it is told from others.
func makeMap(t *testing.T) int {
	t.Helper()
	attr := struct{ kind, key, value, entries, flags uint32 }{2, 4, 56, 7, 0} // BPF_MAP_TYPE_ARRAY
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		t.Fatalf("BPF map: %v", errno)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	return int(fd)
}

func TestAnObjectIsCountedOnceHoweverItIsHeld(t *testing.T) {
	testenv.NeedRoot(t)
	fd := makeMap(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	path := filepath.Join(dir, "odd")
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		t.Fatal(err)
	}
	pin := struct {
		path      uint64
		fd, flags uint32
	}{uint64(uintptr(unsafe.Pointer(name))), uint32(fd), 0}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_PIN, uintptr(unsafe.Pointer(&pin)), unsafe.Sizeof(pin)); errno != 0 {
		t.Fatalf("pin: %v", errno)
	}
	second, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(second)
	odd := func(o bpfObjects) (out []string) {
		s := snapshot(map[Category][]Item{})
		if err := s.bpf(o); err != nil {
			t.Fatal(err)
		}
		for _, i := range s.Items[BPF] {
			if strings.HasPrefix(i.Key, "map of type 2, 4 + 56 bytes, 7 entries") {
				out = append(out, i.Key)
			}
		}
		return out
	}
	o := bpfObjects{}
	for _, fd := range []int{fd, second} {
		if err := o.note(strconv.Itoa(os.Getpid()), strconv.Itoa(fd), "transhipd", ""); err != nil {
			t.Fatal(err)
		}
	}
	want := fmt.Sprintf("map of type 2, 4 + 56 bytes, 7 entries, pinned at %s", withoutNumbers(path))
	if have := odd(o); !slices.Equal(have, []string{want}) {
		t.Errorf("%q, want %q", have, want)
	}
	// Pinned alone is enough to be seen; held alone too.
	if have := odd(bpfObjects{}); !slices.Equal(have, []string{want}) {
		t.Errorf("%q, want %q", have, want)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	o = bpfObjects{}
	if err := o.note("self", strconv.Itoa(fd), "transhipd", ""); err != nil {
		t.Fatal(err)
	}
	if have := odd(o); len(have) != 1 || !strings.HasSuffix(have[0], "held by transhipd") {
		t.Errorf("%q", have)
	}
}
