package predict

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"
)

// MaxState bounds what MarshalBinary returns, in bytes: the state travels with
// a migrating shard, inside the blackout.
const MaxState = 64 << 10

// stateVersion changes with the fields and with the meaning of any of them; a
// state of another version is refused, and the series starts cold.
const stateVersion = 7

// ErrState is wrapped by every refusal of UnmarshalBinary.
var ErrState = errors.New("forecaster state")

// state walks over the fields of a forecaster, writing or reading each: one
// list of fields cannot disagree with itself.
type state struct {
	buf     []byte
	reading bool
	err     error
}

func (s *state) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("%w: "+format, append([]any{ErrState}, args...)...)
	}
}

func (s *state) take(n int) []byte {
	if s.err == nil && len(s.buf) < n {
		s.fail("cut short")
	}
	if s.err != nil {
		return nil
	}
	b := s.buf[:n]
	s.buf = s.buf[n:]
	return b
}

func (s *state) word(v *uint64) {
	if !s.reading {
		s.buf = binary.LittleEndian.AppendUint64(s.buf, *v)
	} else if b := s.take(8); b != nil {
		*v = binary.LittleEndian.Uint64(b)
	}
}

// int64 within [lo, hi].
func (s *state) int64(v *int64, lo, hi int64) {
	w := uint64(*v)
	s.word(&w)
	if !s.reading || s.err != nil {
		return
	}
	if x := int64(w); x < lo || x > hi {
		s.fail("%d is not within [%d, %d]", x, lo, hi)
	} else {
		*v = x
	}
}

// int is one of 32 bits.
func (s *state) int(v *int, lo, hi int) {
	if !s.reading {
		s.buf = binary.LittleEndian.AppendUint32(s.buf, uint32(*v))
	} else if b := s.take(4); b != nil {
		if x := int(int32(binary.LittleEndian.Uint32(b))); x < lo || x > hi {
			s.fail("%d is not within [%d, %d]", x, lo, hi)
		} else {
			*v = x
		}
	}
}

func (s *state) bool(v *bool) {
	w := 0
	if *v {
		w = 1
	}
	s.int(&w, 0, 1)
	*v = w == 1
}

// float is finite: a NaN in a level would never leave it again.
func (s *state) float(vs ...*float64) {
	for _, v := range vs {
		w := math.Float64bits(*v)
		s.word(&w)
		if !s.reading || s.err != nil {
			continue
		}
		if x := math.Float64frombits(w); math.IsNaN(x) || math.IsInf(x, 0) {
			s.fail("a number is not finite")
		} else {
			*v = x
		}
	}
}

// count is a number of things seen.
func (s *state) count(v *float64) {
	s.float(v)
	if s.reading && s.err == nil && (*v < 0 || *v > 1e15 || *v != math.Trunc(*v)) {
		s.fail("%g is not a count", *v)
	}
}

// open is a running maximum, -Inf while empty.
func (s *state) open(v *float64) {
	x, empty := *v, math.IsInf(*v, -1)
	s.bool(&empty)
	if empty {
		x = 0
	}
	s.float(&x)
	if empty {
		x = math.Inf(-1)
	}
	*v = x
}

// floats writes single precision; gaps says that NaN and -Inf have a meaning.
func (s *state) floats(vs []float32, gaps bool) {
	if !s.reading {
		for _, v := range vs {
			s.buf = binary.LittleEndian.AppendUint32(s.buf, math.Float32bits(v))
		}
		return
	}
	b := s.take(4 * len(vs))
	for i := range vs {
		if b == nil {
			return
		}
		x := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		if !gaps && (x != x || math.IsInf(float64(x), 0)) {
			s.fail("a number is not finite")
			return
		}
		if math.IsInf(float64(x), 1) {
			s.fail("a number is infinite")
			return
		}
		vs[i] = x
	}
}

func (s *state) bytes(vs []uint8) {
	if !s.reading {
		s.buf = append(s.buf, vs...)
	} else {
		copy(vs, s.take(len(vs)))
	}
}

// MarshalBinary returns everything that was learnt, at most MaxState bytes.
func (f *Forecaster) MarshalBinary() ([]byte, error) {
	s := state{buf: []byte{stateVersion}}
	cfg := f.cfg
	s.config(&cfg)
	s.forecaster(f)
	if s.err != nil {
		return nil, s.err
	}
	s.buf = binary.LittleEndian.AppendUint32(s.buf, crc32.ChecksumIEEE(s.buf))
	return s.buf, nil
}

