package image

import (
	"bufio"
	"fmt"
	"io"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tranship/tranship/checkpoint"
)

// Flags of a run (criu/include/pagemap.h).
type Flags uint32

// What is where: in the parent's images, left to be placed lazily, in the
// pages image that belongs to this pagemap. A dump that writes everything marks
// the pages that could have been left out with Lazy and Present both.
const (
	Parent  Flags = 1 << 0
	Lazy    Flags = 1 << 1
	Present Flags = 1 << 2
)

// Run is a run of pages with the same fate. In a pagemap of shared memory Addr
// is an offset in the segment.
type Run struct {
	Addr  uint64
	Pages checkpoint.Pages
	Flags Flags
}

// End returns the address after the last byte.
func (r Run) End() uint64 { return r.Addr + uint64(r.Pages)*checkpoint.PageSize }

// Pagemap is pagemap-<pid>.img or pagemap-shmem-<id>.img.
type Pagemap struct {
	// PagesID names pages-<id>.img, in which the Present runs stand in order.
	PagesID uint32
	Runs    []Run
}

// maxAddr is beyond what any platform maps for a process; it also keeps sums
// of addresses and sizes far from wrapping around.
const maxAddr = 1 << 62

// ReadPagemap reads both forms of entries. CRIU 4.2 writes the number of pages
// as a 64-bit field of its own and leaves the old one zero, so that the types of
// go-criu 7.2, which know only that, decode its images as empty; hence by hand.
func ReadPagemap(r io.Reader) (Pagemap, error) {
	var p Pagemap
	err := eachRun(r, func(id uint32) error { p.PagesID = id; return nil }, func(run Run) error {
		p.Runs = append(p.Runs, run)
		return nil
	})
	if err != nil {
		return Pagemap{}, fmt.Errorf("pagemap: %w", err)
	}
	return p, nil
}

// eachRun calls head with the id of the pages image, then run for every run.
func eachRun(r io.Reader, head func(pagesID uint32) error, run func(Run) error) error {
	img, err := openImage(bufio.NewReader(r), pagemapMagic)
	if err != nil {
		return err
	}
	hasHead := false
	err = img.each(func(raw []byte) error {
		if !hasHead {
			hasHead = true
			var id uint32
			err := fields(raw, func(f field) error {
				if f.num == 1 {
					id = uint32(f.value)
				}
				return nil
			}, 1)
			if err != nil {
				return err
			}
			return head(id)
		}
		next, err := parseRun(raw)
		if err != nil {
			return err
		}
		return run(next)
	})
	if err == nil && !hasHead {
		err = fmt.Errorf("%w: it has no head", ErrTruncated)
	}
	return err
}

func parseRun(raw []byte) (Run, error) {
	var (
		run                 Run
		compat, pages       uint64
		inParent            bool
		hasPages, hasCompat bool
		hasFlags            bool
	)
	err := fields(raw, func(f field) error {
		switch f.num {
		case 1:
			run.Addr = f.value
		case 2:
			compat, hasCompat = f.value, true
		case 3:
			inParent = f.value != 0
		case 4:
			run.Flags, hasFlags = Flags(f.value), true
		case 5:
			pages, hasPages = f.value, true
		}
		return nil
	}, 1)
	if err != nil {
		return run, err
	}
	if !hasPages {
		if !hasCompat {
			return run, malformed("run without a number of pages")
		}
		pages = compat & math.MaxUint32
	}
	// The order of criu/pagemap.c: in_parent adds to flags, and without either
	// the pages are in the image.
	switch {
	case inParent:
		run.Flags |= Parent
	case !hasFlags:
		run.Flags = Present
	}
	if run.Addr%checkpoint.PageSize != 0 || run.Addr >= maxAddr || pages == 0 || pages > (maxAddr-run.Addr)/checkpoint.PageSize {
		return run, malformed("run of %d pages at %#x", pages, run.Addr)
	}
	run.Pages = checkpoint.Pages(pages)
	return run, nil
}

// WritePagemap writes the form of CRIU 4.2.
func WritePagemap(w io.Writer, p Pagemap) error { return writePagemap(w, p, false) }

// writePagemap can also write what every CRIU reads.
func writePagemap(w io.Writer, p Pagemap, compatible bool) error {
	buffered := bufio.NewWriter(w)
	img, err := newImage(buffered, pagemapMagic)
	if err != nil {
		return fmt.Errorf("write pagemap: %w", err)
	}
	if err := img.entry(appendVarint(nil, 1, uint64(p.PagesID))); err != nil {
		return fmt.Errorf("write pagemap: %w", err)
	}
	var b []byte
	for _, run := range p.Runs {
		b = appendRun(b[:0], run, compatible)
		if err := img.entry(b); err != nil {
			return fmt.Errorf("write pagemap: %w", err)
		}
	}
	if err := buffered.Flush(); err != nil {
		return fmt.Errorf("write pagemap: %w", err)
	}
	return nil
}

func appendRun(b []byte, run Run, compatible bool) []byte {
	b = appendVarint(b, 1, run.Addr)
	if compatible {
		b = appendVarint(b, 2, uint64(run.Pages))
	} else {
		b = appendVarint(b, 2, 0) // required, and zero as CRIU has it
	}
	b = appendVarint(b, 4, uint64(run.Flags))
	return appendVarint(b, 5, uint64(run.Pages))
}

func appendVarint(b []byte, num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

// field is one field of a message; value for numbers, bytes for the rest.
type field struct {
	num   protowire.Number
	value uint64
	bytes []byte
}

// fields calls f for each field of an encoded message. The required ones must
// be there, as numbers. It is used where the types of go-criu are older than
// what CRIU writes, or would pull in a dozen others.
func fields(raw []byte, f func(field) error, required ...protowire.Number) error {
	var seen uint64
	for len(raw) > 0 {
		num, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return malformed("%v", protowire.ParseError(n))
		}
		raw = raw[n:]
		fd := field{num: num}
		switch kind {
		case protowire.VarintType:
			fd.value, n = protowire.ConsumeVarint(raw)
		case protowire.BytesType:
			fd.bytes, n = protowire.ConsumeBytes(raw)
		default:
			n = protowire.ConsumeFieldValue(num, kind, raw)
		}
		if n < 0 {
			return malformed("%v", protowire.ParseError(n))
		}
		raw = raw[n:]
		if num < 64 && kind == protowire.VarintType {
			seen |= 1 << num
		}
		if err := f(fd); err != nil {
			return err
		}
	}
	for _, num := range required {
		if seen&(1<<num) == 0 {
			return malformed("field %d is missing", num)
		}
	}
	return nil
}
