package pagestore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"github.com/tranship/tranship/checkpoint"
)

// placedRecord is a sparse bitmap file, one bit a page, of the pages that were
// placed under the restored process and given back. It is what tells a hole
// that was always a zero page from one that a release left behind.
//
// What a set bit means to a server that starts again: the page's content is
// nowhere but in the process. If that page faults nevertheless, the process
// gave it up itself (MADV_DONTNEED, MADV_FREE, or munmap and a new mapping),
// and zero is right; but only the server that saw those events may say so.
// Therefore the store answers ErrReleased and leaves the verdict to it.
type placedRecord struct {
	path string
	// used is set before the first bit is written and never unset.
	used atomic.Bool

	mu   sync.Mutex // guards file and the bytes shared by neighbouring pages
	file *os.File
}

// pagesPerByte pages share a byte of the record.
const pagesPerByte = 8

// recordChunk bounds the buffer of one add or lookup: 1 GiB of pages.
const recordChunk = 32 << 10

// find opens the record if there is one by now: another process may release
// what this one reads.
func (r *placedRecord) find() error {
	if r.any() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.openFile(0)
}

func (r *placedRecord) openFile(flags int) error {
	if r.file != nil {
		return nil
	}
	f, err := os.OpenFile(r.path, os.O_RDWR|flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record of placed pages: %w", err)
	}
	r.file = f
	r.used.Store(true)
	return nil
}

// any reports whether a page was ever released, as far as this process knows.
func (r *placedRecord) any() bool { return r.used.Load() }

func (r *placedRecord) add(addr uint64, n checkpoint.Pages) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.openFile(os.O_CREATE); err != nil {
		return err
	}
	return r.each(addr, n, func(buf []byte, first, last uint64, at int64) error {
		for i := first; i < last; i++ {
			buf[i/pagesPerByte] |= 1 << (i % pagesPerByte)
		}
		_, err := r.file.WriteAt(buf, at)
		return err
	})
}

func (r *placedRecord) contains(addr uint64, n checkpoint.Pages) (bool, error) {
	if err := r.find(); err != nil || !r.any() {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	found := false
	err := r.each(addr, n, func(buf []byte, first, last uint64, _ int64) error {
		for i := first; i < last && !found; i++ {
			found = buf[i/pagesPerByte]&(1<<(i%pagesPerByte)) != 0
		}
		return nil
	})
	return found, err
}

// runs visits the runs of n pages at addr that are in the record, or that are
// not. visit is called without the lock.
func (r *placedRecord) runs(addr uint64, n checkpoint.Pages, in bool, visit func(addr uint64, n checkpoint.Pages) error) error {
	var found []pageRun
	r.mu.Lock()
	err := r.each(addr, n, func(buf []byte, first, last uint64, at int64) error {
		for i := first; i < last; i++ {
			if in != (buf[i/pagesPerByte]&(1<<(i%pagesPerByte)) != 0) {
				continue
			}
			page := uint64(at)*pagesPerByte + i
			if k := len(found); k > 0 && found[k-1].to == page {
				found[k-1].to++
			} else {
				found = append(found, pageRun{page, page + 1})
			}
		}
		return nil
	})
	r.mu.Unlock()
	if err != nil {
		return err
	}
	for _, run := range found {
		if err := visit(run.from*checkpoint.PageSize, checkpoint.Pages(run.to-run.from)); err != nil {
			return err
		}
	}
	return nil
}

// each reads the part of the record that covers n pages at addr, in bounded
// pieces; first and last count pages from the start of buf, which lies at
// offset at.
func (r *placedRecord) each(addr uint64, n checkpoint.Pages, visit func(buf []byte, first, last uint64, at int64) error) error {
	page := addr / checkpoint.PageSize
	end := page + uint64(n)
	for page < end {
		at := page / pagesPerByte
		last := min(end, (at+recordChunk)*pagesPerByte)
		buf := make([]byte, (last+pagesPerByte-1)/pagesPerByte-at)
		if _, err := readAt(r.file, buf, int64(at)); err != nil {
			return fmt.Errorf("record of placed pages: %w", err)
		}
		if err := visit(buf, page-at*pagesPerByte, last-at*pagesPerByte, int64(at)); err != nil {
			return fmt.Errorf("record of placed pages: %w", err)
		}
		page = last
	}
	return nil
}

func (r *placedRecord) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}

// readAt reads what the file has; the rest of dst is left as it was.
func readAt(f *os.File, dst []byte, off int64) (int, error) {
	n, err := f.ReadAt(dst, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}
