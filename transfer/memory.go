package transfer

import (
	"math/bits"
	"math/rand/v2"
	"sync"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
)

// chunkPages is how many neighbouring pages are remembered together: as many as
// a word has bits.
const chunkPages = 64

// verdict is what becomes of a page.
type verdict uint8

const (
	send   verdict = iota // with its content
	zero                  // as a zero page
	same                  // not at all, the peer has it
	again                 // with its content, or as what changed: the peer has another version
	copyOf                // as the place of another page with its content, or its hash
)

// sifted is what sift says of neighbouring pages.
type sifted struct {
	verdicts [chunkPages]verdict
	// is are the hashes of the pages, was those of what the peer has, of pages that
	// are sent again.
	is, was [chunkPages]xxh3.Uint128
}

// pageMemory remembers what the peer has: for every page a 128-bit hash, once
// the round that sent it has been acknowledged. It takes 18 bytes a page in
// dense memory (64 hashes and two words, rounded up by the allocator).
//
// The hash is seeded anew in every session, so that a tenant cannot prepare two
// pages that are taken for one.
type pageMemory struct {
	seed     uint64
	zeroHash xxh3.Uint128

	mu     sync.Mutex
	chunks map[chunkKey]*chunk
	known  checkpoint.Pages // in all chunks
	// touched are the chunks with pages that wait for their acknowledgement.
	touched []*chunk
	index   index
	// twins are tags of pages that the peer has of other shards.
	twins map[uint32]struct{}
}

type chunkKey struct {
	pid  checkpoint.PID
	page uint64 // number of the chunk's first page, divided by chunkPages
}

type chunk struct {
	known   uint64 // pages that the peer has
	pending uint64 // pages sent in the round that is open; never also known
	hash    [chunkPages]xxh3.Uint128
}

func newPageMemory() *pageMemory {
	m := &pageMemory{seed: rand.Uint64(), chunks: map[chunkKey]*chunk{}}
	m.zeroHash = xxh3.Hash128Seed(make([]byte, checkpoint.PageSize), m.seed)
	return m
}

// sift judges pages that do not cross a chunk's end, and notes those that are
// to be sent as pending.
func (m *pageMemory) sift(pid checkpoint.PID, addr uint64, data []byte, out *sifted) int {
	n := len(data) / checkpoint.PageSize
	verdicts, hashes := &out.verdicts, &out.is
	for i := range n {
		page := data[i*checkpoint.PageSize : (i+1)*checkpoint.PageSize]
		if encoding.IsZero(page) {
			verdicts[i], hashes[i] = zero, m.zeroHash
		} else {
			verdicts[i], hashes[i] = send, xxh3.Hash128Seed(page, m.seed)
		}
	}

	number := addr / checkpoint.PageSize
	key, first := chunkKey{pid, number / chunkPages}, int(number%chunkPages)
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.chunks[key]
	if c == nil {
		c = new(chunk)
		m.chunks[key] = c
	}
	before := c.pending
	for i := range n {
		at := first + i
		bit := uint64(1) << at
		if c.known&bit != 0 && c.hash[at] == hashes[i] {
			verdicts[i] = same
			continue
		}
		if c.known&bit != 0 {
			c.known &^= bit
			m.known--
			if verdicts[i] == send {
				verdicts[i], out.was[i] = again, c.hash[at]
			}
		}
		c.pending |= bit
		c.hash[at] = hashes[i]
	}
	if before == 0 && c.pending != 0 {
		m.touched = append(m.touched, c)
	}
	return n
}

// forget drops what is known of n pages at addr.
func (m *pageMemory) forget(pid checkpoint.PID, addr uint64, n checkpoint.Pages) {
	begin := addr / checkpoint.PageSize
	end := begin + uint64(n)
	m.mu.Lock()
	defer m.mu.Unlock()
	drop := func(key chunkKey, c *chunk) {
		base := key.page * chunkPages
		from, to := max(begin, base)-base, min(end, base+chunkPages)-base
		m.known -= checkpoint.Pages(bits.OnesCount64(c.known & mask(from, to)))
		c.known &^= mask(from, to)
		if c.known|c.pending == 0 {
			delete(m.chunks, key)
		}
	}
	first, last := begin/chunkPages, (end-1)/chunkPages
	// A hole may span terabytes: look at whichever is less, it or what there is.
	if last-first < uint64(len(m.chunks)) {
		for page := first; page <= last; page++ {
			if c := m.chunks[chunkKey{pid, page}]; c != nil {
				drop(chunkKey{pid, page}, c)
			}
		}
		return
	}
	for key, c := range m.chunks {
		if key.pid == pid && key.page >= first && key.page <= last {
			drop(key, c)
		}
	}
}

func mask(from, to uint64) uint64 { return (^uint64(0) >> (64 - (to - from))) << from }

// acknowledge makes the pages of the open round known.
func (m *pageMemory) acknowledge() { m.settle(true) }

// distrust forgets the pages of the open round: the peer may have the old
// content, the new, or neither.
func (m *pageMemory) distrust() { m.settle(false) }

func (m *pageMemory) settle(applied bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.touched {
		if applied {
			c.known |= c.pending
			m.known += checkpoint.Pages(bits.OnesCount64(c.pending))
		}
		c.pending = 0
	}
	clear(m.touched)
	m.touched = m.touched[:0]
}

// reset forgets everything.
func (m *pageMemory) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.chunks, m.touched, m.known, m.index, m.twins = map[chunkKey]*chunk{}, nil, 0, index{}, nil
}

// pages returns how many pages the peer is known to have.
func (m *pageMemory) pages() checkpoint.Pages {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.known
}
