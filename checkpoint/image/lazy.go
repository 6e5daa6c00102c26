package image

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/tranship/tranship/checkpoint"
)

// LazyExtents returns, for every process of a dump directory, the pages that
// its restore expects from the lazy-pages daemon: all that are marked Lazy in
// lazy-<pid>.img (Settle) or, without it, in the pagemap, ascending, neighbours
// joined. A process without memory (a zombie) is not in
// the map; one with memory but without a pagemap is an error, because its pages
// would be missed without a word.
func LazyExtents(dir string) (map[checkpoint.PID][]checkpoint.Extent, error) {
	tasks, err := readFile(filepath.Join(dir, "pstree.img"), ReadProcessTree)
	if err != nil {
		return nil, err
	}
	out := map[checkpoint.PID][]checkpoint.Extent{}
	for _, t := range tasks {
		name := filepath.Join(dir, fmt.Sprintf("lazy-%d.img", t.PID))
		pm, err := readFile(name, ReadPagemap)
		if errors.Is(err, fs.ErrNotExist) {
			name = filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", t.PID))
			pm, err = readFile(name, ReadPagemap)
		}
		if errors.Is(err, fs.ErrNotExist) {
			_, err := os.Stat(filepath.Join(dir, fmt.Sprintf("mm-%d.img", t.PID)))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("memory of process %d: %w", t.PID, err)
			}
			return nil, fmt.Errorf("%w: process %d has memory and no pagemap", ErrMalformed, t.PID)
		}
		if err != nil {
			return nil, err
		}
		if out[t.PID], err = lazyRuns(t.PID, pm); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return out, nil
}

func lazyRuns(pid checkpoint.PID, pm Pagemap) ([]checkpoint.Extent, error) {
	runs := slices.DeleteFunc(slices.Clone(pm.Runs), func(r Run) bool { return r.Flags&Lazy == 0 })
	slices.SortFunc(runs, func(a, b Run) int { return cmp.Compare(a.Addr, b.Addr) })
	extents := make([]checkpoint.Extent, 0, len(runs))
	for _, r := range runs {
		if n := len(extents); n > 0 {
			switch last := &extents[n-1]; {
			case r.Addr < last.End():
				return nil, malformed("two runs cover %#x", r.Addr)
			case r.Addr == last.End():
				last.Pages += r.Pages
				continue
			}
		}
		extents = append(extents, checkpoint.Extent{PID: pid, Addr: r.Addr, Pages: r.Pages})
	}
	return extents, nil
}

func readFile[T any](name string, read func(r io.Reader) (T, error)) (T, error) {
	f, err := os.Open(name)
	if err != nil {
		var none T
		return none, err
	}
	defer f.Close()
	v, err := read(f)
	if err != nil {
		return v, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}
