package transfer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
//  1. Session.AskTwins, before the first round: the receiver looks through the
//     memory of those shards and tells 32 bits of each page's hash;
//  2. Round.Pages leaves out a page whose hash may be among them;
//  3. Round.Close names it by its whole hash, with the copies (copies.go);
//  4. the receiver reads the other shard's page again, as that goes on running,
//     and keeps it if it has that hash;
//  5. what it has not, the sender sends.
//
// What was told holds for the next round: then both ends forget it.

// Twin is where a page of another shard is: its Sink's matter.
type Twin struct {
	Process int
	Addr    uint64
}

// Twins is what a Sink may be as well: one that has pages of other shards.
type Twins interface {
	// EachTwin calls found with at most limit pages of shards that are like the
	// one that comes. data is a page, and valid only during the call; an error of
	// found ends EachTwin and is returned. ctx ends with the connection.
	EachTwin(ctx context.Context, limit checkpoint.Pages, found func(at Twin, data []byte) error) error
	// ReadTwin fills dst, a page, with what is there now, whatever that is. An
	// error says only that there is nothing.
	ReadTwin(at Twin, dst []byte) error
}

// twins are the pages that a receiver has told of.
type twins struct {
	seed  uint64
	of    Twins
	at    map[uint32]Twin // by tag: at most wire.MaxTwins
	epoch uint64          // of the round that they are for; 0 before it
}

// AskTwins asks which pages the receiver has of shards like this one, which has
// so many pages, so that the next round need not send them. It returns how many
// there are. It is no error if the receiver cannot tell, a *RemoteError, for
// whoever can send them.
func (s *Session) AskTwins(ctx context.Context, pages checkpoint.Pages) (checkpoint.Pages, error) {
	tags, err := s.askTwins(ctx, min(pages, wire.MaxTwins))
	if err != nil {
		return 0, fmt.Errorf("pages of other shards on %s: %w", s.node, err)
	}
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	s.memory.twins = tags
	return checkpoint.Pages(len(tags)), nil
}

func (s *Session) askTwins(ctx context.Context, pages checkpoint.Pages) (map[uint32]struct{}, error) {
	links, err := s.usable()
	if err != nil {
		return nil, err
	}
	stream, err := links[0].conn.OpenStreamSync(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, linkError(err)
	}
	stop := abortOn(ctx, stream)
	tags, err := func() (map[uint32]struct{}, error) {
		if _, err := s.write(ctx, stream, wire.Ask{Seed: s.memory.seed, Pages: uint64(max(pages, 0))}.Append(nil)); err != nil {
			return nil, err
		}
		if err := stream.Close(); err != nil {
			return nil, err
		}
		return readTags(stream, pages)
	}()
	var remote *RemoteError
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.As(err, &remote):
	case violation(err) || cut(err):
		err = &RemoteError{Code: CodeProtocol, Text: err.Error()}
	case err != nil:
		return nil, linkError(err)
	}
	if err != nil {
		stream.CancelRead(streamAborted)
		return nil, err
	}
	stop()
	return tags, nil
}

// readTags reads what answers an Ask.
func readTags(r io.Reader, limit checkpoint.Pages) (map[uint32]struct{}, error) {
	br := bufio.NewReader(r)
	tags := map[uint32]struct{}{}
	var buf []byte
	for {
		t, body, grown, err := wire.ReadFrame(br, buf)
		if err != nil {
			return nil, unexpected(err)
		}
		buf = grown
		switch t {
		case wire.TypeHave:
			have, err := wire.ParseHave(body)
			if err != nil {
				return nil, err
			}
			for b := have.Tags; len(b) > 0; b = b[wire.TagLen:] {
				tags[binary.BigEndian.Uint32(b)] = struct{}{}
			}
			if len(tags) > int(limit) {
				return nil, fmt.Errorf("%d pages, asked for %d: %w", len(tags), limit, wire.ErrLimit)
			}
		case wire.TypeAnswer:
			answer, err := wire.ParseAnswer(body)
			switch {
			case err != nil:
				return nil, err
			case answer.Code != "":
				return nil, &RemoteError{Code: answer.Code, Text: answer.Text}
			case answer.Bytes != uint64(len(tags)):
				return nil, fmt.Errorf("%d pages, told of %d: %w", len(tags), answer.Bytes, wire.ErrMalformed)
			}
			return tags, nil
		default:
			return nil, fmt.Errorf("%v in place of pages: %w", t, wire.ErrMalformed)
		}
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
func (r *receiver) tell(ask wire.Ask, stream reply) (uint64, error) {
	of, ok := r.sink.(Twins)
	if !ok || ask.Pages == 0 {
		return 0, nil
	}
	if !r.in.asking.TryLock() {
		return 0, errAsked
	}
	defer r.in.asking.Unlock()
	found := &twins{seed: ask.Seed, of: of, at: map[uint32]Twin{}}
	tags := make([]byte, 0, wire.MaxTags*wire.TagLen)
	flush := func() error {
		if len(tags) == 0 {
			return nil
		}
		if err := stream.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
			return err
		}
		_, err := stream.Write(wire.Have{Tags: tags}.Append(nil))
		tags = tags[:0]
		return err
	}
	err := of.EachTwin(r.ctx, checkpoint.Pages(ask.Pages), func(at Twin, data []byte) error {
		if encoding.IsZero(data) || len(found.at) == int(ask.Pages) {
			return nil
		}
		tag := uint32(xxh3.Hash128Seed(data, ask.Seed).Lo)
		if _, have := found.at[tag]; have {
			return nil
		}
		found.at[tag] = at
		if tags = binary.BigEndian.AppendUint32(tags, tag); len(tags) == cap(tags) {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return 0, fmt.Errorf("pages of other shards: %w", err)
	}
	r.in.told(found)
	return uint64(len(found.at)), nil
}

// told keeps what the next round may refer to.
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
	at, ok := known.at[uint32(want.Lo)]
	return ok && known.of.ReadTwin(at, dst) == nil && xxh3.Hash128Seed(dst, seed) == want
}
