package lazypages

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tranship/tranship/checkpoint"
)

// testVMA is a mapping to be written into an mm image.
type testVMA struct {
	span
	flags, status, madv uint64
}

const lazyVMA = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS

func encodeImage(magic uint32, entries ...[]byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, imgCommonMagic)
	out = binary.LittleEndian.AppendUint32(out, magic)
	for _, e := range entries {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(e)))
		out = append(out, e...)
	}
	return out
}

func number(msg []byte, num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(msg, num, protowire.VarintType), v)
}

func encodeMM(vmas ...testVMA) []byte {
	msg := number(nil, 1, 0x400000) // mm_start_code and its like are skipped
	for _, v := range vmas {
		sub := number(nil, 1, v.start)
		sub = number(sub, 2, v.end)
		sub = number(sub, 6, v.flags)
		sub = number(sub, 7, v.status)
		sub = number(sub, 8, 1) // fd -1, zigzag
		if v.madv != 0 {
			sub = number(sub, 9, v.madv)
		}
		msg = protowire.AppendBytes(protowire.AppendTag(msg, 14, protowire.BytesType), sub)
	}
	return encodeImage(mmMagic, msg)
}

func encodePagemap(wide bool, lazy ...span) []byte {
	entries := [][]byte{number(nil, 1, 1)}
	for _, s := range lazy {
		pages := (s.end - s.start) / checkpoint.PageSize
		e := number(nil, 1, s.start)
		if wide {
			e = number(e, 2, 0)
		} else {
			e = number(e, 2, pages)
		}
		e = number(e, 4, peLazy)
		if wide {
			e = number(e, 5, pages)
		}
		entries = append(entries, e)
	}
	return encodeImage(pagemapMagic, entries...)
}

