// Package layer copies a shard's writable layer, the overlay upper directory of
// its snapshot, to another host: once or more while the shard runs, and a last
// time, exactly, while it is frozen. It owns the comparison with what was sent,
// the stream and its application; it knows no container runtime and no network.
//
// Flow: walk reads the tree without opening files, plan says what goes, what
// stays and which names share an inode, Send writes the differences, Apply
// makes them at the destination's upper directory, which nobody has mounted.
//
// It refuses layers with other file systems mounted inside, a stream that does
// not fit what the destination holds, and a stream without its end.
package layer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// ErrChanging says that the layer changed under a pass that was promised a
// frozen one.
var ErrChanging = errors.New("the layer changes although its shard is frozen")

// ErrBase says that a stream of changes does not fit what the destination
// holds. A stream of everything (since == nil) does.
var ErrBase = errors.New("the destination does not hold what the stream builds on")

// ErrBusy says that the directory is already being written to by an Apply.
var ErrBusy = errors.New("another stream is being applied there")

// markerXattr, on the layer's root, says what was applied: "done:ID", or
// "part:BASE:ID" while a stream is being applied. It stays at the destination
// and never travels.
const markerXattr = "trusted.tranship.layer"

// Options of one Send.
type Options struct {
	// Frozen says that nothing of the shard runs. Anything that changes or
	// vanishes under the pass is then ErrChanging instead of left to the next.
	Frozen bool

	// AlwaysCompare lists files, as paths inside the layer, that a process of
	// the shard has mapped shared and writable. Their content is compared even
	// if their times stand still: the first write to a clean page of a mapping
	// moves ctime, later ones to the same page do not. What is listed is
	// compared in this pass and, without being listed again, in the next one,
	// which covers mappings that go away in between. Files that are not in the
	// upper directory are ignored.
	//
	// A tmpfs does not even move ctime at the first write if the page was read
	// before. There, a mapping that comes and goes between two passes, never
	// listed, can hide a write.
	AlwaysCompare []string

	// CompareAll compares the content of every file, whatever its times: right
	// for a tmpfs, whose content is memory.
	CompareAll bool

	// ListedAt is when the caller began to collect AlwaysCompare; zero is the
	// call of Send. Files that changed since then are compared again in the
	// next pass, because a mapping may have been made after the list.
	ListedAt time.Time
}

// Stats counts what a pass did.
type Stats struct {
	// Files counts paths in the layer, whether or not they were sent.
	Files int
	// Entries, Removals and Links count frames of these kinds.
	Entries, Removals, Links int
	// Compared counts regular files whose content was read.
	Compared int
	// Unsteady counts paths that changed under a running pass and are left to
	// the next one.
	Unsteady int
	// Data is file content, Wire what it and all else took in the stream.
	Data, Wire checkpoint.Bytes
}

// Scan walks a layer without reading contents, for pre-flight: how many files,
// how many bytes. Its Index is no base for Send, because nobody holds what it
// describes.
func Scan(ctx context.Context, upper string) (*Index, error) {
	root, err := openRoot(upper)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	tree, err := walk(ctx, root, false)
	if err != nil {
		return nil, fmt.Errorf("scan layer %s: %w", upper, err)
	}
	return &Index{root: tree.root, files: tree.files}, nil
}

// Send writes to w a stream of what changed in upper since an earlier pass, or
// everything if since is nil, and returns the index of what the destination
// holds once it has applied the stream. It does not close w; it does not buffer
// more than some MiB; a blocked Write is the caller's to interrupt.
//
// After an error there is no index, and unless w never got anything, only a
// stream of everything fits the destination.
func Send(ctx context.Context, upper string, since *Index, w io.Writer, opt Options) (*Index, Stats, error) {
	if since != nil && since.id == (passID{}) {
		return nil, Stats{}, fmt.Errorf("send layer %s since a scan: %w", upper, ErrBase)
	}
	index, stats, err := send(ctx, upper, since, w, opt)
	if err != nil {
		return nil, stats, fmt.Errorf("send layer %s: %w", upper, err)
	}
	return index, stats, nil
}

func send(ctx context.Context, upper string, since *Index, w io.Writer, opt Options) (_ *Index, stats Stats, err error) {
	began := time.Now()
	root, err := openRoot(upper)
	if err != nil {
		return nil, stats, err
	}
	defer root.Close()

	// 1. What is there.
	tree, err := walk(ctx, root, opt.Frozen)
	if err != nil {
		return nil, stats, err
	}
	stats.Unsteady = tree.unsteady

	// 2. What that means for the destination. Nothing is read yet.
	if since == nil {
		since = &Index{}
	}
	next := &Index{root: tree.root, nextObject: since.nextObject}
	if _, err := rand.Read(next.id[:]); err != nil {
		return nil, stats, fmt.Errorf("name the pass: %w", err)
	}
	compare := opt.AlwaysCompare
	if opt.CompareAll {
		compare = next.regularFiles()
	}
	todo := plan(since, next, compare)

	// 3. Removals, entries with their contents, links, end.
	out := &countingWriter{dst: w}
	pressed := s2.NewWriter(out, s2.WriterConcurrency(2), s2.WriterBlockSize(chunkSize))
	defer func() {
		// Also on the way out of an error: the writer has goroutines.
		if cerr := pressed.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("write the stream: %w", cerr)
		}
		stats.Wire = checkpoint.Bytes(out.n)
	}()
	s := &sender{
		root:    root,
		dirs:    newDirs(root),
		out:     newFrameWriter(pressed),
		frozen:  opt.Frozen,
		settled: settledBefore(began, opt.ListedAt),
		stats:   &stats,
		buf:     make([]byte, chunkSize),
	}
	defer s.dirs.close()
	if err := s.stream(ctx, header{Base: since.id, ID: next.id}, tree.root, todo); err != nil {
		return nil, stats, err
	}

	// 4. What the destination holds after that.
	next.seal()
	next.suspect = clockStepped(began)
	stats.Files = next.files
	return next, stats, nil
}

// Sync makes everything that was applied survive a power failure of this host.
// It flushes the whole file system, so call it outside the blackout.
func Sync(upper string) error {
	root, err := openRoot(upper)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Syncfs(root.fd); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", upper, err)
	}
	return nil
}

type countingWriter struct {
	dst io.Writer
	n   int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.dst.Write(p)
	w.n += int64(n)
	return n, err
}
