package lazypages

import (
	"errors"
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
type fakeAsker struct {
	registered map[uint64]bool
	changing   bool
}

var _ asker = fakeAsker{}

func (a fakeAsker) ask(_ int, addr uint64) (outcome, error) {
	switch {
	case a.changing:
		return changing, nil
	case a.registered[addr]:
		return present, nil
	}
	return absent, nil
}

// fakeFamily is a parent of mappings none of whose pages is there, and what it
// does, as it is heard.
type fakeFamily struct {
	probe  fakeAsker
	recent recentEvents
	parent *space
	child  *space
}

func newFakeFamily(mappings ...span) *fakeFamily {
	f := &fakeFamily{parent: &space{layout: newLayout(mappings)}, probe: fakeAsker{registered: map[uint64]bool{}}}
	for _, m := range mappings {
		f.parent.pending.appendRun(m.start/page, m.end/page)
	}
	f.parent.owed = &pageSet{}
	return f
}

func (f *fakeFamily) move(from, to, size uint64) {
	f.parent.layout.remap(from, to, size)
	f.recent.moved(f.probe, f.parent, message{event: eventRemap, from: from, to: to, size: size})
}

func (f *fakeFamily) unmap(start, size uint64) {
	f.parent.layout.unmap(span{start, start + size}, func(image span) { f.parent.giveUp(image) })
}

func (f *fakeFamily) fork() {
	f.child = f.parent.fork(9, 1)
	f.recent.forked(f.probe, f.parent, f.child)
}

func TestAChildIsWhereItsForkFoundIt(t *testing.T) {
	const a, b, c, d = 0x10000, 0x20000, 0x30000, 0x40000
	const size = 4 * page
	for _, tc := range []struct {
		name       string
		registered []uint64 // pages, in the child
		heard      func(f *fakeFamily)
		first      uint64 // where the first page is
		last       uint64 // where the fourth is
	}{
		{"fork heard first, happened first", []uint64{a}, func(f *fakeFamily) { f.fork(); f.move(a, b, size) }, a, a + 3*page},
		{"fork heard first, happened last", []uint64{b}, func(f *fakeFamily) { f.fork(); f.move(a, b, size) }, b, b + 3*page},
		{"fork heard last, happened last", []uint64{b}, func(f *fakeFamily) { f.move(a, b, size); f.fork() }, b, b + 3*page},
		{"fork heard last, happened first", []uint64{a}, func(f *fakeFamily) { f.move(a, b, size); f.fork() }, a, a + 3*page},
		// The old place stays.
		{"a copy left behind, fork heard first, happened first", []uint64{a}, func(f *fakeFamily) { f.fork(); f.move(a, b, size) }, a, a + 3*page},
		{"a copy left behind, fork heard first, happened last", []uint64{a, b}, func(f *fakeFamily) { f.fork(); f.move(a, b, size) }, b, b + 3*page},
		{"a copy left behind, fork heard last, happened last", []uint64{a, b}, func(f *fakeFamily) { f.move(a, b, size); f.fork() }, b, b + 3*page},
		{"a copy left behind, fork heard last, happened first", []uint64{a}, func(f *fakeFamily) { f.move(a, b, size); f.fork() }, a, a + 3*page},

		{"moved on, fork happened first", []uint64{a}, func(f *fakeFamily) { f.move(a, b, size); f.move(b, c, size); f.fork() }, a, a + 3*page},
		{"moved on, fork happened in between", []uint64{b}, func(f *fakeFamily) { f.move(a, b, size); f.move(b, c, size); f.fork() }, b, b + 3*page},
		{"moved on, fork happened last", []uint64{c}, func(f *fakeFamily) { f.move(a, b, size); f.move(b, c, size); f.fork() }, c, c + 3*page},
		{"moved on, to where the child does not inherit", nil, func(f *fakeFamily) { f.move(a, b, size); f.move(b, c, size); f.fork() }, c, c + 3*page},
		{"its end moved on, fork happened first", []uint64{a, a + 3*page}, func(f *fakeFamily) {
			f.move(a, b, size)
			f.move(b+3*page, c, page)
			f.fork()
		}, a, a + 3*page},
		{"its end moved on, fork happened in between", []uint64{b, b + 3*page}, func(f *fakeFamily) {
			f.move(a, b, size)
			f.move(b+3*page, c, page)
			f.fork()
		}, b, b + 3*page},
		{"its end moved on, fork happened last", []uint64{b, c}, func(f *fakeFamily) {
			f.move(a, b, size)
			f.move(b+3*page, c, page)
			f.fork()
		}, b, c},
		{"its beginning was unmapped, fork happened last", []uint64{b + page}, func(f *fakeFamily) {
			f.move(a, b, size)
			f.unmap(a, size) // the kernel's echo of the move
			f.unmap(b, page)
			f.fork()
		}, 0, b + 3*page},
		{"its beginning was unmapped, fork happened before the move", []uint64{a + page}, func(f *fakeFamily) {
			f.move(a, b, size)
			f.unmap(a, size)
			f.unmap(b, page)
			f.fork()
		}, 0, a + 3*page},
		{"to where the child has something else", []uint64{a, d}, func(f *fakeFamily) { f.fork(); f.move(a, d, size) }, a, a + 3*page},
		{"to where the child had something else", []uint64{d}, func(f *fakeFamily) { f.fork(); f.move(a, d, size) }, d, d + 3*page},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, strict := range []bool{false, true} {
				f := newFakeFamily(span{a, a + size}, span{d, d + size})
				f.recent.strict = strict
				for _, at := range tc.registered {
					f.probe.registered[at] = true
				}
				tc.heard(f)
				for image, want := range map[uint64]uint64{a: tc.first, a + 3*page: tc.last} {
					if got := f.child.layout.where(image); got != want {
						t.Errorf("the child's page %#x is looked for at %#x, is at %#x", image, got, want)
					}
				}
				if f.recent.err != nil {
					t.Error(f.recent.err)
				}
				f.recent.settle(f.parent)
				if len(f.recent.forks)+len(f.recent.moves) != 0 {
					t.Error("settled events are remembered")
				}
			}
		})
	}
}

func TestAChildThatChangesIsAskedOnlyForWhatItLacks(t *testing.T) {
	const a, b, size = 0x10000, 0x20000, page
	for _, forkFirst := range []bool{false, true} {
		for _, lacks := range []bool{false, true} {
			f := newFakeFamily(span{a, a + size})
			f.probe.changing = true
			f.recent.strict = true
			if !lacks {
				f.parent.giveUp(span{a, a + size})
			}
			if forkFirst {
				f.fork()
			}
			f.move(a, b, size)
			if !forkFirst {
				f.fork()
			}
			if got := errors.Is(f.recent.err, errAmbiguous); got != lacks {
				t.Errorf("fork first %v, lacks %v: %v", forkFirst, lacks, f.recent.err)
			}
		}
	}
}
