package transfer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// receiver serves the streams of one connection. What arrives goes
//  1. through ReadFrame, which knows the largest frame,
//  2. through the frame's Parse, which knows what it may say,
//  3. through Decode, into a buffer that was there before, and its hash,
//  4. to the Sink, segment by segment, and
//  5. into the tally that must equal the sender's before it is answered.
type receiver struct {
	ctx  context.Context // ends with conn
	in   *inbound
	sink Sink
	conn *quic.Conn
	log  *slog.Logger
}

// reply is the way back of a stream.
type reply interface {
	io.Writer
	SetWriteDeadline(time.Time) error
	Context() context.Context // ends when the peer will read no more
}

// workspace is the memory that one stream needs.
type workspace struct {
	br    *bufio.Reader
	frame []byte
	raw   []byte
	pages []byte // that deltas are applied to
	batch wire.Batch
	// decoder keeps at most a batch's window, and that only once zstd came.
	decoder encoding.Decoder
}

// deltaPages is how many neighbours are read together to apply deltas.
const deltaPages = 16

// workspaces are at most maxStreams a connection.
var workspaces = sync.Pool{New: func() any {
	return &workspace{
		br:    bufio.NewReaderSize(nil, 4<<10),
		frame: make([]byte, 0, wire.MaxBody),
		raw:   make([]byte, wire.MaxRaw),
		pages: make([]byte, deltaPages*checkpoint.PageSize),
	}
}}

func (w *workspace) next() (wire.Type, []byte, error) {
	t, body, grown, err := wire.ReadFrame(w.br, w.frame)
	w.frame = grown
	return t, body, err
}

// content decodes a block and compares its hash.
func (w *workspace) content(k wire.Block) ([]byte, error) {
	raw, err := w.decoder.Decode(w.raw, encoding.Kind(k.Encoding), k.Raw, k.Payload)
	if err != nil {
		return nil, err
	}
	if sum := xxh3.Hash(raw); sum != k.Sum {
		return nil, &RemoteError{Code: CodeCorrupt, Text: fmt.Sprintf("%d bytes arrived with hash %#x, not %#x", len(raw), sum, k.Sum)}
	}
	return raw, nil
}

// end makes sure that a stream says nothing after its last frame.
func (w *workspace) end() error {
	switch _, err := w.br.ReadByte(); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("bytes after the last frame: %w", wire.ErrMalformed)
	default:
		return err
	}
}

// serve serves one stream and answers it.
func (r *receiver) serve(stream *quic.Stream) {
	w := workspaces.Get().(*workspace)
	w.br.Reset(stream)
	defer func() {
		w.br.Reset(nil)
		workspaces.Put(w)
	}()
	answer, err := r.take(w, stream)
	switch {
	case err == nil:
	case errors.Is(err, errStale):
		r.log.Debug("stale stream dropped")
		stream.CancelRead(streamAborted)
		stream.CancelWrite(streamAborted)
		return
	case violation(err):
		r.violated(err)
		return
	default:
		// Of a link that is lost, or a stream that the sender reset, nobody hears
		// this answer; a Sink's error the sender must hear.
		code := CodeSink
		if cut(err) {
			code = CodeCut
		}
		answer.Code, answer.Text = asRemote(err, code)
		r.log.Debug("stream not applied", "code", answer.Code, "err", err)
		stream.CancelRead(streamAborted)
	}
	if err := r.answer(stream, answer); err != nil {
		r.log.Debug("stream not answered", "err", err)
	}
}

func (r *receiver) answer(stream *quic.Stream, answer wire.Answer) error {
	if err := stream.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if _, err := stream.Write(answer.Append(nil)); err != nil {
		stream.CancelWrite(streamAborted)
		return err
	}
	return stream.Close()
}

// violated ends the connection of a peer that does not follow the protocol.
func (r *receiver) violated(err error) {
	r.log.Warn("connection closed: the peer broke the transfer protocol", "err", err)
	r.conn.CloseWithError(codeProtocol, wire.Clip(err.Error(), 256))
}

func (r *receiver) take(w *workspace, stream reply) (wire.Answer, error) {
	t, body, err := w.next()
	if err != nil {
		return wire.Answer{}, unexpected(err)
	}
	switch t {
	case wire.TypeOpenRound:
		open, err := wire.ParseOpenRound(body)
		if err != nil {
			return wire.Answer{}, err
		}
		if err := r.in.enterRound(r.ctx, open.Epoch); err != nil {
			return wire.Answer{}, err
		}
		defer r.in.leaveRound()
		return r.pages(w)
	case wire.TypeOpenBlob:
		open, err := wire.ParseOpenBlob(body)
		if err != nil {
			return wire.Answer{}, err
		}
		n, err := r.blob(w, open)
		return wire.Answer{Bytes: n}, err
	case wire.TypeAsk:
		ask, err := wire.ParseAsk(body)
		if err == nil {
			err = w.end()
		}
		if err != nil {
			return wire.Answer{}, err
		}
		n, err := r.tell(ask, stream)
		return wire.Answer{Bytes: n}, err
	}
	return wire.Answer{}, fmt.Errorf("%v at the beginning of a stream: %w", t, wire.ErrMalformed)
}

