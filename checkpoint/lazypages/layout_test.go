package lazypages

import (
	"slices"
	"testing"
)

// where finds the address of a store address, 0 if no window leads to it.
func (l *layout) where(image uint64) uint64 {
	for _, w := range l.windows {
		if image >= w.image && image < w.image+w.end-w.start {
			return w.start + image - w.image
		}
	}
	return 0
}

func TestALayoutFollowsItsMappings(t *testing.T) {
	const a, b, c, d = 0x10000, 0x20000, 0x30000, 0x40000
	const size = 0x4000
	start := []span{{c, c + size}, {a, a + size}}
	type where map[uint64]uint64 // store address to address
	for _, tc := range []struct {
		name   string
		events []func(*layout, func(span))
		want   where
		gone   []span
	}{
		{
			"nothing has happened", nil,
			where{a: a, a + 0x3000: a + 0x3000, c: c, b: 0},
			nil,
		},
		{
			"a whole mapping moves",
			[]func(*layout, func(span)){remap(a, b, size), unmap(a, size)},
			where{a: b, a + 0x3000: b + 0x3000, c: c},
			nil,
		},
		{
			"the middle of a mapping moves",
			[]func(*layout, func(span)){remap(a+0x1000, b, 0x1000), unmap(a+0x1000, 0x1000)},
			where{a: a, a + 0x1000: b, a + 0x2000: a + 0x2000},
			nil,
		},
		{
			"a mapping moves twice and back",
			[]func(*layout, func(span)){
				remap(a, b, size), unmap(a, size),
				remap(b, d, size), unmap(b, size),
				remap(d, a, size), unmap(d, size),
			},
			where{a: a, c: c},
			nil,
		},
		{
			"the middle is unmapped",
			[]func(*layout, func(span)){unmap(a+0x1000, 0x1000)},
			where{a: a, a + 0x1000: 0, a + 0x2000: a + 0x2000},
			[]span{{a + 0x1000, a + 0x2000}},
		},
		{
			"unmapping spans two mappings and what lies between",
			[]func(*layout, func(span)){unmap(a+0x3000, c-a)},
			where{a: a, a + 0x3000: 0, c: 0, c + 0x3000: c + 0x3000},
			[]span{{a + 0x3000, a + 0x4000}, {c, c + 0x3000}},
		},
		{
			"a mapping moves over another, which is announced before",
			[]func(*layout, func(span)){unmap(c, size), remap(a, c, size), unmap(a, size)},
			where{a: c, c: 0},
			[]span{{c, c + size}},
		},
		{
			"an arrival is heard before the unmapping that made room for it",
			[]func(*layout, func(span)){remap(a, c, size), unmap(c, size), unmap(a, size)},
			where{a: c, c: 0},
			[]span{{c, c + size}},
		},
		{
			"an arrival is heard before the move that made room for it",
			[]func(*layout, func(span)){remap(a, c, size), unmap(a, size), remap(c, d, size), unmap(c, size)},
			where{a: c, c: d},
			nil,
		},
		{
			"the echo of a move is heard after the next arrival",
			[]func(*layout, func(span)){remap(a, b, size), remap(c, a, size), unmap(a, size), unmap(c, size)},
			where{a: b, c: a},
			nil,
		},
		{
			"a move without unmapping, then a true unmapping once that is settled",
			[]func(*layout, func(span)){remap(a, b, size), settle, remap(c, a, size), unmap(c, size), settle, unmap(a, size)},
			where{a: b, c: 0},
			[]span{{c, c + size}},
		},
		{
			"what is pushed aside and never announced is gone when all is quiet",
			[]func(*layout, func(span)){remap(a, c, size), unmap(a, size), settle},
			where{a: c, c: 0},
			[]span{{c, c + size}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLayout(start)
			var gone []span
			for _, e := range tc.events {
				e(&l, func(s span) { gone = append(gone, s) })
			}
			for image, want := range tc.want {
				if got := l.where(image); got != want {
					t.Errorf("%#x is at %#x, want %#x", image, got, want)
				}
			}
			if !slices.Equal(gone, tc.gone) {
				t.Errorf("gone %#x, want %#x", gone, tc.gone)
			}
			for i := 1; i < len(l.windows); i++ {
				if l.windows[i-1].end > l.windows[i].start {
					t.Errorf("windows overlap: %#x", l.windows)
				}
			}
		})
	}
}

func remap(from, to, size uint64) func(*layout, func(span)) {
	return func(l *layout, _ func(span)) { l.remap(from, to, size) }
}

func unmap(start, size uint64) func(*layout, func(span)) {
	return func(l *layout, gone func(span)) { l.unmap(span{start, start + size}, gone) }
}

func settle(l *layout, gone func(span)) { l.settle(gone) }

// fakeAsker knows what is registered in one child.
type fakeAsker map[uint64]bool

var _ asker = fakeAsker{}

func (a fakeAsker) ask(_ int, addr uint64) (outcome, error) {
	if a[addr] {
		return present, nil
	}
	return absent, nil
}

func TestAChildIsWhereItsForkFoundIt(t *testing.T) {
	const a, b, size = 0x10000, 0x20000, 0x1000
	move := message{event: eventRemap, from: a, to: b, size: size}
	for _, tc := range []struct {
		name       string
		registered uint64 // in the child
		forkFirst  bool   // is heard
	}{
		{"fork heard first, happened first", a, true},
		{"fork heard first, happened last", b, true},
		{"fork heard last, happened last", b, false},
		{"fork heard last, happened first", a, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			parent := &space{layout: newLayout([]span{{a, a + size}})}
			probe := fakeAsker{tc.registered: true}
			var r recentEvents
			var child *space
			fork := func() {
				child = parent.fork(9, 1)
				r.forked(probe, parent, child)
			}
			if tc.forkFirst {
				fork()
			}
			parent.layout.remap(move.from, move.to, move.size)
			r.moved(probe, parent, move)
			if !tc.forkFirst {
				fork()
			}
			if got := child.layout.where(a); got != tc.registered {
				t.Errorf("child's page is looked for at %#x, is at %#x", got, tc.registered)
			}
			if got := parent.layout.where(a); got != b {
				t.Errorf("parent's page is looked for at %#x", got)
			}
			r.settle(parent)
			if len(r.forks)+len(r.moves) != 0 {
				t.Error("settled events are remembered")
			}
		})
	}
}
