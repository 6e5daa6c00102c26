package layer

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

var seeds = flag.Int("seeds", 2, "how many random histories the stress tests run")

// mutator does random things to a tree. With the same seed it does the same,
// as long as it is alone; errors of single operations are part of the game.
type mutator struct {
	dir  string
	rng  *rand.Rand
	step byte
}

func newMutator(dir string, seed uint64) *mutator {
	return &mutator{dir: dir, rng: rand.New(rand.NewPCG(seed, 1))}
}

// path returns one of few names, so that operations meet each other.
func (m *mutator) path() string {
	p := m.dir
	for range 1 + m.rng.IntN(3) {
		p = filepath.Join(p, string(rune('a'+m.rng.IntN(5))))
	}
	return p
}

// write neither waits at a fifo nor opens a device: the file systems are
// mounted without them.
//
//nolint:errcheck // as below
func (m *mutator) write(path string, flags int, off int64, content []byte) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0o640)
	if err != nil {
		return
	}
	defer f.Close()
	f.WriteAt(content, off)
}

//nolint:errcheck // most operations fail now and then: no parent, not a file, a directory that is full
func (m *mutator) do() {
	m.step++
	p, q := m.path(), m.path()
	switch m.rng.IntN(25) {
	case 0, 1:
		os.Mkdir(p, 0o700|os.FileMode(m.rng.IntN(0o100)))
	case 2, 3, 4:
		m.write(p, os.O_CREATE|os.O_TRUNC, 0, fill(m.step, m.rng.IntN(3000)))
	case 5:
		m.write(p, os.O_CREATE|os.O_TRUNC, 0, fill(m.step, 200<<10+m.rng.IntN(600<<10)))
	case 6, 7:
		if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() && st.Size() > 0 {
			m.write(p, 0, m.rng.Int64N(st.Size()), fill(m.step, 1+m.rng.IntN(100)))
		}
	case 8:
		if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() {
			os.Truncate(p, m.rng.Int64N(900<<10))
		}
	case 9:
		if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() {
			if f, err := os.OpenFile(p, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0); err == nil {
				unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, m.rng.Int64N(600<<10), 1+m.rng.Int64N(300<<10))
				f.Close()
			}
		}
	case 10, 11:
		os.Rename(p, q)
	case 12:
		unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, q, unix.RENAME_EXCHANGE)
	case 13, 14, 15:
		os.Link(p, q)
	case 16:
		os.Remove(p)
	case 17:
		if m.rng.IntN(4) == 0 {
			// os.RemoveAll would wait if p's directory is a fifo.
			if fd, err := unix.Open(filepath.Dir(p), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err == nil {
				removeAt(fd, filepath.Base(p), 0)
				unix.Close(fd)
			}
		}
	case 18:
		os.Symlink(fmt.Sprint("../", m.rng.IntN(9)), p)
	case 19:
		unix.Fchmodat(unix.AT_FDCWD, p, uint32(m.rng.IntN(0o10000)), 0)
	case 20:
		unix.Lchown(p, m.rng.IntN(3), m.rng.IntN(3))
	case 21:
		unix.Lsetxattr(p, fmt.Sprint("trusted.k", m.rng.IntN(2)), fill(m.step, m.rng.IntN(9)), 0)
	case 22:
		unix.Lremovexattr(p, "trusted.k0")
	case 23:
		switch m.rng.IntN(4) {
		case 0:
			unix.Mkfifo(p, 0o600)
		case 1:
			unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(3+m.rng.IntN(2)*2)))) // null, zero
		case 2:
			unix.Mknod(p, unix.S_IFSOCK|0o600, 0)
		case 3:
			unix.Mknod(p, unix.S_IFCHR, 0)
		}
	case 24:
		ts := []unix.Timespec{{Sec: m.rng.Int64N(1 << 31)}, {Sec: m.rng.Int64N(1 << 31), Nsec: m.rng.Int64N(1e9)}}
		unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW)
	}
}

// TestRandomHistories changes a tree at random, sends the change, compares;
// many rounds of it, so that links, types and inode numbers come round again.
func TestRandomHistories(t *testing.T) {
	testenv.NeedRoot(t)
	for _, fsys := range testFilesystems(t) {
		for seed := range *seeds {
			t.Run(fmt.Sprint(fsys.name, "/", seed), func(t *testing.T) {
				src, dst := fsys.dir(t), fsys.dir(t)
				m := newMutator(src, uint64(seed))
				var index *Index
				for round := range 25 {
					for range 1 + m.rng.IntN(60) {
						m.do()
					}
					var stream []byte
					index, _, stream = pass(t, src, dst, index, Options{Frozen: true})
					mustEqual(t, src, dst)
					if round%5 == 0 {
						if _, err := Apply(context.Background(), dst, bytes.NewReader(stream)); err != nil {
							t.Fatalf("round %d, the same stream again: %v", round, err)
						}
						mustEqual(t, src, dst)
					}
				}
			})
		}
	}
}

// TestPassesBesideWriters is the use: passes while the tree changes under them,
// then the writers stop, and one more pass must make both sides equal.
func TestPassesBesideWriters(t *testing.T) {
	testenv.NeedRoot(t)
	for _, fsys := range testFilesystems(t) {
		for seed := range *seeds {
			t.Run(fmt.Sprint(fsys.name, "/", seed), func(t *testing.T) {
				src, dst := fsys.dir(t), fsys.dir(t)
				start := newMutator(src, uint64(seed))
				for range 300 {
					start.do()
				}
				stop := make(chan struct{})
				var writers sync.WaitGroup
				for w := range 2 {
					writers.Go(func() {
						m := newMutator(src, uint64(1000+10*seed+w))
						for {
							select {
							case <-stop:
								return
							default:
								m.do()
							}
						}
					})
				}
				var index *Index
				unsteady := 0
				for range 8 {
					var stats Stats
					index, stats, _ = pass(t, src, dst, index, Options{})
					unsteady += stats.Unsteady
				}
				close(stop)
				writers.Wait()
				pass(t, src, dst, index, Options{Frozen: true})
				mustEqual(t, src, dst)
				t.Logf("%d paths changed under the passes", unsteady)
			})
		}
	}
}
