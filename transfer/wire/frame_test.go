package wire

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"
)

// frame is what every frame can do.
type frame interface {
	Len() int
	Append([]byte) []byte
}

// parse takes a body apart by its type.
func parse(t Type, body []byte) (frame, error) {
	switch t {
	case TypeHello:
		return ParseHello(body)
	case TypeWelcome:
		return ParseWelcome(body)
	case TypeOpenRound:
		return ParseOpenRound(body)
	case TypeBatch:
		var b Batch
		err := b.Parse(body)
		return b, err
	case TypeEndRound:
		return ParseEndRound(body)
	case TypeOpenBlob:
		return ParseOpenBlob(body)
	case TypeBlock:
		return ParseBlock(body)
	case TypeEndBlob:
		return ParseEndBlob(body)
	case TypeAnswer:
		return ParseAnswer(body)
	case TypeCopies:
		return ParseCopies(body)
	case TypeAsk:
		return ParseAsk(body)
	case TypeHave:
		return ParseHave(body)
	}
	return nil, ErrMalformed
}

// conforms is what every frame is tested for: it comes back as it was, Len is
// right, and neither a cut nor a longer body is taken for a frame.
func conforms(t *testing.T, want Type, f frame) {
	t.Helper()
	raw := f.Append([]byte("before"))
	if !bytes.HasPrefix(raw, []byte("before")) {
		t.Fatal("Append wrote over what was there")
	}
	raw = raw[len("before"):]
	if f.Len() != len(raw) {
		t.Errorf("Len = %d, the frame has %d bytes", f.Len(), len(raw))
	}
	typ, n, head, err := ParseHeader(raw)
	if err != nil || typ != want || head+n != len(raw) {
		t.Fatalf("header: %v, body of %d after %d of %d bytes, %v", typ, n, head, len(raw), err)
	}
	body := raw[head:]
	got, err := parse(typ, body)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, f) {
		t.Errorf("came back as %+v, was %+v", got, f)
	}
	// The payload of a block goes on to the end of its body: only its decoder
	// can tell that it was cut.
	fixed := len(body)
	switch f := f.(type) {
	case Block:
		fixed -= len(f.Payload)
	case Batch:
		fixed -= len(f.Payload)
	default:
		if _, err := parse(typ, append(bytes.Clone(body), 0)); !errors.Is(err, ErrMalformed) {
			t.Errorf("one byte more: %v", err)
		}
	}
	// At every byte; of the largest frames at some two thousand.
	stride := 1 + len(raw)/2000
	for cut := 0; cut < fixed; cut += stride {
		if _, err := parse(typ, body[:cut]); err == nil {
			t.Errorf("body cut at %d of %d was accepted", cut, len(body))
		}
	}
	for cut := 0; cut < len(raw); cut += stride {
		_, _, _, err := ReadFrame(bufio.NewReader(bytes.NewReader(raw[:cut])), nil)
		if cut == 0 && !errors.Is(err, io.EOF) || cut > 0 && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("stream cut at %d of %d: %v", cut, len(raw), err)
		}
	}
	typ, body, _, err = ReadFrame(bufio.NewReader(iotest.OneByteReader(bytes.NewReader(raw))), nil)
	if err != nil || typ != want || !bytes.Equal(body, raw[head:]) {
		t.Errorf("read byte by byte: %v, %d bytes, %v", typ, len(body), err)
	}
}

func TestHeadersAreRefused(t *testing.T) {
	tests := []struct {
		name string
		raw  []byte
		want error
	}{
		{"of no frame", []byte{0, 1, 0}, ErrMalformed},
		{"of an unknown frame", []byte{0x7f, 1, 0}, ErrMalformed},
		{"with a body over its frame's limit", AppendHeader(nil, TypeHello, maxSmall+1), ErrLimit},
		{"with a batch over the limit", AppendHeader(nil, TypeBatch, MaxBody+1), ErrLimit},
		{"with a length that has no end", append([]byte{byte(TypeBatch)}, bytes.Repeat([]byte{0x80}, 20)...), nil},
		{"with a length that is not in its shortest form", []byte{byte(TypeAnswer), 0x81, 0x00}, ErrMalformed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, _, _, err := ParseHeader(test.raw)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("ParseHeader: %v", err)
			}
			_, _, grown, err := ReadFrame(bufio.NewReader(bytes.NewReader(test.raw)), nil)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("ReadFrame: %v", err)
			}
			if cap(grown) > 0 {
				t.Errorf("ReadFrame took %d bytes for it", cap(grown))
			}
		})
	}
}

