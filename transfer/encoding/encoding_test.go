package encoding

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// noise is content that nothing compresses, the same in every run.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(b)
	return b
}

// half is content of which every second page compresses well.
func half(n int, seed uint64) []byte {
	b := noise(n, seed)
	for at := 4096; at < n; at += 8192 {
		copy(b[at:min(at+4096, n)], bytes.Repeat([]byte("key:value;"), 410))
	}
	return b
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096, 3*4096 + 5} {
		if !IsZero(make([]byte, n)) {
			t.Errorf("%d zeros are not zero", n)
		}
		for _, at := range []int{0, 7, 15, 16, 4095, 4096, n - 1} {
			if at < 0 || at >= n {
				continue
			}
			b := make([]byte, n)
			b[at] = 1
			if IsZero(b) {
				t.Errorf("a one at %d of %d is not seen", at, n)
			}
		}
	}
}

func TestWhatWasEncodedComesBack(t *testing.T) {
	tests := []struct {
		name string
		raw  []byte
		want Kind
	}{
		{"nothing", nil, Raw},
		{"one byte", []byte{7}, Raw},
		{"a page of noise", noise(4096, 1), Raw},
		{"a page of text", bytes.Repeat([]byte("key:value;"), 410)[:4096], S2},
		{"a batch of noise", noise(256<<10, 2), Raw},
		{"a batch of which half is noise", half(256<<10, 3), S2},
		{"a batch of zeros", make([]byte, 256<<10), S2},
	}
	dst := make([]byte, 256<<10)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var e Encoder
			before := bytes.Clone(test.raw)
			kind, payload := e.Encode(test.raw)
			if kind != test.want {
				t.Errorf("kind = %d, want %d", kind, test.want)
			}
			if len(payload) > len(test.raw) {
				t.Errorf("%d bytes became %d", len(test.raw), len(payload))
			}
			if !bytes.Equal(test.raw, before) {
				t.Error("the input was changed")
			}
			got, err := new(Decoder).Decode(dst, kind, len(test.raw), payload)
			if err != nil || !bytes.Equal(got, test.raw) {
				t.Errorf("came back as %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestAnEncoderThatIsOffCompressesNothing(t *testing.T) {
	e := Encoder{Off: true}
	if kind, _ := e.Encode(make([]byte, 4096)); kind != Raw {
		t.Error("kind =", kind)
	}
}

func TestTheEncoderBacksOffFromNoiseAndComesBackForText(t *testing.T) {
	var e Encoder
	batch, text := noise(256<<10, 4), half(256<<10, 5)
	tried := 0
	const batches = 200
	for range batches {
		if e.skip == 0 {
			tried++
		}
		e.Encode(batch)
	}
	if limit := batches/maxSkip + 6; tried > limit {
		t.Errorf("%d of %d batches of noise were tried, want at most %d", tried, batches, limit)
	}
	for i := 0; ; i++ {
		if i > maxSkip {
			t.Fatalf("after noise, %d batches of text went out untried", i)
		}
		if kind, _ := e.Encode(text); kind == S2 {
			break
		}
	}
	if kind, _ := e.Encode(text); kind != S2 {
		t.Error("text goes out raw after it has proved to be text")
	}
}

func TestWhatFollowsTextIsEncodedWithoutSamples(t *testing.T) {
	const size = 256 << 10
	deceiving := half(size, 6) // samples say noise
	for i := range samples {
		copy(deceiving[i*(size-sampleSize)/(samples-1):], noise(sampleSize, 7+uint64(i)))
	}
	var e Encoder
	if kind, _ := e.Encode(deceiving); kind != Raw {
		t.Errorf("%v of a batch whose samples are noise", kind)
	}
	e.Reset()
	e.Encode(half(size, 5))
	if kind, _ := e.Encode(deceiving); kind != S2 {
		t.Errorf("%v of the same after a batch that shrank", kind)
	}
	e.Encode(noise(size, 8))
	e.skip = 0
	if kind, _ := e.Encode(deceiving); kind != Raw {
		t.Errorf("%v of the same after a batch that did not shrink", kind)
	}
}

func TestDecodeRefuses(t *testing.T) {
	text := bytes.Repeat([]byte("abcd"), 1024)
	block := s2.Encode(nil, text)
	frame := frameOf(text)
	declared := bytes.Clone(frame)
	declared[5] ^= 1 // of the content's size
	tests := []struct {
		name    string
		kind    Kind
		raw     int
		payload []byte
	}{
		{"an unknown encoding", 9, 4096, block},
		{"raw bytes of another length", Raw, 4095, text},
		{"a block that declares another length", S2, 4095, block},
		{"a block that declares gigabytes", S2, 4096, []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0}},
		{"a block larger than the buffer, truly declared", S2, 8192, s2.Encode(nil, make([]byte, 8192))},
		{"a cut block", S2, 4096, block[:len(block)-1]},
		{"no block at all", S2, 0, nil},
		{"a frame that declares another length", Zstd, 4095, frame},
		{"a frame that holds another length than it declares", Zstd, 4097, declared},
		{"a frame larger than the buffer, truly declared", Zstd, 8192, frameOf(make([]byte, 8192))},
		{"a frame that declares gigabytes", Zstd, 4096, []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0}},
		{"a frame that does not declare its length", Zstd, 4096, streamOf(t, text)},
		{"a frame with a window beyond a batch", Zstd, 4096, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x40, 0xf0, 0x00, 0x0f, 1, 0, 0}},
		{"two frames", Zstd, 4096, append(bytes.Clone(frame), frame...)},
		{"a frame that is skipped", Zstd, 4096, append([]byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9}, frame...)},
		{"a cut frame", Zstd, 4096, frame[:len(frame)-1]},
		{"no frame at all", Zstd, 0, nil},
	}
	dst := make([]byte, 4096)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got, err := new(Decoder).Decode(dst, test.kind, test.raw, test.payload); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func frameOf(raw []byte) []byte { return newZstdEncoder().EncodeAll(raw, nil) }