// writeImagesOf writes what CRIU would have for a process with these mappings,
// all of whose pages were left to us.
func writeImagesOf(t testing.TB, dir string, pid checkpoint.PID, vmas []testVMA, lazy []span) {
	t.Helper()
	for name, raw := range map[string][]byte{
		"mm-":      encodeMM(vmas...),
		"pagemap-": encodePagemap(true, lazy...),
	} {
		if err := os.WriteFile(filepath.Join(dir, name+strconv.Itoa(int(pid))+".img"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImagesSayWhatIsRegisteredAndWhatIsMissing(t *testing.T) {
	heap := testVMA{span{0x10000, 0x20000}, lazyVMA, 1 | 1<<9, 0}
	wiped := testVMA{span{0x30000, 0x31000}, lazyVMA, 1 | 1<<9, 1<<madvWipeOnFork | 1<<14}
	others := []testVMA{
		{span{0x400000, 0x401000}, unix.MAP_PRIVATE, 1 | 1<<6, 0},                     // file
		{span{0x500000, 0x501000}, unix.MAP_SHARED | unix.MAP_ANONYMOUS, 1 | 1<<8, 0}, // shared
		{span{0x600000, 0x601000}, lazyVMA | unix.MAP_LOCKED, 1 | 1<<9, 0},
		{span{0x700000, 0x900000}, lazyVMA | unix.MAP_HUGETLB, 1 | 1<<9, 0},
		{span{0x7fff0000, 0x7fff1000}, lazyVMA, 1 | vmaVdso | 1<<9, 0},
		{span{0xa00000, 0xa01000}, 0, 1 << 17, 0}, // a guard, of status alone
	}
	for _, wide := range []bool{false, true} {
		dir := t.TempDir()
		mm := encodeMM(append([]testVMA{heap}, append(others, wiped)...)...)
		lazy := []span{{0x10000, 0x12000}, {0x30000, 0x31000}}
		pm := encodePagemap(wide, lazy...)
		// A page that is in the image: a stack's, say.
		own := number(number(number(nil, 1, 0x13000), 2, 1), 4, 1<<2)
		pm = append(binary.LittleEndian.AppendUint32(pm, uint32(len(own))), own...)
		for name, raw := range map[string][]byte{"mm-7.img": mm, "pagemap-7.img": pm} {
			if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := readDumped(dir, 7)
		if err != nil {
			t.Fatal(err)
		}
		want := dumped{mappings: []span{heap.span, wiped.span}, lazy: lazy, wiped: []span{wiped.span}}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v\nwant %+v", got, want)
		}
	}
}

// The pagemap that CRIU reads may be joined over pages that the process gave
// back: placing those would bring them to life again.
func TestTheExactListOfLazyPagesCounts(t *testing.T) {
	dir := t.TempDir()
	heap := testVMA{span{0x10000, 0x20000}, lazyVMA, 1 | 1<<9, 0}
	writeImagesOf(t, dir, 7, []testVMA{heap}, []span{{0x10000, 0x20000}})
	exact := []span{{0x10000, 0x11000}, {0x1f000, 0x20000}}
	if err := os.WriteFile(filepath.Join(dir, "lazy-7.img"), encodePagemap(true, exact...), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readDumped(dir, 7)
	if err != nil || !reflect.DeepEqual(got.lazy, exact) {
		t.Errorf("got %v, %v, want %v", got.lazy, err, exact)
	}
}

func TestBrokenImagesAreRefused(t *testing.T) {
	good := encodeMM(testVMA{span{0x10000, 0x20000}, lazyVMA, 1, 0})
	for _, tc := range []struct {
		name, part string
		mm         []byte
	}{
		{"of another kind", "magic", encodeImage(pagemapMagic, nil)},
		{"without an entry", "no entry", encodeImage(mmMagic)},
		{"with two entries", "more than one", encodeImage(mmMagic, nil, nil)},
		{"with an endless entry", "bytes", append(good[:8:8], 0xff, 0xff, 0xff, 0xff)},
		{"with an unaligned mapping", "impossible", encodeMM(testVMA{span{0x10001, 0x20000}, lazyVMA, 1, 0})},
		{"with an inverted mapping", "impossible", encodeMM(testVMA{span{0x20000, 0x10000}, lazyVMA, 1, 0})},
		{"with a mapping past user space", "impossible", encodeMM(testVMA{span{0x10000, 1 << 58}, lazyVMA, 1, 0})},
		{"with overlapping mappings", "overlap", encodeMM(
			testVMA{span{0x10000, 0x20000}, lazyVMA, 1, 0}, testVMA{span{0x1f000, 0x30000}, lazyVMA, 1, 0})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var d dumped
			err := d.parseMM(tc.mm)
			if err == nil || !strings.Contains(err.Error(), tc.part) {
				t.Fatalf("got %v", err)
			}
		})
	}
	var d dumped
	if err := d.parsePagemap(encodePagemap(true, span{0x2000, 0x4000}, span{0x3000, 0x5000})); err == nil {
		t.Fatal("a pagemap with overlapping entries was accepted")
	}
	for cut := range good {
		var d dumped
		if err := d.parseMM(good[:cut]); err == nil {
			t.Fatalf("cut to %d of %d bytes and accepted", cut, len(good))
		}
	}
}

func FuzzImages(f *testing.F) {
	f.Add(encodeMM(testVMA{span{0x10000, 0x20000}, lazyVMA, 1, 1 << 18}))
	f.Add(encodePagemap(false, span{0x10000, 0x20000}, span{0x30000, 0x40000}))
	f.Add(encodePagemap(true, span{0x10000, 0x20000}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var d dumped
		_ = d.parseMM(bytes.Clone(raw))
		_ = d.parsePagemap(bytes.Clone(raw))
		for _, s := range append(d.mappings, d.lazy...) {
			if err := s.check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add(make([]byte, msgSize))
	f.Add([]byte{eventRemap, 31: 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := decodeMessage(raw)
		if err == nil && (len(raw) < msgSize || m.event < eventPagefault || m.event > eventUnmap) {
			t.Fatalf("accepted %x", raw)
		}
	})
}
