package check

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Mix is a 64-bit finalizer (splitmix64, Steele et al. 2014): cheap, and every
// input bit reaches every output bit.
func Mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// template is what half of the content consists of, so that it compresses about
// two to one, as real heaps and caches do.
const template = `{"user":"tranship","tags":["a","b"],"active":true,"score":0.25},`

// A shorter one would leave what was in the buffer before.
var _ = [1]struct{}{}[len(template)-64]

// Fill writes content that is a function of key alone, in blocks of 64 bytes,
// of which about half are the template.
func Fill(buf []byte, key uint64) {
	for block := 0; len(buf) > 0; block++ {
		n := min(64, len(buf))
		h := Mix(key ^ uint64(block)<<32)
		if h&1 == 0 {
			copy(buf[:n], template)
			// not the same twice, or a byte that moved within the page would not show
			buf[0] = byte(h >> 8)
		} else {
			fillRandom(buf[:n], h)
		}
		buf = buf[n:]
	}
}

func fillRandom(buf []byte, h uint64) {
	for len(buf) >= 8 {
		h = Mix(h)
		binary.LittleEndian.PutUint64(buf, h)
		buf = buf[8:]
	}
	for i := range buf {
		buf[i] = byte(h >> (8 * i))
	}
}

// Bytes is a flag for sizes and rates: 256MiB, 50MB/s, 4096. It implements
// pflag.Value.
type Bytes int64

var units = []struct {
	suffix string
	factor int64
}{
	{"GiB", 1 << 30},
	{"MiB", 1 << 20},
	{"KiB", 1 << 10},
	{"GB", 1e9},
	{"MB", 1e6},
	{"kB", 1e3},
	{"KB", 1e3},
	{"B", 1},
	{"", 1},
}

// ParseBytes reads a size; a trailing "/s" is allowed and means nothing here.
func ParseBytes(s string) (Bytes, error) {
	text := strings.TrimSuffix(s, "/s")
	for _, u := range units {
		number, ok := strings.CutSuffix(text, u.suffix)
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || !(v >= 0) || v*float64(u.factor) > 1<<50 {
			break
		}
		return Bytes(v * float64(u.factor)), nil
	}
	return 0, fmt.Errorf("%q is not a size like 256MiB or 50MB/s", s)
}

// Set implements pflag.Value.
func (b *Bytes) Set(s string) error {
	v, err := ParseBytes(s)
	if err == nil {
		*b = v
	}
	return err
}

// Type implements pflag.Value.
func (*Bytes) Type() string { return "size" }

func (b Bytes) String() string {
	for _, u := range units[:3] {
		if b != 0 && int64(b)%u.factor == 0 {
			return fmt.Sprintf("%d%s", int64(b)/u.factor, u.suffix)
		}
	}
	return fmt.Sprintf("%dB", int64(b))
}
