package migrate

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/s2"
	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/image"
	"github.com/tranship/tranship/checkpoint/track"
)

// Limits for an image directory that comes from another host. CRIU writes a few
// files a process; shared memory and ghost files are the large ones.
const (
	maxImageFiles = 1 << 20
	maxImageBytes = 1 << 40
)

// imageDigest is the xxh3 of the uncompressed archive; Seal compares it.
type imageDigest uint64

// sendImages writes the regular files of dir as an s2-compressed tar.
func sendImages(dir string, w io.Writer) (imageDigest, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, fmt.Errorf("send images: %w", err)
	}
	defer root.Close()
	sum := xxh3.New()
	compress := s2.NewWriter(w, s2.WriterConcurrency(1))
	archive := tar.NewWriter(io.MultiWriter(compress, sum))
	pages := newSentPages()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return 0, fmt.Errorf("send images: %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if err := addImage(root, archive, pages, e.Name()); err != nil {
			return 0, fmt.Errorf("send image %s: %w", e.Name(), err)
		}
	}
	if err := errors.Join(archive.Close(), compress.Close()); err != nil {
		return 0, fmt.Errorf("send images: %w", err)
	}
	return imageDigest(sum.Sum64()), nil
}

func addImage(root *os.Root, archive *tar.Writer, pages *sentPages, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if isPagesImage(name, fi.Size()) {
		return pages.addPages(archive, name, f)
	}
	hdr := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: fi.Size(), Format: tar.FormatPAX}
	if err := archive.WriteHeader(hdr); err != nil {
		return err
	}
	_, err = io.CopyN(archive, f, fi.Size())
	return err
}

// receiveImages writes what sendImages sent into dir. Only plain file names are
// accepted, each once.
func receiveImages(dir string, r io.Reader) (_ imageDigest, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, fmt.Errorf("receive images: %w", err)
	}
	defer root.Close()
	sum := xxh3.New()
	plain := io.TeeReader(s2.NewReader(r), sum)
	archive := tar.NewReader(plain)
	var pages gotPages
	defer func() { err = errors.Join(err, pages.close()) }()
	var total int64
	for n := 0; ; n++ {
		hdr, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("receive images: %w", err)
		}
		switch {
		case hdr.Typeflag != tar.TypeReg:
			return 0, fmt.Errorf("receive images: %q is not a regular file", hdr.Name)
		case !fs.ValidPath(hdr.Name) || hdr.Name == "." || hasSlash(hdr.Name):
			return 0, fmt.Errorf("receive images: %q is not a plain file name", hdr.Name)
		case n >= maxImageFiles || hdr.Size < 0 || hdr.Size > maxImageBytes-total:
			return 0, fmt.Errorf("receive images: more than %d files or %d bytes", maxImageFiles, int64(maxImageBytes))
		}
		length, err := takeImage(root, archive, hdr, &pages, maxImageBytes-total)
		if err != nil {
			return 0, fmt.Errorf("receive image %s: %w", hdr.Name, err)
		}
		total += length
	}
	// tar stops reading at its end marker; the digest and the stream's own
	// checksums cover the padding behind it too.
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return 0, fmt.Errorf("receive images: %w", err)
	}
	return imageDigest(sum.Sum64()), nil
}

func hasSlash(name string) bool {
	for _, c := range name {
		if c == '/' {
			return true
		}
	}
	return false
}

// takeImage writes one file and returns its length.
func takeImage(root *os.Root, r io.Reader, hdr *tar.Header, pages *gotPages, room int64) (int64, error) {
	f, err := root.OpenFile(hdr.Name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	if hdr.PAXRecords[pagesRecord] != "" {
		return pages.takePages(f, r, room)
	}
	n, err := io.Copy(f, r)
	if err == nil && n != hdr.Size {
		err = io.ErrUnexpectedEOF
	}
	return n, errors.Join(err, f.Close())
}

// parentDir holds the images that a dump is built on, beside its own.
const parentDir = "parent"

// writeParent makes CRIU believe that every page of these processes was dumped
// before. It returns what CRIU has to be told of it.
func writeParent(dir string, procs []checkpoint.Process) (string, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return "", fmt.Errorf("parent images: %w", err)
	}
	var pids []checkpoint.PID
	for _, p := range procs {
		pids = append(pids, p.PID)
	}
	return filepath.Join("..", parentDir), image.WriteParent(filepath.Join(dir, parentDir), pids, uint64(up.Nano()/1e3))
}

// settleImages makes a dump that was built on parentDir whole. CRIU must still
// hold the processes.
func settleImages(images string, procs []checkpoint.Process) error {
	hostPIDs := map[checkpoint.PID]int{}
	for _, p := range procs {
		hostPIDs[p.PID] = p.HostPID
	}
	_, err := image.Settle(images, func(pid checkpoint.PID, addr uint64, buf []byte) error {
		host, ok := hostPIDs[pid]
		if !ok {
			return fmt.Errorf("process %d was not there when the dump began", pid)
		}
		gone := false
		err := track.ReadMemory(host, addr, buf, func(uint64, checkpoint.Pages) { gone = true })
		if err == nil && gone {
			err = errors.New("not mapped any more")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("settle images: %w", err)
	}
	return nil
}

// mendImages changes, in a dump, what CRIU would restore wrong or not at all.
func mendImages(dir string) error {
	files := filepath.Join(dir, "files.img")
	if _, err := image.SettleLoopback(dir); err != nil {
		return fmt.Errorf("mend images: %w", err)
	}
	return mend(files, func(w io.Writer, r io.Reader) (bool, error) {
		n, err := image.RearmTimers(w, r)
		return n > 0, err
	})
}

// mend replaces an image if change says that it changed it.
func mend(path string, change func(io.Writer, io.Reader) (bool, error)) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("mend images: %w", err)
	}
	var mended bytes.Buffer
	changed, err := change(&mended, bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("mend %s: %w", path, err)
	}
	if !changed {
		return nil
	}
	if err := os.WriteFile(path, mended.Bytes(), 0o600); err != nil {
		return fmt.Errorf("mend images: %w", err)
	}
	return nil
}
