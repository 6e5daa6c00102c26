// Package image reads the CRIU images that tranship must understand: which
// pages a dump left out, how the memory is mapped, which processes there are,
// which files they hold. It is pure, it is no door to CRIU, and it trusts
// nothing: every length is bounded and no allocation follows a length that was
// only claimed.
//
// It refuses images with another magic, entries that are cut or that lack a
// required field, and values that no kernel could mean. It keeps file order.
//
// An image has no end mark. One that lost whole entries at its end cannot be
// told from a shorter one; whoever moves images must vouch for their length.
package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

var (
	// ErrMagic says that the image is of another kind than asked for.
	ErrMagic = errors.New("not a CRIU image of this kind")
	// ErrTruncated says that the image ends inside an entry, or before one that
	// it must have.
	ErrTruncated = errors.New("CRIU image cut short")
	// ErrMalformed says that an entry is not what CRIU writes.
	ErrMalformed = errors.New("malformed CRIU image")
	// ErrTooLarge says that a length or a count is beyond what tranship reads.
	ErrTooLarge = errors.New("CRIU image beyond the size limit")
)

// magic is the second word of an image, after commonMagic; alone in the
// inventory and in images of before version 1.1 (criu/include/magic.h).
type magic uint32

const (
	commonMagic  magic = 0x54564319
	serviceMagic magic = 0x55105940

	inventoryMagic magic = 0x58313116
	pstreeMagic    magic = 0x50273030
	pagemapMagic   magic = 0x56084025 // of tasks and of shared memory alike
	coreMagic      magic = 0x55053847
	idsMagic       magic = 0x54432030
	mmMagic        magic = 0x57492820
	filesMagic     magic = 0x56303138
	remapMagic     magic = 0x59133954
)

const (
	// maxEntry bounds one entry. The largest is mm's, with some 60 bytes a
	// mapping: this is room for a million of them, 16 times max_map_count.
	maxEntry = 64 << 20
	// maxEntries bounds the entries of an image: 64 GiB of which every other
	// page was touched, or as many open files.
	maxEntries = 16 << 20
)

// entryReader takes an image apart: u32 length, protobuf, and again.
type entryReader struct {
	src   io.Reader
	buf   bytes.Buffer
	count int
}

func openImage(r io.Reader, want magic) (*entryReader, error) {
	first, err := readMagic(r)
	if err != nil {
		return nil, err
	}
	if first == commonMagic || first == serviceMagic {
		if first, err = readMagic(r); err != nil {
			return nil, err
		}
	}
	if first != want {
		return nil, fmt.Errorf("%w: magic %#x, want %#x", ErrMagic, uint32(first), uint32(want))
	}
	return &entryReader{src: r}, nil
}

func readMagic(r io.Reader) (magic, error) {
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, ended(err, "its magic")
	}
	return magic(binary.LittleEndian.Uint32(b[:])), nil
}

// next returns the bytes of the next entry, valid until the next call, or
// io.EOF after the last.
func (e *entryReader) next() ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(e.src, head[:]); errors.Is(err, io.EOF) {
		return nil, io.EOF // not one byte: the regular end
	} else if err != nil {
		return nil, ended(err, "the length of an entry")
	}
	size := int64(binary.LittleEndian.Uint32(head[:]))
	if size > maxEntry {
		return nil, fmt.Errorf("%w: entry %d of %d bytes", ErrTooLarge, e.count, size)
	}
	if e.count++; e.count > maxEntries {
		return nil, fmt.Errorf("%w: more than %d entries", ErrTooLarge, maxEntries)
	}
	e.buf.Reset()
	if _, err := io.CopyN(&e.buf, e.src, size); err != nil {
		return nil, ended(err, "an entry")
	}
	return e.buf.Bytes(), nil
}

// only reads an image that has exactly one entry.
func (e *entryReader) only(m proto.Message) error {
	raw, err := e.next()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it has no entry", ErrTruncated)
	}
	if err != nil {
		return err
	}
	if err := unmarshal(raw, m); err != nil {
		return err
	}
	switch _, err := e.next(); {
	case err == nil:
		return fmt.Errorf("%w: more than one entry", ErrMalformed)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// each calls f for every entry.
func (e *entryReader) each(f func(raw []byte) error) error {
	for {
		raw, err := e.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f(raw); err != nil {
			return err
		}
	}
}

func unmarshal(raw []byte, m proto.Message) error {
	if err := proto.Unmarshal(raw, m); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

func ended(err error, where string) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: inside %s", ErrTruncated, where)
	}
	return fmt.Errorf("read CRIU image: %w", err)
}

// imageWriter writes what entryReader reads.
type imageWriter struct {
	dst io.Writer
	buf []byte
}

func newImage(w io.Writer, kind magic) (*imageWriter, error) {
	b := binary.LittleEndian.AppendUint32(nil, uint32(commonMagic))
	if kind == inventoryMagic {
		b = b[:0]
	}
	_, err := w.Write(binary.LittleEndian.AppendUint32(b, uint32(kind)))
	return &imageWriter{dst: w}, err
}

func (w *imageWriter) entry(raw []byte) error {
	if len(raw) > maxEntry {
		return fmt.Errorf("%w: entry of %d bytes", ErrTooLarge, len(raw))
	}
	w.buf = binary.LittleEndian.AppendUint32(w.buf[:0], uint32(len(raw)))
	w.buf = append(w.buf, raw...)
	_, err := w.dst.Write(w.buf)
	return err
}

func (w *imageWriter) message(m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return w.entry(raw)
}
