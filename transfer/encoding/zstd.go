package encoding

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// zstdWindow is how far back a frame may refer, and with it what a decoder
// keeps: a whole batch.
const zstdWindow = 256 << 10

// newZstdEncoder makes an encoder for single frames. Their xxh64 is left out:
// the batch has a hash of its own.
func newZstdEncoder() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // an option that does not exist
	}
	return e
}

// unzstd decodes one frame that says what was declared.
func (d *Decoder) unzstd(dst []byte, raw int, payload []byte) ([]byte, error) {
	var head zstd.Header
	switch err := head.Decode(payload); {
	case err != nil:
		return nil, fmt.Errorf("zstd frame (%w): %w", err, ErrCorrupt)
	case head.Skippable, head.DictionaryID != 0, !head.HasFCS, head.FrameContentSize != uint64(raw):
		return nil, fmt.Errorf("zstd frame of %d bytes, declared %d: %w", head.FrameContentSize, raw, ErrCorrupt)
	case head.WindowSize > zstdWindow:
		return nil, fmt.Errorf("zstd frame with a window of %d bytes: %w", head.WindowSize, ErrCorrupt)
	case cap(dst) < raw:
		return nil, fmt.Errorf("zstd frame of %d bytes for a buffer of %d: %w", raw, cap(dst), ErrCorrupt)
	}
	if d.zstd == nil {
		var err error
		d.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderMaxMemory(zstdWindow), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return nil, fmt.Errorf("zstd decoder: %w", err)
		}
	}
	out, err := d.zstd.DecodeAll(payload, dst[:0:raw])
	if err != nil {
		return nil, fmt.Errorf("zstd frame of %d bytes (%w): %w", raw, err, ErrCorrupt)
	}
	if len(out) != raw {
		return nil, fmt.Errorf("zstd frame of %d bytes, declared %d: %w", len(out), raw, ErrCorrupt)
	}
	return out, nil
}
