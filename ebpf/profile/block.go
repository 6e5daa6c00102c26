package profile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// A Block is an hour of minutes of one subject, the unit of the store and of a
// history that travels. Its form, before zstd:
//
//	byte     version
//	uint64   start of the hour, seconds since 1970, little endian
//	uint64   bit m: there is a point of minute m
//	n bytes  for each point: how much is covered, in 255ths of a minute
//	then for each column (the means of all signals, then the peaks of some):
//	byte     0 no values, 1 a value at every point, 2 a bitmap of those follows
//	uint64   only after 2
//	4 planes of n bytes: the columns' float32, low bytes first, in XOR with the
//	         value before; the mantissa is rounded to 11 bits (0.02 %)
//
// Planes put what is alike side by side: low planes are zero, exponents rarely
// change.
type Block struct {
	Hour   time.Time // UTC, a whole hour
	Points [60]*Point
}

const (
	blockVersion = 1
	// MaxBlock bounds an encoded block: 60 points of all columns, not compressed.
	MaxBlock   = 32 << 10
	maxPlain   = 64 << 10
	mantissa   = 11
	columnNone = 0
	columnFull = 1
	columnSome = 2
)

// ErrBlock says that bytes are not a block.
var ErrBlock = errors.New("not a block of a profile")

// Put files a point of a minute; false if it is of another hour or step. Of two
// points of one minute, as after a clock was set back, the one that covers more
// stays.
func (b *Block) Put(p Point) bool {
	if p.Step != Minute || !p.Start.UTC().Truncate(time.Hour).Equal(b.Hour) {
		return false
	}
	m := p.Start.UTC().Minute()
	if have := b.Points[m]; have == nil || have.Covered <= p.Covered {
		b.Points[m] = &p
	}
	return true
}

// Merge takes over the points of o that b lacks.
func (b *Block) Merge(o *Block) {
	for _, p := range o.Points {
		if p != nil {
			b.Put(*p)
		}
	}
}

// column reads one value of a point.
type column struct {
	signal Signal
	peak   bool
}

func columns() []column {
	var out []column
	for s := range Signals {
		out = append(out, column{s, false})
	}
	for s := range Signals {
		if signals[s].peaked {
			out = append(out, column{s, true})
		}
	}
	return out
}

func (c column) at(p *Point) *float32 {
	if c.peak {
		return &p.Peak[c.signal]
	}
	return &p.Mean[c.signal]
}

var codec = sync.OnceValues(func() (*zstd.Encoder, *zstd.Decoder) {
	// One encoder and decoder for all: EncodeAll and DecodeAll are stateless.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true))
	if err != nil {
		panic(err) // options are constants
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxPlain))
	if err != nil {
		panic(err)
	}
	return enc, dec
})

// Append encodes the block after dst.
func (b *Block) Append(dst []byte) []byte {
	var points []*Point
	var present uint64
	for m, p := range b.Points {
		if p != nil {
			present |= 1 << m
			points = append(points, p)
		}
	}
	plain := []byte{blockVersion}
	plain = binary.LittleEndian.AppendUint64(plain, uint64(b.Hour.Unix()))
	plain = binary.LittleEndian.AppendUint64(plain, present)
	for _, p := range points {
		// A life of 50 ms is short, not nothing.
		plain = append(plain, byte(max(1, math.Round(float64(p.Covered)/float64(Minute)*255))))
	}
	for _, c := range columns() {
		plain = appendColumn(plain, c, points)
	}
	enc, _ := codec()
	return enc.EncodeAll(plain, dst)
}

func appendColumn(plain []byte, c column, points []*Point) []byte {
	var have uint64
	n := 0
	for i, p := range points {
		if p.Has.Has(c.signal) {
			have |= 1 << i
			n++
		}
	}
	switch n {
	case 0:
		return append(plain, columnNone)
	case len(points):
		plain = append(plain, columnFull)
	default:
		plain = append(plain, columnSome)
		plain = binary.LittleEndian.AppendUint64(plain, have)
	}
	at := len(plain)
	plain = append(plain, make([]byte, 4*n)...)
	i, before := 0, uint32(0)
	for k, p := range points {
		if have>>k&1 == 0 {
			continue
		}
		v := coarse(*c.at(p))
		x := v ^ before
		before = v
		for plane := range 4 {
			plain[at+plane*n+i] = byte(x >> (8 * plane))
		}
		i++
	}
	return plain
}

// coarse rounds to the stored precision; what is not a number becomes 0.
func coarse(f float32) uint32 {
	v := math.Float32bits(f)
	if f != f || math.IsInf(float64(f), 0) {
		return 0
	}
	const drop = 23 - mantissa
	rounded := v + 1<<(drop-1)
	if rounded&0x7f800000 == 0x7f800000 {
		rounded = v // would round up to infinity
	}
	return rounded &^ (1<<drop - 1)
}

// ParseBlock decodes what Append made. Whatever else it is given is ErrBlock.
func ParseBlock(raw []byte) (*Block, error) {
	if len(raw) > MaxBlock {
		return nil, fmt.Errorf("%w: %d bytes", ErrBlock, len(raw))
	}
	_, dec := codec()
	plain, err := dec.DecodeAll(raw, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBlock, err)
	}
	r := reader{rest: plain}
	version, sec, present := r.byte(), r.uint64(), r.uint64()
	if r.short || version != blockVersion || sec%3600 != 0 || sec > math.MaxInt32*4 || present>>60 != 0 {
		return nil, fmt.Errorf("%w: its head is wrong", ErrBlock)
	}
	b := &Block{Hour: time.Unix(int64(sec), 0).UTC()}
	var points []*Point
	for m := range b.Points {
		if present>>m&1 == 1 {
			p := &Point{Start: b.Hour.Add(time.Duration(m) * Minute), Step: Minute}
			p.Covered = (time.Duration(r.byte())*Minute + 127) / 255
			b.Points[m] = p
			points = append(points, p)
		}
	}
	for _, c := range columns() {
		r.column(c, points)
	}
	if r.short || len(r.rest) > 0 {
		return nil, fmt.Errorf("%w: its length is wrong", ErrBlock)
	}
	return b, nil
}

// reader takes plain bytes apart; short is set once they do not suffice.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.rest) {
		r.short = true
		return make([]byte, n)
	}
	out := r.rest[:n]
	r.rest = r.rest[n:]
	return out
}

func (r *reader) byte() byte     { return r.take(1)[0] }
func (r *reader) uint64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func (r *reader) column(c column, points []*Point) {
	var have uint64
	switch r.byte() {
	case columnNone:
		return
	case columnFull:
		have = 1<<len(points) - 1
	case columnSome:
		have = r.uint64()
	default:
		r.short = true
	}
	var in []*Point
	for i, p := range points {
		if have>>i&1 == 1 {
			in = append(in, p)
		}
	}
	planes := r.take(4 * len(in))
	var v uint32
	for i, p := range in {
		for plane := range 4 {
			v ^= uint32(planes[plane*len(in)+i]) << (8 * plane)
		}
		p.Has = p.Has.With(c.signal)
		*c.at(p) = math.Float32frombits(v)
	}
}

// Minutes returns the block's points in order.
func (b *Block) Minutes() []Point {
	var out []Point
	for _, p := range b.Points {
		if p != nil {
			out = append(out, *p)
		}
	}
	return slices.Clip(out)
}
