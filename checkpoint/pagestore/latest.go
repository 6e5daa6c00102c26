package pagestore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/tranship/tranship/checkpoint"
)

// What a shard wrote just before it was frozen came last, and is what it touches
// first when it runs again. Seal writes down which pages these are. It is a hint:
// whoever reads it asks for each page whether it is still to be placed.

const (
	latestSuffix = ".latest"
	latestMagic  = "tranship latest pages 1\n"
	// latestPages of all processes together are remembered: 4 MiB, placed in some
	// 4 ms by one thread.
	latestPages = 1024
)

// latest are the puts that came last.
type latest struct {
	mu   sync.Mutex
	puts []put
	n    uint64 // pages in puts
}

type put struct {
	pid checkpoint.PID
	pageRun
}

func (l *latest) add(pid checkpoint.PID, addr uint64, n checkpoint.Pages) {
	first := addr / checkpoint.PageSize
	p := put{pid, pageRun{first, first + uint64(n)}}
	if p.to-p.from > latestPages {
		p.from = p.to - latestPages
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.puts = append(l.puts, p)
	for l.n += p.to - p.from; l.n > latestPages; l.puts = l.puts[1:] {
		l.n -= l.puts[0].to - l.puts[0].from
	}
}

// byProcess sorts the puts by process; of a page that was put twice it has one.
func (l *latest) byProcess() map[checkpoint.PID]*extentIndex {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[checkpoint.PID]*extentIndex{}
	for _, p := range l.puts {
		if out[p.pid] == nil {
			out[p.pid] = newExtentIndex()
		}
		out[p.pid].put(p.from*checkpoint.PageSize, checkpoint.Pages(p.to-p.from))
	}
	return out
}

func (s *Store) sealLatest() error {
	for pid, x := range s.latest.byProcess() {
		if err := os.WriteFile(s.latestPath(pid), encodeList(latestMagic, x.runs()), 0o600); err != nil {
			return fmt.Errorf("seal the pages of pid %d: %w", pid, full(err))
		}
	}
	return nil
}

func (s *Store) latestPath(pid checkpoint.PID) string {
	return filepath.Join(s.dir, strconv.Itoa(int(pid))+latestSuffix)
}

// Latest visits the extents of pid that were put last before Seal, in order; none
// if they are not known.
func (s *Store) Latest(pid checkpoint.PID, visit func(addr uint64, n checkpoint.Pages) error) error {
	raw, err := os.ReadFile(s.latestPath(pid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("latest pages of pid %d: %w", pid, err)
	}
	runs, err := parseList(raw, latestMagic)
	if err != nil {
		return fmt.Errorf("latest pages of pid %d: %w", pid, err)
	}
	for _, r := range runs {
		if err := visit(r.from*checkpoint.PageSize, checkpoint.Pages(r.to-r.from)); err != nil {
			return err
		}
	}
	return nil
}
