package transfer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// Shards of one image have pages in common: what their runtime, their libraries
// and their own start made of memory. Where such a shard runs at the destination
// already, a page that it has is not sent.
//
//  1. Round.AskTwins: the receiver looks through the memory of those shards and
//     tells 32 bits of each page's hash, while the round goes on;
//  2. Round.Pages leaves out a page whose hash may be among them;
//  3. Round.Close names it by its whole hash, with the copies (copies.go);
//  4. the receiver reads the other shard's page again, as that goes on running,
//     and keeps it if it has that hash;
//  5. what it has not, the sender sends.
//
// What was told holds for that round: then both ends forget it.

// Twin is where a page of another shard is: its Sink's matter.
type Twin struct {
	Process int
	Addr    uint64
}

// Twins is what a Sink may be as well: one that has pages of other shards.
type Twins interface {
	// EachTwin calls found with at most limit pages of shards that are like the
	// one that comes. data is a page, and valid only during the call; an error of
	// found ends EachTwin and is returned. ctx ends when nobody needs more of
	// them.
	EachTwin(ctx context.Context, limit checkpoint.Pages, found func(at Twin, data []byte) error) error
	// ReadTwin fills dst, a page, with what is there now, whatever that is. An
	// error says only that there is nothing.
	ReadTwin(at Twin, dst []byte) error
}

// twins are the pages that a receiver has told of.
type twins struct {
	seed  uint64
	of    Twins
	epoch uint64 // of the round that they are for; 0 before it

	mu sync.Mutex
	at map[uint32]Twin // by tag: at most wire.MaxTwins
}

// asking is a question for twins.
type asking struct {
	end  context.CancelCauseFunc
	done chan struct{}
}

var errAllGiven = errors.New("all pages of the round have been given")

// AskTwins asks which pages the receiver has of shards like this one, which has
// so many pages, and leaves those out that are given once it is told of them. told
// is called once, at the latest by Close, with how many there are. An error does
// not break the round: all pages are sent then. It must be called before the first
// page, after ReadAgain.
func (r *Round) AskTwins(pages checkpoint.Pages, told func(n checkpoint.Pages, err error)) {
	ctx, end := context.WithCancelCause(r.outer)
	r.asking = &asking{end, make(chan struct{})}
	go func() {
		defer close(r.asking.done)
		n, err := r.s.askTwins(ctx, max(0, min(pages, wire.MaxTwins)))
		if ctx.Err() != nil {
			err = nil // nobody needs the answer
		}
		if err != nil {
			err = fmt.Errorf("pages of other shards on %s: %w", r.s.node, err)
		}
		told(n, err)
	}()
}

// endAsking waits for the end of a question, which nobody needs an answer to.
func (r *Round) endAsking() {
	if r.asking != nil {
		r.asking.end(errAllGiven)
		<-r.asking.done
	}
}

func (s *Session) askTwins(ctx context.Context, pages checkpoint.Pages) (n checkpoint.Pages, err error) {
	links, err := s.usable()
	if err != nil {
		return 0, err
	}
	stream, err := links[0].conn.OpenStreamSync(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, linkError(err)
	}
	stop := abortOn(ctx, stream)
	err = func() error {
		if _, err := s.write(ctx, stream, wire.Ask{Seed: s.memory.seed, Pages: uint64(pages)}.Append(nil)); err != nil {
			return err
		}
		if err := stream.Close(); err != nil {
			return err
		}
		n, err = readTags(stream, pages, s.memory.tell)
		return err
	}()
	var remote *RemoteError
	switch {
	case ctx.Err() != nil:
		return n, context.Cause(ctx)
	case errors.As(err, &remote):
	case violation(err) || cut(err):
		err = &RemoteError{Code: CodeProtocol, Text: err.Error()}
	case err != nil:
		return n, linkError(err)
	}
	if err != nil {
		stream.CancelRead(streamAborted)
		return n, err
	}
	stop()
	return n, nil
}

