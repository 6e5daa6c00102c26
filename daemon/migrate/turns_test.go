package migrate

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func TestShardsStandStillOneAfterTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns()
		standing, most, done := 0, 0, make(chan bool)
		for range 10 {
			go func() {
				o := &outgoing{}
				if _, err := turns.take(t.Context(), o); err != nil {
					t.Error(err)
				}
				standing++
				most = max(most, standing)
				time.Sleep(200 * time.Millisecond) //nolint:forbidigo // the blackout
				standing--
				turns.leave(o)
				turns.leave(o) // may run twice
				done <- true
			}()
		}
		began := time.Now()
		for range 10 {
			<-done
		}
		if took := time.Since(began); most != 1 || took != 2*time.Second {
			t.Errorf("%d at once, %v", most, took)
		}
	})
}

func TestPreCopyGivesWayToABlackoutButNotForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns()
		first, other := &outgoing{}, &outgoing{}
		if waited, err := turns.take(t.Context(), first); waited || err != nil {
			t.Fatal(waited, err)
		}
		began := time.Now()
		if err := turns.wayFor(t.Context(), first); err != nil || time.Since(began) != 0 {
			t.Error("the last round of the blackout itself waits for it")
		}
		time.AfterFunc(150*time.Millisecond, func() { turns.leave(first) })
		if err := turns.wayFor(t.Context(), other); err != nil || time.Since(began) != 150*time.Millisecond {
			t.Error(time.Since(began), err)
		}
		if _, err := turns.take(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		if err := turns.wayFor(t.Context(), other); err != nil || time.Since(began) != giveWay {
			t.Error("a blackout that does not end:", time.Since(began), err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("stop")
		time.AfterFunc(time.Millisecond, func() { cancel(stop) })
		if _, err := turns.take(ctx, other); !errors.Is(err, stop) {
			t.Error(err)
		}
		if err := turns.wayFor(ctx, other); !errors.Is(err, stop) {
			t.Error(err)
		}
	})
}

func TestABlackoutBeginsWhenTheOthersHaveGivenWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Manager{turns: newTurns()}
		first, other := &outgoing{m: m}, &outgoing{m: m}
		for _, o := range []*outgoing{first, other} {
			if err := o.awaitStart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		take := func(want time.Duration) {
			t.Helper()
			began = time.Now()
			if waited, err := m.turns.take(t.Context(), first); err != nil || waited != (want > 0) || time.Since(began) != want {
				t.Errorf("after %v, waited %v, %v", time.Since(began), waited, err)
			}
		}
		gaveWay := make(chan error)
		time.AfterFunc(100*time.Millisecond, func() { gaveWay <- m.turns.wayFor(t.Context(), other) })
		take(100 * time.Millisecond)
		m.turns.leave(first)
		if err := <-gaveWay; err != nil {
			t.Error(err)
		}

		take(giveWay) // the other does not ask
		m.turns.leave(first)

		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("stop")
		time.AfterFunc(time.Millisecond, func() { cancel(stop) })
		if _, err := m.turns.take(ctx, first); !errors.Is(err, stop) {
			t.Error(err)
		}
		m.turns.leave(first)

		time.AfterFunc(200*time.Millisecond, other.left)
		take(200 * time.Millisecond)
		go func() { _, err := m.turns.take(t.Context(), other); gaveWay <- err }()
		synctest.Wait()
		take(0) // it is its own
		m.turns.leave(first)
		if err := <-gaveWay; err != nil {
			t.Error(err)
		}
	})
}

func TestMigrationsOfAHostBeginInTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Manager{turns: newTurns()}
		var mu sync.Mutex
		var order []int
		leaving, most, done := 0, 0, make(chan bool)
		count := func(i, more int) {
			mu.Lock()
			defer mu.Unlock()
			if leaving += more; more > 0 {
				order = append(order, i)
			}
			most = max(most, leaving)
		}
		stop := errors.New("stop")
		gone, cancel := context.WithCancelCause(t.Context())
		for i := range 6 {
			o := &outgoing{m: m, report: newReport(&v1.Migration{}, time.Now)}
			ctx := t.Context()
			if i == 3 {
				ctx = gone
			}
			go func() {
				defer func() { done <- true }()
				if err := o.awaitStart(ctx); err != nil {
					if i != 3 || !errors.Is(err, stop) {
						t.Error(i, err)
					}
					return
				}
				count(i, 1)
				// No two end at once.
				time.Sleep(time.Second + time.Duration(i)*time.Millisecond) //nolint:forbidigo // the migration
				count(i, -1)
				o.left()
				o.left() // may run twice
			}()
			synctest.Wait()
		}
		cancel(stop)
		for range 6 {
			<-done
		}
		if !slices.Equal(order, []int{0, 1, 2, 4, 5}) || most != maxLeaving {
			t.Errorf("%v began, %d at once", order, most)
		}
	})
}
