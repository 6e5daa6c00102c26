package profiler

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tranship/tranship/ebpf/profile"
)

// measuring is a profiler that does nothing but measure dirty rates.
func measuring(t *testing.T, every time.Duration, dirty func(ctx context.Context, namespace, name string, window time.Duration) (float64, error)) *Profiler {
	p := &Profiler{cfg: Config{DirtyEvery: every, Dirty: dirty}, log: slog.New(slog.NewTextHandler(t.Output(), nil)), subjects: map[string]*subject{}}
	for _, key := range [][2]string{{"default", "a"}, {"default", "b"}, {"k8s.io", "c"}} {
		p.subjects[key[0]+"/"+key[1]] = &subject{key: key[0] + "/" + key[1], namespace: key[0], name: key[1], since: time.Now(), profile: profile.New()}
	}
	return p
}

func TestDirtyRatesAreMeasuredInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var got []string
		busy := false
		p := measuring(t, 10*time.Minute, func(_ context.Context, _, name string, window time.Duration) (float64, error) {
			mu.Lock()
			if got = append(got, name); busy {
				t.Error("two at a time")
			}
			busy = true
			mu.Unlock()
			time.Sleep(window + 20*time.Millisecond) //nolint:forbidigo // virtual time
			mu.Lock()
			defer mu.Unlock()
			busy = false
			if name == "b" {
				return 0, errors.New("it moves")
			}
			return 7, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { p.measureDirty(ctx); close(done) }()
		time.Sleep(9 * time.Minute) //nolint:forbidigo // virtual time
		mu.Lock()
		if len(got) != 0 {
			t.Errorf("%v after nine minutes", got)
		}
		mu.Unlock()
		time.Sleep(22 * time.Minute) //nolint:forbidigo // three turns
		cancel()
		<-done
		slices.Sort(got)
		if !slices.Equal(got, []string{"a", "a", "a", "b", "b", "b"}) {
			t.Errorf("%v in half an hour", got)
		}
		if a, b := p.subjects["default/a"], p.subjects["default/b"]; !a.dirtyKnown || a.dirty != 7 || b.dirtyKnown {
			t.Errorf("%v %v, %v", a.dirty, a.dirtyKnown, b.dirtyKnown)
		}
	})
}

func TestDirtyRatesOfLargeShardsAreMeasuredLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		p := measuring(t, time.Minute, func(_ context.Context, _, _ string, window time.Duration) (float64, error) {
			n++
			time.Sleep(window + 6*time.Second) //nolint:forbidigo // virtual time
			return 1, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { p.measureDirty(ctx); close(done) }()
		time.Sleep(10 * time.Hour) //nolint:forbidigo // virtual time
		cancel()
		<-done
		// Six seconds each, a hundredth of the time.
		if n < 55 || n > 61 {
			t.Errorf("%d in ten hours", n)
		}
	})
}

func TestDirtyRatesCanBeLeftAlone(t *testing.T) {
	p := measuring(t, 0, func(context.Context, string, string, time.Duration) (float64, error) {
		t.Error("measured")
		return 0, nil
	})
	p.measureDirty(t.Context()) // returns at once
}
