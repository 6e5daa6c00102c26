package layer

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/tranship/tranship/internal/testenv"
)

// BenchmarkFinalPass is what the freeze waits for: 5,000 files in 250
// directories of which none, or a few, changed since the pass before.
func BenchmarkFinalPass(b *testing.B) {
	testenv.NeedRoot(b)
	for _, fsys := range testFilesystems(b) {
		src := fsys.dir(b)
		for d := range 250 {
			dir := fmt.Sprintf("%s/%d/%d", src, d%10, d)
			must(b, os.MkdirAll(dir, 0o755))
			for i := range 20 {
				put(b, fmt.Sprintf("%s/file-%d", dir, i), fill(byte(i), 2000))
			}
		}
		put(b, src+"/large", fill(9, 64<<20))
		waitSettled(b, src)
		index, _, err := Send(context.Background(), src, nil, io.Discard, Options{})
		must(b, err)
		for _, c := range []struct {
			name    string
			changed int
			opt     Options
		}{
			{"unchanged", 0, Options{Frozen: true}},
			{"100 changed", 100, Options{Frozen: true}},
			{"64 MiB to compare", 0, Options{Frozen: true, AlwaysCompare: []string{"large"}}},
		} {
			for i := range c.changed {
				put(b, fmt.Sprintf("%s/%d/%d/file-0", src, i%10, i), fill(byte(i), 2001))
			}
			b.Run(fsys.name+"/"+c.name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, _, err := Send(context.Background(), src, index, io.Discard, c.opt); err != nil {
						b.Fatal(err)
					}
				}
			})
			if c.changed > 0 {
				waitSettled(b, src)
				index, _, err = Send(context.Background(), src, index, io.Discard, Options{})
				must(b, err)
			}
		}
	}
}
