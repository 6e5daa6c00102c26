package osthread_test

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
)

func TestNothingRunsOnTheMainThreadAndEveryThreadEnds(t *testing.T) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	tids := map[int]bool{}
	for range 16 {
		wg.Go(func() {
			for range 50 {
				err := osthread.Do(func() error {
					mu.Lock()
					defer mu.Unlock()
					tids[unix.Gettid()] = true
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if tids[os.Getpid()] {
		t.Error("it ran on the main thread")
	}
	end := time.Now().Add(time.Minute)
	for tid := range tids {
		for unix.Tgkill(os.Getpid(), tid, 0) == nil {
			// Another thread may have got the number; then it is not locked to us.
			if time.Now().After(end) {
				comm, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/comm", tid))
				t.Fatalf("thread %d (%s) is still there", tid, comm)
			}
		}
	}
	mistake := errors.New("mistake")
	if err := osthread.Do(func() error { return mistake }); !errors.Is(err, mistake) {
		t.Error(err)
	}
}