// readTags reads what answers an Ask.
func readTags(r io.Reader, limit checkpoint.Pages, tell func(tags []byte)) (n checkpoint.Pages, err error) {
	br := bufio.NewReader(r)
	var buf []byte
	for {
		t, body, grown, err := wire.ReadFrame(br, buf)
		if err != nil {
			return n, unexpected(err)
		}
		buf = grown
		switch t {
		case wire.TypeHave:
			have, err := wire.ParseHave(body)
			if err != nil {
				return n, err
			}
			if n += checkpoint.Pages(len(have.Tags) / wire.TagLen); n > limit {
				return n, fmt.Errorf("%d pages, asked for %d: %w", n, limit, wire.ErrLimit)
			}
			tell(have.Tags)
		case wire.TypeAnswer:
			answer, err := wire.ParseAnswer(body)
			switch {
			case err != nil:
				return n, err
			case answer.Code != "":
				return n, &RemoteError{Code: answer.Code, Text: answer.Text}
			case answer.Bytes != uint64(n):
				return n, fmt.Errorf("%d pages, told of %d: %w", n, answer.Bytes, wire.ErrMalformed)
			}
			return n, nil
		default:
			return n, fmt.Errorf("%v in place of pages: %w", t, wire.ErrMalformed)
		}
	}
}

// tell notes pages that the receiver has.
func (m *pageMemory) tell(tags []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.twins == nil {
		m.twins = map[uint32]struct{}{}
	}
	for ; len(tags) > 0; tags = tags[wire.TagLen:] {
		m.twins[binary.BigEndian.Uint32(tags)] = struct{}{}
	}
}

// isTwin says whether the receiver may have a page of another shard with this
// hash. Under mu.
func (m *pageMemory) isTwin(hash xxh3.Uint128) bool {
	_, told := m.twins[uint32(hash.Lo)]
	return told
}

// forgetTwins ends what the receiver told.
func (m *pageMemory) forgetTwins() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.twins = nil
}

// errAsked: one look through the memory of shards at a time is work enough.
var errAsked = &RemoteError{Code: CodeBusy, Text: "the last question for pages of other shards is being answered"}

// tell answers an Ask: it writes the tags, and returns how many.
func (r *receiver) tell(ask wire.Ask, back reply) (uint64, error) {
	of, ok := r.sink.(Twins)
	if !ok || ask.Pages == 0 {
		return 0, nil
	}
	if !r.in.asking.TryLock() {
		return 0, errAsked
	}
	defer r.in.asking.Unlock()
	found := &twins{seed: ask.Seed, of: of, at: map[uint32]Twin{}}
	r.in.told(found)
	n, tags := uint64(0), make([]byte, 0, wire.MaxTags*wire.TagLen)
	flush := func() error {
		if len(tags) == 0 {
			return nil
		}
		if err := back.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
			return err
		}
		_, err := back.Write(wire.Have{Tags: tags}.Append(nil))
		tags = tags[:0]
		return err
	}
	err := of.EachTwin(back.Context(), checkpoint.Pages(ask.Pages), func(at Twin, data []byte) error {
		if n == ask.Pages || encoding.IsZero(data) {
			return nil
		}
		tag := uint32(xxh3.Hash128Seed(data, ask.Seed).Lo)
		if !found.add(tag, at) {
			return nil
		}
		n++
		if tags = binary.BigEndian.AppendUint32(tags, tag); len(tags) == cap(tags) {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return n, fmt.Errorf("pages of other shards: %w", err)
	}
	return n, nil
}

// add enters a page, unless another has its tag.
func (t *twins) add(tag uint32, at Twin) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, have := t.at[tag]; have {
		return false
	}
	t.at[tag] = at
	return true
}

// told keeps what a round may refer to.
func (in *inbound) told(found *twins) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.twins = found
}

// readTwin fills dst with a page of another shard if there is one with the hash.
func (in *inbound) readTwin(seed uint64, want xxh3.Uint128, dst []byte) bool {
	in.mu.Lock()
	known := in.twins
	in.mu.Unlock()
	if known == nil || known.seed != seed {
		return false
	}
	known.mu.Lock()
	at, ok := known.at[uint32(want.Lo)]
	known.mu.Unlock()
	return ok && known.of.ReadTwin(at, dst) == nil && xxh3.Hash128Seed(dst, seed) == want
}