// UnmarshalBinary replaces f, whose Config need not match, by the state of
// another. On an error, which wraps ErrState, f is unchanged.
func (f *Forecaster) UnmarshalBinary(data []byte) error {
	s := state{reading: true}
	switch {
	case len(data) > MaxState:
		s.fail("%d bytes are more than %d", len(data), MaxState)
	case len(data) < 5:
		s.fail("cut short")
	case data[0] != stateVersion:
		s.fail("version %d, this is version %d", data[0], stateVersion)
	case binary.LittleEndian.Uint32(data[len(data)-4:]) != crc32.ChecksumIEEE(data[:len(data)-4]):
		s.fail("checksum differs")
	}
	if s.err != nil {
		return s.err
	}
	s.buf = data[1 : len(data)-4]
	var cfg Config
	s.config(&cfg)
	if s.err != nil {
		return s.err
	}
	fresh, err := New(cfg)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	s.forecaster(fresh)
	if s.err == nil && len(s.buf) != 0 {
		s.fail("%d bytes too many", len(s.buf))
	}
	if s.err != nil {
		return s.err
	}
	*f = *fresh
	return nil
}

func (s *state) config(c *Config) {
	step, n := int64(c.Step), len(c.Horizons)
	s.int64(&step, int64(time.Millisecond), int64(24*time.Hour))
	s.int(&n, 1, MaxHorizons)
	if s.reading && s.err == nil {
		c.Step, c.Horizons = time.Duration(step), make([]time.Duration, n)
	}
	for i := range c.Horizons {
		h := int64(c.Horizons[i])
		s.int64(&h, 1, int64(31*24*time.Hour))
		c.Horizons[i] = time.Duration(h)
	}
}

// anyTime: nanoseconds that stay clear of overflow when days are added.
const anyTime = math.MaxInt64 / 4

func (s *state) forecaster(f *Forecaster) {
	s.bool(&f.begun)
	s.int64(&f.open, 0, anyTime)
	s.float(&f.sum)
	s.count(&f.n)
	s.int(&f.late, 0, lateLimit)
	s.float(&f.counter)
	s.int64(&f.counterAt, -anyTime, anyTime)
	s.bool(&f.counting)
	s.history(&f.hist)
	if s.err == nil && s.reading && (f.open > anyTime/int64(f.cfg.Step) || f.hist.cells > 0 && f.hist.lastCell >= f.open) {
		s.fail("cell %d is not open", f.open)
	}
	for _, l := range f.lanes {
		s.lane(l, f.open)
	}
}

func (s *state) history(h *history) {
	s.int64(&h.origin, -anyTime, anyTime)
	s.int64(&h.cells, 0, anyTime)
	s.int64(&h.lastCell, 0, anyTime)
	s.float(&h.last, &h.prev, &h.median, &h.q50, &h.volFast, &h.volSlow, &h.scale, &h.least, &h.lentScale, &h.lentVol, &h.lentN, &h.lo, &h.hi, &h.seenLo, &h.seenHi, &h.before.slow, &h.before.q50, &h.before.volFast, &h.before.volSlow, &h.before.scale, &h.runSum, &h.curSum, &h.weekSum)
	for i := range h.ew {
		s.float(&h.ew[i])
	}
	for i := range h.recent {
		s.float(&h.recent[i])
	}
	s.window(&h.short)
	s.int(&h.run, 0, shiftRun)
	s.bool(&h.runUp)
	s.int64(&h.shiftCell, 0, anyTime)
	s.int64(&h.levelCell, -day/h.step, anyTime)
	s.int64(&h.cur, -anyTime, anyTime)
	s.int64(&h.weekCur, -anyTime, anyTime)
	s.count(&h.curN)
	s.count(&h.weekN)
	s.open(&h.curMax)
	s.open(&h.usual)
	s.floats(h.mean, true)
	s.floats(h.top, true)
	s.floats(h.week, true)
	s.floats(h.prof, false)
	s.floats(h.ptop, false)
	s.bytes(h.profN)
	if s.reading && s.err == nil && (h.volFast < 0 || h.volSlow < 0 || h.scale < 0 || h.lentN < 0 || h.lo > h.hi || h.seenLo > h.seenHi) {
		s.fail("a scale is negative")
	}
}

func (s *state) lane(l *lane, open int64) {
	s.int64(&l.peaks.cur, -1, anyTime)
	s.floats(l.peaks.top, true)
	for i := range l.peaks.seen {
		n := int(l.peaks.seen[i])
		s.int(&n, 0, int(min(l.stride, math.MaxInt32)))
		l.peaks.seen[i] = int32(n)
	}
	for i := range l.wait {
		s.entry(&l.wait[i], l, open)
	}
	for k := range l.of {
		if Target(k) == Peak && l.steps == 1 {
			continue
		}
		s.half(&l.of[k])
	}
}

