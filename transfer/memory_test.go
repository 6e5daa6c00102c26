package transfer

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// judge sifts any run of pages.
func judge(m *pageMemory, pid checkpoint.PID, addr uint64, data []byte) []verdict {
	var all []verdict
	for len(data) > 0 {
		room := chunkPages - int(addr/page%chunkPages)
		piece := data[:min(len(data), room*page)]
		var out sifted
		all = append(all, out.verdicts[:m.sift(pid, addr, piece, &out)]...)
		data, addr = data[len(piece):], addr+uint64(len(piece))
	}
	return all
}

func TestOnlyWhatWasAcknowledgedIsLeftOut(t *testing.T) {
	m := newPageMemory()
	one, two, zeros := bytes.Repeat([]byte{1}, page), bytes.Repeat([]byte{2}, page), make([]byte, page)
	steps := []struct {
		name string
		data []byte
		want verdict
		end  func()
	}{
		{"a new page is sent", one, send, m.distrust},
		{"after a broken round it is sent again", one, send, m.acknowledge},
		{"after an acknowledged round it is not", one, same, m.acknowledge},
		{"changed it is sent again", two, again, m.distrust},
		{"after a broken round the old content is not trusted either", one, send, m.acknowledge},
		{"a broken round without the page does not matter", one, same, m.distrust},
		{"nor does the round after it", one, same, m.acknowledge},
		{"a page that became zero is sent as zero", zeros, zero, m.acknowledge},
		{"and then not at all", zeros, same, m.acknowledge},
		{"until something is written to it", two, again, m.acknowledge},
		{"which is remembered", two, same, func() { m.forget(1, 0, 1) }},
		{"a page in a hole is forgotten", two, send, m.acknowledge},
		{"and learned again", two, same, m.reset},
		{"a session that starts over forgets all", two, send, m.acknowledge},
	}
	for _, step := range steps {
		if got := judge(m, 1, 0, step.data)[0]; got != step.want {
			t.Fatalf("%s: verdict %d, want %d", step.name, got, step.want)
		}
		step.end()
	}
}

func TestProcessesAndNeighboursAreKeptApart(t *testing.T) {
	m := newPageMemory()
	data := bytes.Repeat([]byte{7}, 3*page)
	judge(m, 1, 64*page, data)
	m.acknowledge()
	for _, other := range []struct {
		pid  checkpoint.PID
		addr uint64
	}{{2, 64 * page}, {1, 61 * page}, {1, 67 * page}, {1, (64 + 64) * page}} {
		for i, v := range judge(m, other.pid, other.addr, data) {
			if v != send {
				t.Errorf("page %d of pid %d at %#x: verdict %d", i, other.pid, other.addr, v)
			}
		}
		m.distrust()
	}
	for i, v := range judge(m, 1, 64*page, data) {
		if v != same {
			t.Errorf("page %d was forgotten: %d", i, v)
		}
	}
}

// TestMemoryAgreesWithAModel runs random rounds against a plain map of what the
// peer has.
func TestMemoryAgreesWithAModel(t *testing.T) {
	const pages = 300
	rng := rand.New(rand.NewPCG(1, 2))
	m := newPageMemory()
	peer := map[int]byte{}   // content the peer surely has
	doubt := map[int]bool{}  // pages of a broken round
	memory := [pages]byte{}  // content now: a page is its byte repeated
	const base = 0x7fff_0000 // not at a chunk's beginning
	for range 400 {
		for range 20 {
			memory[rng.IntN(pages)] = byte(rng.IntN(4))
		}
		sent := map[int]byte{}
		for range 3 { // three disjoint extents
			from := rng.IntN(pages / 3)
			to := from + rng.IntN(pages/3-from) + 1
			offset := rng.IntN(3) * (pages / 3)
			from, to = from+offset, to+offset
			if _, again := sent[from]; again {
				continue
			}
			overlap := false
			for i := from; i < to; i++ {
				_, ok := sent[i]
				overlap = overlap || ok
			}
			if overlap {
				continue
			}
			var data []byte
			for i := from; i < to; i++ {
				data = append(data, bytes.Repeat([]byte{memory[i]}, page)...)
				sent[i] = memory[i]
			}
			for i, v := range judge(m, 1, base+uint64(from)*page, data) {
				at := from + i
				have, known := peer[at]
				want := send
				switch {
				case known && !doubt[at] && have == memory[at]:
					want = same
				case memory[at] == 0:
					want = zero
				case known && !doubt[at]:
					want = again
				}
				if v != want {
					t.Fatalf("page %d: verdict %d, want %d", at, v, want)
				}
			}
		}
		ok := rng.IntN(3) > 0
		for at, content := range sent {
			have, known := peer[at]
			unchanged := known && !doubt[at] && have == content
			switch {
			case ok:
				peer[at] = content
				delete(doubt, at)
			case !unchanged:
				doubt[at] = true
			}
		}
		if ok {
			m.acknowledge()
		} else {
			m.distrust()
		}
		if rng.IntN(4) == 0 {
			from := rng.IntN(pages)
			n := rng.IntN(pages-from) + 1
			m.forget(1, base+uint64(from)*page, checkpoint.Pages(n))
			for i := from; i < from+n; i++ {
				delete(peer, i)
			}
		}
		known := 0
		for at := range peer {
			if !doubt[at] {
				known++
			}
		}
		if m.pages() != checkpoint.Pages(known) {
			t.Fatalf("%d pages are known, want %d", m.pages(), known)
		}
	}
}

func TestForgettingAnAddressSpaceIsQuickAndDropsItsMemory(t *testing.T) {
	m := newPageMemory()
	data := bytes.Repeat([]byte{3}, 200*page)
	judge(m, 1, 0x1000, data)
	judge(m, 2, 0x1000, data)
	m.acknowledge()
	m.forget(1, 0, 1<<44) // would take years page by page
	if m.pages() != 200 {
		t.Errorf("%d pages are left, want those of pid 2", m.pages())
	}
	for key := range m.chunks {
		if key.pid == 1 {
			t.Error("an empty chunk is left")
		}
	}
}

func TestMemoryTakesTwentyBytesAPage(t *testing.T) {
	const pages = 1 << 18 // 1 GiB
	m := newPageMemory()
	data := bytes.Repeat([]byte{5}, chunkPages*page)
	heap := func() uint64 {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	before := heap()
	for at := uint64(0); at < pages; at += chunkPages {
		judge(m, 1, at*page, data)
	}
	m.acknowledge()
	after := heap()
	if each := float64(after-before) / pages; each > 20 {
		t.Errorf("%.1f bytes a page", each)
	}
	runtime.KeepAlive(m)
}