// pages applies one stream of a round.
func (r *receiver) pages(w *workspace) (wire.Answer, error) {
	var done wire.Answer
	for {
		t, body, err := w.next()
		if err != nil {
			return done, unexpected(err)
		}
		switch t {
		case wire.TypeBatch:
			if err := w.batch.Parse(body); err != nil {
				return done, err
			}
			if err := r.apply(w, &done.Tally); err != nil {
				return done, err
			}
		case wire.TypeCopies:
			copies, err := wire.ParseCopies(body)
			if err != nil {
				return done, err
			}
			if err := r.copyPages(w, copies, &done); err != nil {
				return done, err
			}
		case wire.TypeEndRound:
			end, err := wire.ParseEndRound(body)
			if err != nil {
				return done, err
			}
			tally := done.Tally
			tally.Copies, tally.Missed = tally.Copies+tally.Missed, 0
			if end.Tally != tally {
				return done, &RemoteError{Code: CodeCorrupt, Text: fmt.Sprintf("applied %+v of %+v", done.Tally, end.Tally)}
			}
			return done, w.end()
		default:
			return done, fmt.Errorf("%v in a stream of pages: %w", t, wire.ErrMalformed)
		}
	}
}

func (r *receiver) apply(w *workspace, tally *wire.Tally) error {
	var content []byte
	if w.batch.Raw > 0 {
		var err error
		if content, err = w.content(w.batch.Block); err != nil {
			return err
		}
	}
	for _, s := range w.batch.Segments {
		if s.Zero {
			if err := r.sink.ZeroPages(s.PID, s.Addr, s.Pages); err != nil {
				return fmt.Errorf("pid %d %#x+%d zero: %w", s.PID, s.Addr, s.Pages, err)
			}
			tally.Zeros += uint64(s.Pages)
			continue
		}
		if s.Delta > 0 {
			if err := r.applyDeltas(w, s, content[:s.Delta:s.Delta]); err != nil {
				return err
			}
			content = content[s.Delta:]
			tally.Pages += uint64(s.Pages)
			continue
		}
		n := int(s.Pages) * checkpoint.PageSize
		if err := r.sink.PutPages(s.PID, s.Addr, content[:n:n]); err != nil {
			return fmt.Errorf("pid %d %#x+%d pages: %w", s.PID, s.Addr, s.Pages, err)
		}
		content = content[n:]
		tally.Pages += uint64(s.Pages)
	}
	tally.Batches++
	return nil
}

// applyDeltas makes pages of those that the Sink has. What does not come out with
// its hash is not stored: the sender takes the round for broken and sends its
// pages whole.
func (r *receiver) applyDeltas(w *workspace, s wire.Segment, deltas []byte) error {
	for addr, end := s.Addr, s.End(); addr < end; {
		pages := w.pages[:min(uint64(len(w.pages)), end-addr)]
		if err := r.sink.ReadPages(s.PID, addr, pages); err != nil {
			return fmt.Errorf("pid %d %#x+%d pages to change: %w", s.PID, addr, len(pages)/checkpoint.PageSize, err)
		}
		for at := 0; at < len(pages); at += checkpoint.PageSize {
			var err error
			deltas, err = encoding.ApplyDelta(pages[at:at+checkpoint.PageSize], deltas)
			if errors.Is(err, encoding.ErrBase) {
				return &RemoteError{Code: CodeCorrupt, Text: fmt.Sprintf("pid %d %#x: %v", s.PID, addr+uint64(at), err)}
			}
			if err != nil {
				return fmt.Errorf("pid %d %#x: %w", s.PID, addr+uint64(at), err)
			}
		}
		if addr += uint64(len(pages)); addr == end && len(deltas) > 0 {
			return fmt.Errorf("%d bytes after the deltas of a segment: %w", len(deltas), wire.ErrMalformed)
		}
		if err := r.sink.PutPages(s.PID, addr-uint64(len(pages)), pages); err != nil {
			return fmt.Errorf("pid %d %#x+%d changed pages: %w", s.PID, addr-uint64(len(pages)), len(pages)/checkpoint.PageSize, err)
		}
	}
	return nil
}