func (s *state) entry(e *entry, l *lane, open int64) {
	s.bool(&e.ok)
	if !e.ok || s.err != nil {
		return
	}
	s.int64(&e.cell, 0, open)
	s.float(&e.anchor, &e.scale)
	if s.reading && s.err == nil && !(e.scale > 0) {
		s.fail("an entry has no scale")
	}
	targets := 2
	if l.steps == 1 {
		targets = 1
	}
	if targets == 1 {
		s.floats(e.x[:valueFeatures], false)
	} else {
		s.floats(e.x[:], false)
	}
	for t := range targets {
		s.floats(e.s[t][:], false)
		fs := [6]float32{e.stack[t], e.mid[t], e.spread[t], e.mid50[t], e.up90[t], e.up95[t]}
		s.floats(fs[:], false)
		e.stack[t], e.mid[t], e.spread[t], e.mid50[t], e.up90[t], e.up95[t] = fs[0], fs[1], fs[2], fs[3], fs[4], fs[5]
		if s.reading && s.err == nil && !(e.spread[t] > 0) {
			s.fail("an entry has no spread")
		}
	}
}

func (s *state) half(h *half) {
	s.ridge(&h.stack)
	s.ridge(&h.width)
	s.count(&h.members.n)
	for i := range h.members.loss {
		s.float(&h.members.loss[i])
	}
	for k := range h.members.weight {
		s.floats(h.members.weight[k][:], false)
		s.float(&h.members.tier[k])
	}
	s.floats(h.members.mix[:], false)
	s.int(&h.members.due, 0, 8)
	for i := range h.aside {
		if !h.sorts {
			break
		}
		a := &h.aside[i]
		s.count(&a.n)
		s.floats(a.loss[:], false)
		s.floats(a.mix[:], false)
	}
	s.offset(&h.tails)
	s.count(&h.n)
	s.bool(&h.borrowed)
	s.float(&h.errFast, &h.errSlow, &h.lossOwn, &h.lossNaive, &h.lateOwn, &h.lateNaive, &h.regret, &h.same, &h.cover90, &h.cover95)
	b := &h.kept
	s.floats(b.members[:], false)
	for i := range b.tails {
		s.floats(b.tails[i][:], false)
	}
	s.int(&b.took, 0, tookCycle-1)
	s.float(&b.errFast, &b.errSlow, &b.lossOwn, &b.lossNaive, &b.lateOwn, &b.lateNaive, &b.regret)
	s.floats(h.errHour[:], false)
	s.bytes(h.errHourN[:])
}

func (s *state) ridge(r *ridge) {
	s.floats(r.a, false)
	s.floats(r.b, false)
	s.floats(r.beta, false)
	s.float(&r.unit)
	s.int(&r.seen, 0, math.MaxInt32)
	s.int(&r.due, 0, solveEvery)
	if s.reading && s.err == nil && !(r.unit >= 1 && r.unit <= 1e7) {
		s.fail("a regression's unit is %g", r.unit)
	}
}

func (s *state) offset(o *offset) {
	for j := range o.seen {
		s.digest(&o.seen[j])
	}
	for i := range judged {
		for j := range o.loss[i] {
			s.float(&o.loss[i][j])
		}
	}
	for i := range o.bend {
		s.float(&o.bend[i])
		if s.reading && s.err == nil && math.Abs(o.bend[i]) > 0.1 {
			s.fail("a rank is off by %g", o.bend[i])
		}
	}
	s.count(&o.n)
	s.float(&o.doubt)
	s.int(&o.took, 0, tookCycle-1)
	s.int(&o.due, 0, freshSize)
	for k := range o.q {
		for j := range o.q[k] {
			s.float(&o.q[k][j])
		}
	}
	for i := range o.weight {
		s.floats(o.weight[i][:], false)
	}
	o.total()
}

func (s *state) digest(d *digest) {
	n, fresh := len(d.mean), len(d.fresh)
	s.int(&n, 0, cap(d.mean))
	s.int(&fresh, 0, freshSize)
	if s.err != nil {
		return
	}
	if s.reading {
		d.mean, d.weight, d.fresh = d.mean[:n], d.weight[:n], d.fresh[:fresh]
	}
	seen := []float32{d.seen, d.widest}
	s.floats(seen, false)
	d.seen, d.widest = seen[0], seen[1]
	s.floats(d.mean, false)
	s.floats(d.weight, false)
	s.floats(d.fresh, false)
	if !s.reading || s.err != nil {
		return
	}
	for i, w := range d.weight {
		if !(w >= 0 && w < 1e9) || i > 0 && d.mean[i] < d.mean[i-1] {
			s.fail("a digest is out of order")
			return
		}
	}
	if !(d.seen >= 0) {
		s.fail("a digest has seen %g values", d.seen)
	}
	d.weigh()
}

func (s *state) window(w *window) {
	n := len(w.ring)
	s.int(&n, 0, cap(w.ring))
	s.int(&w.next, 0, max(0, cap(w.ring)-1))
	if s.err != nil {
		return
	}
	if s.reading {
		w.ring = w.ring[:n]
	}
	s.floats(w.ring, false)
	if !s.reading || s.err != nil {
		return
	}
	if w.next > 0 && !w.full() {
		s.fail("a window has wrapped before it was full")
		return
	}
	w.sort()
}
