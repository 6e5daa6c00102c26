package transfer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// FuzzStream gives a receiver any stream. Whatever it holds, the Sink gets only
// whole pages in the user's address space, and success is answered only to a
// stream that counts what it carried.
func FuzzStream(f *testing.F) {
	one := bytes.Repeat([]byte{1}, page)
	f.Add(join(wire.OpenRound{Epoch: 1}, pagesFrame(one), wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}}))
	f.Add(join(wire.OpenRound{Epoch: 1}, wire.Batch{Segments: []wire.Segment{{PID: 1, Addr: page, Pages: 9, Zero: true}}}, wire.EndRound{Tally: wire.Tally{Batches: 1, Zeros: 9}}))
	delta, _ := encoding.AppendDelta(nil, make([]byte, page), append([]byte{1, 2, 3}, make([]byte, page-3)...))
	f.Add(join(wire.OpenRound{Epoch: 1}, deltaFrame(page, 1, delta), wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}}))
	f.Add(join(wire.OpenBlob{Kind: "k", Size: 5}, wire.Block{Raw: 5, Sum: xxh3.HashString("bytes"), Payload: []byte("bytes")}, wire.EndBlob{Bytes: 5}))
	f.Add(wire.Ask{Seed: 42, Pages: 3}.Append(nil))
	f.Add(join(wire.OpenRound{Epoch: 1}, wire.Copies{Runs: []wire.Copy{{PID: 1, Pages: 1}}, Sums: make([]byte, 16)}, wire.EndRound{Tally: wire.Tally{Copies: 1}}))
	zero := xxh3.Hash128Seed(make([]byte, page), 42)
	sum := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, zero.Hi), zero.Lo)
	f.Add(join(wire.OpenRound{Epoch: 1}, wire.Copies{Seed: 42, Runs: []wire.Copy{{PID: 1, FromPID: 1, Pages: 1}}, Sums: sum}, wire.EndRound{Tally: wire.Tally{Copies: 1}}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		sink := &strict{}
		r := &receiver{ctx: t.Context(), in: &inbound{}, sink: sink, log: slog.New(slog.DiscardHandler)}
		w := workspaces.Get().(*workspace)
		defer workspaces.Put(w)
		w.br.Reset(bytes.NewReader(raw))
		var back replies
		answer, err := r.take(w, &back)
		if sink.wrong != nil {
			t.Fatal(sink.wrong)
		}
		if err == nil && (answer.Pages+answer.Copies != sink.pages || answer.Zeros != sink.zeros || answer.Bytes != sink.bytes+uint64(back.tags)) {
			t.Fatalf("answered %+v for %+v", answer, sink)
		}
		if cap(w.frame) > 2*wire.MaxBody {
			t.Fatalf("a buffer of %d bytes", cap(w.frame))
		}
		if r.in.active != 0 {
			t.Fatal("the round was not left")
		}
	})
}

// replies counts the tags that are written back.
type replies struct{ tags int }

func (r *replies) Write(b []byte) (int, error) {
	_, _, head, err := wire.ParseHeader(b)
	if err != nil {
		return 0, err
	}
	have, err := wire.ParseHave(b[head:])
	r.tags += len(have.Tags) / wire.TagLen
	return len(b), err
}

func (r *replies) SetWriteDeadline(time.Time) error { return nil }
func (r *replies) Context() context.Context         { return context.Background() }

// EachTwin has one page.
func (s *strict) EachTwin(_ context.Context, limit checkpoint.Pages, found func(Twin, []byte) error) error {
	if limit <= 0 || limit > wire.MaxTwins {
		s.wrong = fmt.Errorf("%d pages of other shards", limit)
	}
	return found(Twin{}, bytes.Repeat([]byte{1}, page))
}

func (s *strict) ReadTwin(_ Twin, dst []byte) error {
	copy(dst, bytes.Repeat([]byte{1}, page))
	return nil
}

// strict is a Sink that checks what it is given.
type strict struct {
	pages, zeros, bytes uint64
	wrong               error
}

func (s *strict) PutPages(pid checkpoint.PID, addr uint64, data []byte) error {
	s.pages += uint64(len(data) / page)
	if len(data) == 0 || len(data)%page != 0 || addr+uint64(len(data)) > wire.MaxAddr {
		s.wrong = fmt.Errorf("%d bytes", len(data))
	}
	return s.check(pid, addr)
}

func (s *strict) ReadPages(pid checkpoint.PID, addr uint64, dst []byte) error {
	if len(dst) == 0 || len(dst)%page != 0 || addr+uint64(len(dst)) > wire.MaxAddr {
		s.wrong = fmt.Errorf("%d bytes are read", len(dst))
	}
	clear(dst)
	return s.check(pid, addr)
}

func (s *strict) ZeroPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	s.zeros += uint64(n)
	if n <= 0 || n > wire.MaxAddr/page || addr+uint64(n.Bytes()) > wire.MaxAddr {
		s.wrong = fmt.Errorf("%d pages", n)
	}
	return s.check(pid, addr)
}

func (s *strict) check(pid checkpoint.PID, addr uint64) error {
	if pid <= 0 || addr%page != 0 || addr > wire.MaxAddr {
		s.wrong = fmt.Errorf("pid %d at %#x", pid, addr)
	}
	return nil
}

func (s *strict) Blob(_ context.Context, kind, _ string, size int64, r io.Reader) error {
	n, err := io.Copy(io.Discard, r)
	s.bytes += uint64(n)
	if kind == "" || err == nil && size >= 0 && n != size || errors.Is(err, io.EOF) {
		s.wrong = fmt.Errorf("blob %q of %d with %d bytes, %w", kind, size, n, err)
	}
	return err
}
