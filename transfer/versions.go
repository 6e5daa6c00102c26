package transfer

import (
	"sync"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
)

const (
	// Versions of pages are kept up to a quarter of the memory that the peer has,
	// between these bounds. QEMU's XBZRLE cache has 64 MiB. The daemon has 256 MiB
	// for everything, and Go lets its heap grow to twice of what lives in it.
	minVersions   = 1 << 20
	maxVersions   = 32 << 20
	versionsShare = 4

	// A version that was not replaced for so many rounds makes room for another.
	versionRounds = 2
	// Deltas are judged by the last verdictWindow attempts; if less than one in
	// sixteen was worth it, one page in dormantEvery goes on being watched.
	verdictWindow = 256
	dormantEvery  = 16

	slabPages = 64
)

// versions keeps the last content of pages that were sent more than once, to
// send what changed in them. It decides nothing about what the peer has: a
// version is a base only while its hash is the one that pageMemory says was
// acknowledged. So whatever breaks, forgets or starts over leaves versions here
// that are never used.
type versions struct {
	mu    sync.Mutex
	pages map[versionKey]*version
	// hand walks over keys, to find versions that nobody replaces.
	keys []versionKey
	hand int
	// slab is what new versions are cut from: one by one, Go would give each a
	// fifth more than it needs.
	slab []byte
	// round counts rounds that gave something.
	round uint64

	tried, won int
	dormant    bool
}

type versionKey struct {
	pid  checkpoint.PID
	page uint64
}

type version struct {
	hash  xxh3.Uint128
	round uint64 // in which it was put
	data  []byte // a page of a slab
}

// nextRound ages what is kept.
func (v *versions) nextRound() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.round++
}

// delta appends to dst what makes now of the version whose hash is base, if it is
// kept and the delta is short enough, and keeps now in its place. known is how
// much the peer has.
func (v *versions) delta(dst []byte, pid checkpoint.PID, addr uint64, base, hash xxh3.Uint128, now []byte, known checkpoint.Pages) ([]byte, bool) {
	key := versionKey{pid, addr / checkpoint.PageSize}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dormant && key.page%dormantEvery != 0 {
		return dst, false
	}
	old := v.pages[key]
	won := false
	if old != nil && old.hash == base {
		dst, won = encoding.AppendDelta(dst, old.data, now)
		v.judge(won)
	}
	if old == nil {
		if old = v.room(key, known); old == nil {
			return dst, won
		}
	}
	old.hash, old.round = hash, v.round
	copy(old.data, now)
	return dst, won
}

// judge notes whether deltas are worth their time.
func (v *versions) judge(won bool) {
	v.tried++
	if won {
		v.won++
	}
	if v.tried == verdictWindow {
		v.dormant = v.won < verdictWindow/16
		v.tried, v.won = 0, 0
	}
}

// room makes a version for key, of a new page or of one that was not sent for a
// while; nil when all are in use. A cycle of more pages than fit would otherwise
// push out each just before it comes again.
func (v *versions) room(key versionKey, known checkpoint.Pages) *version {
	limit := int(min(max(known.Bytes()/versionsShare, minVersions), maxVersions) / checkpoint.PageSize)
	if len(v.keys) < limit {
		if v.pages == nil {
			v.pages = map[versionKey]*version{}
		}
		if len(v.slab) == 0 {
			v.slab = make([]byte, slabPages*checkpoint.PageSize)
		}
		p := &version{data: v.slab[:checkpoint.PageSize:checkpoint.PageSize]}
		v.slab = v.slab[checkpoint.PageSize:]
		v.keys = append(v.keys, key)
		v.pages[key] = p
		return p
	}
	for range 4 { // a little work for each page, and all of them in turn
		v.hand = (v.hand + 1) % len(v.keys)
		p := v.pages[v.keys[v.hand]]
		if p.round+versionRounds < v.round {
			delete(v.pages, v.keys[v.hand])
			v.keys[v.hand], v.pages[key] = key, p
			return p
		}
	}
	return nil
}