// streamOf is a frame that was made by a stream, which does not know its length.
func streamOf(t testing.TB, raw []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(zstdWindow))
	if err != nil {
		t.Fatal(err)
	}
	for half := raw; len(half) > 0; half = half[min(len(half), 1000):] {
		w.Write(half[:min(len(half), 1000)])
		w.Flush()
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestDecodeNeverAllocates(t *testing.T) {
	raw, dst := half(256<<10, 6), make([]byte, 256<<10)
	payloads := map[Kind][]byte{S2: s2.Encode(nil, raw), Zstd: frameOf(raw)}
	for kind, payload := range payloads {
		var d Decoder
		if n := testing.AllocsPerRun(20, func() {
			if _, err := d.Decode(dst, kind, len(raw), payload); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("encoding %d: %v allocations a batch", kind, n)
		}
	}
}

func TestACutOrChangedFrameIsNeverTakenForItsContent(t *testing.T) {
	raw, dst := half(64<<10, 11), make([]byte, 64<<10)
	frame := frameOf(raw)
	var d Decoder
	for cut := 0; cut < len(frame); cut += 1 + cut/50 {
		if _, err := d.Decode(dst, Zstd, len(raw), frame[:cut]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("cut at %d of %d: %v", cut, len(frame), err)
		}
	}
	for at := 0; at < len(frame); at += 1 + at/50 {
		changed := bytes.Clone(frame)
		changed[at] ^= 0x55
		// Content may differ, the batch's hash sees that; length and errors may not.
		if got, err := d.Decode(dst, Zstd, len(raw), changed); err == nil && len(got) != len(raw) || err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("changed at %d: %d bytes, %v", at, len(got), err)
		}
	}
	if got, err := d.Decode(dst, Zstd, len(raw), frame); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("after all that, the frame itself: %v", err)
	}
}

func FuzzEncode(f *testing.F) {
	f.Add(noise(5000, 7), []byte("text text text text text"))
	f.Add(half(70<<10, 8), []byte{})
	slow := Road{Link: 1e6, Cores: 1}
	f.Fuzz(func(t *testing.T, one, two []byte) {
		encoders := []*Encoder{{}, {Choice: NewChoice(func() Road { return slow }), Time: func(work func()) time.Duration { work(); return 1 }}}
		var d Decoder
		for _, e := range encoders {
			for _, raw := range [][]byte{one, two, one} {
				kind, payload := e.Encode(raw)
				if len(payload) > len(raw) {
					t.Fatalf("%d bytes became %d", len(raw), len(payload))
				}
				got, err := d.Decode(make([]byte, len(raw)), kind, len(raw), payload)
				if err != nil || !bytes.Equal(got, raw) {
					t.Fatalf("%d bytes came back as %d, %v", len(raw), len(got), err)
				}
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add(byte(S2), 4096, s2.Encode(nil, make([]byte, 4096)))
	f.Add(byte(Raw), 3, []byte("abc"))
	f.Add(byte(Zstd), 4096, frameOf(make([]byte, 4096)))
	f.Add(byte(Zstd), 9000, frameOf(half(9000, 12)))
	var d Decoder // one for all: what came before must not matter
	f.Fuzz(func(t *testing.T, kind byte, raw int, payload []byte) {
		dst := make([]byte, 64<<10)
		got, err := d.Decode(dst, Kind(kind), raw, payload)
		if err == nil && len(got) != raw {
			t.Fatalf("%d bytes, declared %d", len(got), raw)
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	for _, content := range []struct {
		name string
		raw  []byte
	}{{"noise", noise(256<<10, 9)}, {"half", half(256<<10, 10)}} {
		b.Run("zstd/"+content.name, func(b *testing.B) {
			e, out := newZstdEncoder(), make([]byte, 0, 300<<10)
			b.SetBytes(int64(len(content.raw)))
			for b.Loop() {
				e.EncodeAll(content.raw, out)
			}
		})
		b.Run(content.name, func(b *testing.B) {
			var e Encoder
			b.SetBytes(int64(len(content.raw)))
			for b.Loop() {
				e.Encode(content.raw)
			}
		})
	}
	for _, tail := range []byte{0, 1} {
		page := make([]byte, 4096)
		page[4095] = tail
		b.Run(fmt.Sprintf("is zero, last byte %d", tail), func(b *testing.B) {
			b.SetBytes(4096)
			for b.Loop() {
				IsZero(page)
			}
		})
	}
}
