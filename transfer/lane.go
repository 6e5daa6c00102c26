package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// answerTimeout is how long a receiver may take to say why it stopped reading:
// it has the answer ready when it stops.
const answerTimeout = 5 * time.Second

// lane carries a share of a round's batches over one stream.
type lane struct {
	r       *Round
	link    *link
	encoder *encoding.Encoder
	stream  *quic.Stream
	head    []byte
	tally   wire.Tally

	answered chan struct{} // closed when answer and err are set
	answer   wire.Answer
	err      error
}

// run sends batches until there are no more, and returns nil only when the
// receiver has applied all of them.
func (l *lane) run(epoch uint64, carry func(context.Context) error) error {
	ctx := l.r.ctx
	stream, err := l.link.conn.OpenStreamSync(ctx)
	if err != nil {
		close(l.answered)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return linkError(err)
	}
	l.stream = stream
	stop := abortOn(ctx, stream)
	l.r.lanes.Go(func() error {
		defer close(l.answered)
		l.answer, l.err = readAnswer(ctx, stream)
		return l.err
	})

	if err := l.write(wire.OpenRound{Epoch: epoch, Round: uint64(l.r.n)}.Append(nil)); err != nil {
		return l.broken(err)
	}
	if err := carry(ctx); err != nil {
		return l.broken(err)
	}
	if err := l.write(wire.EndRound{Tally: l.tally}.Append(nil)); err != nil {
		return l.broken(err)
	}
	if err := stream.Close(); err != nil {
		return l.broken(err)
	}
	<-l.answered // or reset, when ctx ends
	if l.err != nil {
		return l.err
	}
	// Missed says only how many of the copies were not made.
	applied := l.answer.Tally
	applied.Copies, applied.Missed = applied.Copies+applied.Missed, 0
	if applied != l.tally {
		return &RemoteError{Code: CodeProtocol, Text: fmt.Sprintf("applied %+v of %+v", l.answer.Tally, l.tally)}
	}
	stop()
	return nil
}

// carry encodes and sends batches until the round is closed.
func (l *lane) carry(ctx context.Context) error {
	for {
		select {
		case b, more := <-l.r.work:
			if !more {
				return nil
			}
			if err := l.send(b); err != nil {
				return err
			}
			b.segments, b.raw = b.segments[:0], b.raw[:0]
			l.r.free <- b // has room for every batch
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (l *lane) send(b *batch) error {
	frame := wire.Batch{Segments: b.segments}
	if len(b.raw) > 0 {
		frame.Block = seal(l.encoder, b.raw)
	}
	l.head = frame.AppendHead(l.head[:0])
	if err := l.write(l.head); err != nil {
		return err
	}
	if err := l.write(frame.Payload); err != nil {
		return err
	}
	whole := checkpoint.Pages(0)
	for _, s := range b.segments {
		switch {
		case s.Zero:
			l.tally.Zeros += uint64(s.Pages)
			continue
		case s.Delta == 0:
			whole += s.Pages
		}
		l.tally.Pages += uint64(s.Pages)
	}
	l.r.encoded[frame.Encoding].Add(int64(whole))
	l.tally.Batches++
	return nil
}

// seal encodes raw and adds its hash.
func seal(e *encoding.Encoder, raw []byte) wire.Block {
	kind, payload := e.Encode(raw)
	return wire.Block{Encoding: byte(kind), Sum: xxh3.Hash(raw), Raw: len(raw), Payload: payload}
}

func (l *lane) write(b []byte) error {
	n, err := l.r.s.write(l.r.ctx, l.stream, b)
	l.r.bytes.Add(int64(n))
	return err
}

// write sends b at the session's pace.
func (s *Session) write(ctx context.Context, stream *quic.Stream, b []byte) (sent int, err error) {
	s.link.enter(time.Now())
	defer func() { s.link.leave(time.Now(), sent) }()
	for len(b) > 0 {
		piece := b
		if size := s.pace.piece(); size > 0 && size < len(piece) {
			piece = piece[:size]
		}
		if err := s.pace.wait(ctx, len(piece)); err != nil {
			return sent, err
		}
		// The reset that ctx's end brings comes from another goroutine; nothing of a
		// later moment may go out before it, an end frame least of all.
		if ctx.Err() != nil {
			return sent, context.Cause(ctx)
		}
		n, err := stream.Write(piece)
		sent += n
		s.sent.Add(int64(n))
		if err != nil {
			return sent, err
		}
		b = b[len(piece):]
	}
	return sent, nil
}

func (l *lane) broken(err error) error { return broken(l.r.ctx, err, l.answered, &l.err) }

// broken finds the reason behind an error of writing to a stream or closing it.
// A receiver that stops reading has answered why, and a link that is lost ends
// the reading of the answer as well: so that is asked first.
func broken(ctx context.Context, err error, answered <-chan struct{}, answerErr *error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	timer := time.NewTimer(answerTimeout)
	defer timer.Stop()
	select {
	case <-answered:
		if *answerErr != nil {
			return *answerErr
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
	}
	return linkError(err)
}

// readAnswer reads the receiver's last word on a stream. ctx is the one that
// resets the stream.
func readAnswer(ctx context.Context, stream *quic.Stream) (wire.Answer, error) {
	answer, err := func() (wire.Answer, error) {
		t, body, err := readOne(stream)
		if err != nil {
			return wire.Answer{}, err
		}
		if t != wire.TypeAnswer {
			return wire.Answer{}, &RemoteError{Code: CodeProtocol, Text: fmt.Sprintf("%v in place of an answer", t)}
		}
		return wire.ParseAnswer(body)
	}()
	switch {
	case ctx.Err() != nil:
		return wire.Answer{}, context.Cause(ctx)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return wire.Answer{}, &RemoteError{Code: CodeCut, Text: "the peer ended a stream without an answer"}
	case violation(err):
		return wire.Answer{}, &RemoteError{Code: CodeProtocol, Text: err.Error()}
	case err != nil:
		return wire.Answer{}, linkError(err)
	case answer.Code != "":
		return wire.Answer{}, &RemoteError{Code: answer.Code, Text: answer.Text}
	}
	return answer, nil
}
