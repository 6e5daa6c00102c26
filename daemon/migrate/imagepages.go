package migrate

import (
	"archive/tar"
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
)

// Pages images of forked processes are mostly the same: the private pages of the
// same libraries. Each page is sent once, the others as where it was. An entry is
// the number of its runs, the runs (2n pages that are new, or 2n+1 and the number
// of the first of n that were sent before), then the new pages; all numbers are
// uvarints, and pages are counted over the whole archive.

const (
	// pagesRecord marks such an entry in its PAX header.
	pagesRecord = "TRANSHIP.pages"
	pagesPrefix = "pages-"
)

func isPagesImage(name string, size int64) bool {
	return strings.HasPrefix(name, pagesPrefix) && size%checkpoint.PageSize == 0
}

// pageRun is a run of pages of one image.
type pageRun struct {
	n     uint64
	first uint64 // number of the first of them in the archive
	known bool   // it was sent before
}

// sentPages knows what an archive has had so far.
type sentPages struct {
	seed  uint64
	seen  map[xxh3.Uint128]uint64
	count uint64
}

// newSentPages seeds the hash anew for each archive, so that nobody can prepare
// two pages that are taken for one.
func newSentPages() *sentPages {
	return &sentPages{seed: rand.Uint64(), seen: map[xxh3.Uint128]uint64{}}
}

// plan looks at all pages of an image.
func (s *sentPages) plan(r io.Reader) ([]pageRun, error) {
	var runs []pageRun
	buf := make([]byte, sharedChunk)
	for {
		n, err := io.ReadFull(r, buf)
		for at := 0; at+checkpoint.PageSize <= n; at += checkpoint.PageSize {
			hash := xxh3.Hash128Seed(buf[at:at+checkpoint.PageSize], s.seed)
			number, known := s.seen[hash]
			if !known {
				number = s.count
				s.seen[hash] = number
				s.count++
			}
			if k := len(runs); k > 0 && runs[k-1].known == known && runs[k-1].first+runs[k-1].n == number {
				runs[k-1].n++
				continue
			}
			runs = append(runs, pageRun{n: 1, first: number, known: known})
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return runs, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// addPages writes a pages image to the archive.
func (s *sentPages) addPages(archive *tar.Writer, name string, f *os.File) error {
	runs, err := s.plan(f)
	if err != nil {
		return err
	}
	head := binary.AppendUvarint(nil, uint64(len(runs)))
	size := int64(0)
	for _, r := range runs {
		if r.known {
			head = binary.AppendUvarint(head, r.n<<1|1)
			head = binary.AppendUvarint(head, r.first)
			continue
		}
		head = binary.AppendUvarint(head, r.n<<1)
		size += int64(r.n) * checkpoint.PageSize
	}
	hdr := &tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(head)) + size, Format: tar.FormatPAX,
		PAXRecords: map[string]string{pagesRecord: "1"},
	}
	if err := archive.WriteHeader(hdr); err != nil {
		return err
	}
	if _, err := archive.Write(head); err != nil {
		return err
	}
	at := int64(0)
	for _, r := range runs {
		length := int64(r.n) * checkpoint.PageSize
		if !r.known {
			if _, err := io.CopyN(archive, io.NewSectionReader(f, at, length), length); err != nil {
				return err
			}
		}
		at += length
	}
	return nil
}

// gotPages finds pages that an archive has had.
type gotPages struct {
	runs  []gotRun
	count uint64
	// files are open as long as the archive is read.
	files []*os.File
}

type gotRun struct {
	first, n uint64
	file     *os.File
	at       int64
}

func (g *gotPages) close() error {
	var errs []error
	for _, f := range g.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

var errPages = errors.New("a list of pages that is malformed")

// takePages writes a pages image to f, which it keeps, and returns its length;
// room is the most that it may have.
func (g *gotPages) takePages(f *os.File, r io.Reader, room int64) (int64, error) {
	g.files = append(g.files, f)
	br := bufio.NewReader(r)
	count, err := binary.ReadUvarint(br)
	if err != nil {
		return 0, err
	}
	var runs []pageRun // grows with what arrives, not with what is claimed
	var length int64
	for range count {
		v, err := binary.ReadUvarint(br)
		if err != nil {
			return 0, err
		}
		run := pageRun{n: v >> 1, known: v&1 == 1}
		if run.known {
			if run.first, err = binary.ReadUvarint(br); err != nil {
				return 0, err
			}
		}
		if run.n == 0 || run.n > uint64(room-length)/checkpoint.PageSize {
			return 0, errPages
		}
		length += int64(run.n) * checkpoint.PageSize
		runs = append(runs, run)
	}
	at := int64(0)
	for _, run := range runs {
		size := int64(run.n) * checkpoint.PageSize
		if run.known {
			err = g.copyTo(f, run.first, run.n)
		} else if _, err = io.CopyN(f, br, size); err == nil {
			g.runs = append(g.runs, gotRun{first: g.count, n: run.n, file: f, at: at})
			g.count += run.n
		}
		if err != nil {
			return 0, err
		}
		at += size
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
		return 0, errPages
	}
	return length, nil
}

// copyTo appends pages that came before.
func (g *gotPages) copyTo(f *os.File, first, n uint64) error {
	if first >= g.count || n > g.count-first {
		return errPages
	}
	i, _ := slices.BinarySearchFunc(g.runs, first, func(r gotRun, first uint64) int {
		if r.first+r.n <= first {
			return -1
		}
		return 1
	})
	for ; n > 0; i++ {
		r := g.runs[i]
		skip := first - r.first
		some := min(n, r.n-skip)
		size := int64(some) * checkpoint.PageSize
		if _, err := io.CopyN(f, io.NewSectionReader(r.file, r.at+int64(skip)*checkpoint.PageSize, size), size); err != nil {
			return fmt.Errorf("pages that came before: %w", err)
		}
		first, n = first+some, n-some
	}
	return nil
}
