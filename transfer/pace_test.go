package transfer

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestThePacerKeepsItsRate(t *testing.T) {
	for _, mbit := range []int64{1, 10, 500, 10_000} {
		synctest.Test(t, func(t *testing.T) {
			var p pacer
			p.set(mbit * 1_000_000)
			began := time.Now()
			sent := 0
			for time.Since(began) < 5*time.Second {
				n := p.piece()
				if err := p.wait(t.Context(), n); err != nil {
					t.Fatal(err)
				}
				sent += n
			}
			onWire := float64(sent) * (1000 + wireOverhead) / 1000 * 8
			want := float64(mbit*1_000_000) * time.Since(began).Seconds()
			if ratio := onWire / want; ratio < 0.97 || ratio > 1.03 {
				t.Errorf("%d Mbit/s: %.3f of the rate", mbit, ratio)
			}
		})
	}
}

func TestThePacerMakesUpForALateSleeperButNotForAPause(t *testing.T) {
	now := time.Unix(1000, 0)
	var p pacer
	p.set(8_000_000) // a byte a microsecond
	p.reserve(now, 100_000)
	behind := p.reserve(now, 0)
	if behind < 70*time.Millisecond {
		t.Errorf("after 100 kB at once the next waits %v", behind)
	}
	now = now.Add(behind + 20*time.Millisecond) // overslept
	if delay := p.reserve(now, 15_000); delay > 0 {
		t.Errorf("a late sleeper waits %v", delay)
	}
	if delay := p.reserve(now, 0); delay > 0 {
		t.Errorf("and waits %v before it has caught up", delay)
	}
	now = now.Add(time.Hour)
	p.reserve(now, 40_000)
	if delay := p.reserve(now, 0); delay < 10*time.Millisecond {
		t.Errorf("an hour's pause became credit: the next waits %v", delay)
	}
}

func TestAWaitInThePacerEndsWithItsContext(t *testing.T) {
	var p pacer
	p.set(8)
	p.reserve(time.Now(), 1<<20)
	reason := errors.New("reason")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	if err := p.wait(ctx, 1); !errors.Is(err, reason) {
		t.Errorf("err = %v", err)
	}
}

func TestAPacerWithoutARateNeverWaits(t *testing.T) {
	var p pacer
	p.set(0)
	if p.piece() != 0 || p.reserve(time.Now(), 1<<40) != 0 {
		t.Error("it does")
	}
}
