package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
)

func TestVolumesThatAreHere(t *testing.T) {
	dir := t.TempDir()
	var paths, want []string
	for i := range 2 * maxStats { // all at once, more than may be looked at at once
		path := filepath.Join(dir, fmt.Sprint(i))
		paths = append(paths, path)
		if i%2 == 0 {
			want = append(want, path)
			if err := os.Mkdir(path, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	b := &balanced{stat: make(chan struct{}, maxStats)}
	if got := b.Volumes(t.Context(), paths); !slices.Equal(got, want) {
		t.Errorf("here are %v", got)
	}
}

func TestAFileServerThatDoesNotAnswerHoldsNobody(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := &balanced{stat: make(chan struct{}, maxStats)}
		for range maxStats {
			b.stat <- struct{}{} // as many wait for it already
		}
		if got := b.Volumes(t.Context(), []string{dir}); got != nil {
			t.Errorf("here are %v", got)
		}
		for range maxStats {
			<-b.stat
		}
		synctest.Wait() // whoever asked first has given up
		release := make(chan struct{})
		b.stats.DoChan("/away", func() (any, error) { <-release; return nil, nil })
		if got := b.Volumes(t.Context(), []string{"/away", dir}); !slices.Equal(got, []string{dir}) {
			t.Errorf("beside one that does not answer: %v", got)
		}
		close(release)
		if got := b.Volumes(t.Context(), []string{dir}); len(got) != 1 {
			t.Errorf("after it answered: %v", got)
		}
	})
}