// copyPages puts pages that the Sink has elsewhere, or another shard has. One that
// is otherwise there is left out and marked: the sender then sends it.
func (r *receiver) copyPages(w *workspace, c wire.Copies, done *wire.Answer) error {
	page := w.pages[:checkpoint.PageSize]
	sums := c.Sums
	for _, run := range c.Runs {
		for i := range run.Pages {
			want := xxh3.Uint128{Hi: binary.BigEndian.Uint64(sums), Lo: binary.BigEndian.Uint64(sums[8:])}
			sums = sums[16:]
			offset := uint64(i.Bytes())
			is := false
			if run.Twin() {
				is = r.in.readTwin(c.Seed, want, page)
			} else {
				if err := r.sink.ReadPages(run.FromPID, run.From+offset, page); err != nil {
					return fmt.Errorf("pid %d %#x to copy: %w", run.FromPID, run.From+offset, err)
				}
				is = xxh3.Hash128Seed(page, c.Seed) == want
			}
			if !is {
				if err := miss(done); err != nil {
					return err
				}
				continue
			}
			if err := r.sink.PutPages(run.PID, run.Addr+offset, page); err != nil {
				return fmt.Errorf("pid %d %#x copied: %w", run.PID, run.Addr+offset, err)
			}
			done.Copies++
		}
	}
	return nil
}

// miss marks the next copy as one that was not made.
func miss(done *wire.Answer) error {
	at := done.Copies + done.Missed
	if at/8 >= wire.MaxMissing {
		return fmt.Errorf("%d copies in a stream: %w", at+1, wire.ErrLimit)
	}
	for uint64(len(done.Missing)) <= at/8 {
		done.Missing = append(done.Missing, 0)
	}
	done.Missing[at/8] |= 1 << (at % 8)
	done.Missed++
	return nil
}

// blob hands a blob to the Sink.
func (r *receiver) blob(w *workspace, open wire.OpenBlob) (uint64, error) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	reader := &blobReader{w: w, size: open.Size}
	err := r.sink.Blob(ctx, open.Kind, open.Name, open.Size, reader)
	if err == nil && reader.err == nil && len(reader.rest) == 0 {
		// A Sink that counted to size has read all, but for the end.
		reader.rest, reader.err = reader.block()
	}
	switch {
	case reader.err != nil && !errors.Is(reader.err, io.EOF):
		// Whatever the Sink made of it, this is why.
		return reader.n, fmt.Errorf("blob %s %q: %w", open.Kind, open.Name, reader.err)
	case err != nil:
		return reader.n, fmt.Errorf("blob %s %q: %w", open.Kind, open.Name, err)
	case reader.err == nil:
		return reader.n, fmt.Errorf("blob %s %q: the sink stopped reading after %d bytes", open.Kind, open.Name, reader.n)
	}
	return reader.n, nil
}

// blobReader is a blob as its Sink reads it.
type blobReader struct {
	w    *workspace
	size int64
	n    uint64 // bytes of the blocks so far
	rest []byte // of the last block
	err  error  // sticky; io.EOF only when the blob is whole
}

func (b *blobReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(b.rest) == 0 && b.err == nil {
		b.rest, b.err = b.block()
	}
	if len(b.rest) == 0 {
		return 0, b.err
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *blobReader) block() ([]byte, error) {
	t, body, err := b.w.next()
	if err != nil {
		return nil, unexpected(err)
	}
	switch t {
	case wire.TypeBlock:
		block, err := wire.ParseBlock(body)
		if err != nil {
			return nil, err
		}
		raw, err := b.w.content(block)
		if err != nil {
			return nil, err
		}
		b.n += uint64(len(raw))
		if b.size >= 0 && b.n > uint64(b.size) {
			return nil, fmt.Errorf("%d bytes of %d: %w", b.n, b.size, wire.ErrLimit)
		}
		return raw, nil
	case wire.TypeEndBlob:
		end, err := wire.ParseEndBlob(body)
		if err != nil {
			return nil, err
		}
		if end.Bytes != b.n || b.size >= 0 && b.n != uint64(b.size) {
			return nil, fmt.Errorf("%d bytes arrived, %d were sent, %d declared: %w", b.n, end.Bytes, b.size, wire.ErrMalformed)
		}
		if err := b.w.end(); err != nil {
			return nil, err
		}
		return nil, io.EOF
	}
	return nil, fmt.Errorf("%v in a blob: %w", t, wire.ErrMalformed)
}

// readOne reads the single small frame of a stream that carries no more. It
// reads the stream's end as well: without that the stream would count as open
// as long as the connection.
func readOne(r io.Reader) (wire.Type, []byte, error) {
	br := byteReader{r}
	t, body, _, err := wire.ReadFrame(br, nil)
	if err != nil {
		return 0, nil, unexpected(err)
	}
	switch _, err := br.ReadByte(); {
	case errors.Is(err, io.EOF):
		return t, body, nil
	case err == nil:
		return 0, nil, fmt.Errorf("bytes after %v: %w", t, wire.ErrMalformed)
	default:
		return 0, nil, err
	}
}

// byteReader reads no byte further than it is asked for.
type byteReader struct{ io.Reader }

func (b byteReader) ReadByte() (byte, error) {
	var one [1]byte
	_, err := io.ReadFull(b.Reader, one[:])
	return one[0], err
}
