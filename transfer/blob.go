package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// blobSpace is the memory that sending a blob needs.
type blobSpace struct {
	raw     []byte
	head    []byte
	encoder encoding.Encoder
}

var blobSpaces = sync.Pool{New: func() any { return &blobSpace{raw: make([]byte, wire.MaxRaw)} }}

// Blob sends what r holds and returns when the receiver's Sink has taken all of
// it; a refusal comes back as a *RemoteError. size is -1 when it is not known;
// when it is, r must hold exactly that much. sent is what went into the stream.
// Blob cannot interrupt a Read of r: when ctx ends, it returns after that.
func (s *Session) Blob(ctx context.Context, kind, name string, size int64, r io.Reader) (sent int64, err error) {
	wrap := func(err error) error { return fmt.Errorf("blob %s %q to %s: %w", kind, name, s.node, err) }
	if kind == "" || len(kind) > wire.MaxKind || len(name) > wire.MaxName || size < -1 || wire.Clip(kind+name, len(kind+name)) != kind+name {
		return 0, wrap(errors.New("not a name and size of a blob"))
	}
	links, err := s.usable()
	if err != nil {
		return 0, wrap(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := links[s.turn.Add(1)%uint64(len(links))].conn.OpenStreamSync(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return 0, wrap(context.Cause(ctx))
		}
		return 0, wrap(linkError(err))
	}
	stop := abortOn(ctx, stream)

	// The answer may come early: a full disk is not told by writing on.
	answered := make(chan struct{})
	var answer wire.Answer
	var answerErr error
	go func() {
		defer close(answered)
		answer, answerErr = readAnswer(ctx, stream)
		if answerErr != nil {
			cancel(answerErr)
		}
	}()
	defer func() { <-answered }()

	space := blobSpaces.Get().(*blobSpace)
	defer func() {
		space.encoder.Choice = nil // of this session
		blobSpaces.Put(space)
	}()
	space.encoder.Reset()
	space.encoder.Off = s.opt.Compression == CompressOff
	space.encoder.Choice, space.encoder.Time = s.blobChoice, s.opt.encodeTime

	write := func(b []byte) error {
		n, err := s.write(ctx, stream, b)
		sent += int64(n)
		if err != nil {
			return broken(ctx, err, answered, &answerErr)
		}
		return nil
	}
	total, err := sendBlob(ctx, space, wire.OpenBlob{Kind: kind, Name: name, Size: size}, r, write)
	if err == nil {
		if err = stream.Close(); err != nil {
			err = broken(ctx, err, answered, &answerErr)
		}
	}
	if err != nil {
		cancel(err)
		return sent, wrap(context.Cause(ctx))
	}
	<-answered
	switch {
	case answerErr != nil:
		return sent, wrap(answerErr)
	case ctx.Err() != nil:
		return sent, wrap(context.Cause(ctx))
	case answer.Bytes != total:
		return sent, wrap(&RemoteError{Code: CodeProtocol, Text: fmt.Sprintf("took %d of %d bytes", answer.Bytes, total)})
	}
	stop()
	s.mu.Lock()
	s.stats.BytesRaw += checkpoint.Bytes(total)
	s.mu.Unlock()
	return sent, nil
}

// sendBlob writes a blob's frames.
func sendBlob(ctx context.Context, space *blobSpace, open wire.OpenBlob, r io.Reader, write func([]byte) error) (total uint64, err error) {
	if err := write(open.Append(nil)); err != nil {
		return 0, err
	}
	for {
		if ctx.Err() != nil {
			return total, context.Cause(ctx)
		}
		n, err := io.ReadFull(r, space.raw)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return total, fmt.Errorf("after %d bytes: %w", total, err)
		}
		last := err != nil
		total += uint64(n)
		if open.Size >= 0 && (total > uint64(open.Size) || last && total < uint64(open.Size)) {
			return total, fmt.Errorf("%d bytes, declared %d", total, open.Size)
		}
		if n > 0 {
			block := seal(&space.encoder, space.raw[:n])
			space.head = block.AppendHead(space.head[:0])
			if err := write(space.head); err != nil {
				return total, err
			}
			if err := write(block.Payload); err != nil {
				return total, err
			}
		}
		if last {
			return total, write(wire.EndBlob{Bytes: total}.Append(nil))
		}
	}
}