func TestAnUnknownFrameIsRefusedBeforeItsLengthArrives(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	go w.Write([]byte{0xee})
	if _, _, _, err := ReadFrame(bufio.NewReader(r), nil); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

func TestReadFrameUsesTheBufferItIsGiven(t *testing.T) {
	raw := EndRound{Tally{1, 2, 3, 4, 5}}.Append(nil)
	buf := make([]byte, 0, 100)
	_, body, grown, err := ReadFrame(bufio.NewReader(bytes.NewReader(raw)), buf)
	if err != nil {
		t.Fatal(err)
	}
	if &body[0] != &buf[:1][0] || &grown[0] != &buf[:1][0] {
		t.Error("it took another one")
	}
}

func TestClipKeepsTextValidAndShort(t *testing.T) {
	tests := []struct {
		name, in string
		limit    int
		want     string
	}{
		{"short text stays", "no space", 20, "no space"},
		{"long text is cut", "no space", 4, "no s"},
		{"a rune is not cut apart", "aäb", 2, "a"},
		{"invalid bytes are replaced", "a\xffb", 20, "a\ufffdb"},
		{"invalid bytes are replaced before it is cut", strings.Repeat("\xff", 10), 7, "\ufffd\ufffd"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := Clip(test.in, test.limit); got != test.want || !utf8.ValidString(got) {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// FuzzReadFrame holds three things against any bytes: nothing panics, nothing
// takes more memory than the largest frame, and what is accepted has exactly
// one encoding: appended again it is the same bytes.
func FuzzReadFrame(f *testing.F) {
	for _, sample := range samples() {
		f.Add(sample.Append(nil))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		typ, body, grown, err := ReadFrame(bufio.NewReader(bytes.NewReader(raw)), nil)
		if cap(grown) > 2*MaxBody {
			t.Fatalf("a buffer of %d bytes", cap(grown))
		}
		if err != nil {
			return
		}
		got, err := parse(typ, body)
		if err != nil {
			return
		}
		again := got.Append(nil)
		if !bytes.HasPrefix(raw, again) {
			t.Fatalf("%v accepted from %x is %x when appended", typ, raw, again)
		}
		if got.Len() != len(again) {
			t.Fatalf("%v: Len = %d of %d", typ, got.Len(), len(again))
		}
	})
}

func samples() []frame {
	return []frame{
		Hello{Version: Version, Session: SessionID{1, 2, 3}, Attempt: 1, Migration: "m-1"},
		Welcome{Version: Version, Code: "unknown-migration", Text: "no such migration"},
		OpenRound{Epoch: 3, Round: 2},
		Batch{
			Segments: []Segment{{PID: 1, Addr: 0x1000, Pages: 1}, {PID: 1, Addr: 0x2000, Pages: 7, Zero: true}},
			Block:    Block{Encoding: 1, Sum: 42, Raw: 4096, Payload: []byte("short")},
		},
		Batch{
			Segments: []Segment{{PID: 1, Addr: 0x1000, Pages: 2, Delta: 40}, {PID: 1, Addr: 0x9000, Pages: 1}},
			Block:    Block{Encoding: 2, Sum: 42, Raw: 4136, Payload: []byte("short")},
		},
		EndRound{Tally{1, 2, 3, 4, 5}},
		OpenBlob{Kind: "image", Name: "core-1.img", Size: -1},
		Block{Encoding: 0, Sum: 7, Raw: 5, Payload: []byte("bytes")},
		EndBlob{Bytes: 5},
		Answer{Code: "sink", Text: "no space left", Bytes: 3},
		Answer{Tally: Tally{Copies: 4, Missed: 1}, Missing: []byte{2}},
		copiesOf(Copy{PID: 1, Addr: 0x1000, FromPID: 2, From: 0x9000, Pages: 2}),
		copiesOf(Copy{PID: 1, Addr: 0x1000, Pages: 2}),
		Ask{Seed: 42, Pages: 7},
		Have{Tags: []byte("tags")},
	}
}
