package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// logPoll is how often a followed log is looked at: what a person notices, and
// cheap. Inotify would miss a file that a migration is about to create.
const logPoll = 200 * time.Millisecond

// logChunk bounds one read.
const logChunk = 32 << 10

// Logs calls emit with the last tail lines of the shard's log (all of it when
// tail is negative), and with follow goes on with what is added until ctx ends,
// which is no error then, or until the shard is removed. emit must not keep
// its argument.
func (r *Runtime) Logs(ctx context.Context, namespace, name string, tail int64, follow bool, emit func([]byte) error) error {
	if _, _, err := r.load(ctx, namespace, name); err != nil {
		return err
	}
	f, err := os.Open(r.LogPath(namespace, name))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %s has no log: tranship did not start it", ErrNotFound, name)
	}
	if err != nil {
		return fmt.Errorf("log of %s: %w", name, err)
	}
	defer f.Close()
	if tail >= 0 {
		if err := seekTail(f, tail); err != nil {
			return fmt.Errorf("log of %s: %w", name, err)
		}
	}
	buf := make([]byte, logChunk)
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if err := emit(buf[:n]); err != nil {
				return err
			}
			continue
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("log of %s: %w", name, err)
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		// A removed shard's file has no name any more and will not grow.
		if here, err := os.Stat(f.Name()); err != nil {
			return nil
		} else if mine, err := f.Stat(); err != nil || !os.SameFile(here, mine) {
			return nil
		}
	}
}

// seekTail moves f to the start of its last n lines, reading backwards.
func seekTail(f io.ReadSeeker, n int64) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n == 0 {
		return err
	}
	buf := make([]byte, logChunk)
	lines, pos := int64(0), end
	for pos > 0 {
		size := min(pos, int64(len(buf)))
		pos -= size
		if _, err := f.Seek(pos, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.ReadFull(f, buf[:size]); err != nil {
			return err
		}
		for chunk := buf[:size]; ; {
			i := bytes.LastIndexByte(chunk, '\n')
			if i < 0 {
				break
			}
			// The newline that ends the file ends its last line, and starts none.
			if pos+int64(i) != end-1 {
				if lines++; lines == n {
					_, err := f.Seek(pos+int64(i)+1, io.SeekStart)
					return err
				}
			}
			chunk = chunk[:i]
		}
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}
