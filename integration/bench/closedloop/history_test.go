package closedloop

import (
	"testing"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
)

// begin is no round hour, and not in the middle of anything.
var begin = time.Date(2026, 3, 4, 9, 17, 20, 0, time.UTC)

// recorded is a recording in which the CPU says where in the day it was: 1 at
// night, 2 by day, and in the rise 10 and its ten seconds.
func recorded(t *testing.T) Recording {
	t.Helper()
	day := pattern(begin, recordNight, recordDay)
	var rec Recording
	for range shards {
		var points []*v1.LoadPoint
		// More on both sides than belongs to it.
		for at := day.Start.Add(-time.Minute); at.Before(day.End.Add(time.Minute)); at = at.Add(grid) {
			cpu := 1.0
			switch in := at.Sub(begin); {
			case in >= ramp:
				cpu = 2
			case in >= 0:
				cpu = 10 + float64(in/grid)
			}
			if at.Before(day.Start.Add(settle)) || !at.Before(day.End) {
				cpu = 99
			}
			points = append(points, &v1.LoadPoint{StartUnixMs: at.UnixMilli(), Covered: 1, Mean: map[string]float64{profile.CPU.String(): cpu}})
		}
		points = append(points, &v1.LoadPoint{StartUnixMs: begin.UnixMilli(), Covered: 0.5, Mean: map[string]float64{profile.CPU.String(): 99}})
		rec.add(points, &day)
	}
	if err := rec.check(); err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestTheRecordingKnowsWhereInTheDayItWas(t *testing.T) {
	rec := recorded(t)
	if night, day := rec.CPU(); night < 0.999 || night > 1.001 || day < 1.999 || day > 2.001 {
		t.Errorf("%v at night, %v by day", night, day)
	}
	for i, list := range rec.Rise {
		for _, m := range list {
			if m["cpu"] != 10+float64(i) {
				t.Errorf("the rise after %v: %v", time.Duration(i)*grid, m)
			}
		}
	}
	rec.Rise[2] = nil
	if rec.check() == nil {
		t.Error("a recording with a hole")
	}
	if (&Recording{}).check() == nil {
		t.Error("no recording")
	}
}

func TestThePastIsAWeekOfDaysAndEndsNow(t *testing.T) {
	rec := recorded(t)
	now := begin.Add(-105 * time.Second)
	var n, days, rises int
	last := time.Time{}
	for pt := range rec.days(begin, now, 1) {
		if !last.IsZero() && !pt.Start.Equal(last.Add(grid)) {
			t.Fatalf("%v after %v", pt.Start, last)
		}
		last = pt.Start
		n++
		in := (pt.Start.Sub(begin)%(24*time.Hour) + 24*time.Hour) % (24 * time.Hour)
		want := float32(1)
		switch {
		case in < ramp:
			want = 10 + float32(in/grid)
			rises++
		case in < dayLasts:
			want = 2
			days++
		}
		if pt.Mean[profile.CPU] != want || pt.Step != grid || !pt.Has.Has(profile.CPU) || pt.Has.Has(profile.WorkingSet) {
			t.Fatalf("%v: %v, want %v", pt.Start, pt.Mean[profile.CPU], want)
		}
	}
	if late := now.Sub(last.Add(grid)); late < 0 || late >= grid {
		t.Errorf("it ends %v before now", late)
	}
	if n < 7*8640-1 || rises != 7*6 || days != 7*354 {
		t.Errorf("%d tens of seconds, %d of them of the day, %d of the rise", n, days, rises)
	}
}

func TestAShardThatMovesAgainIsThrash(t *testing.T) {
	r := Result{Moves: []Move{
		{Shard: "a", Blackout: 100 * time.Millisecond}, {Shard: "b", Blackout: 50 * time.Millisecond}, {Shard: "a", Blackout: time.Millisecond},
	}}
	if r.Thrash() != 1 || r.Blackout() != 151*time.Millisecond {
		t.Errorf("%d again, %v", r.Thrash(), r.Blackout())
	}
}

func TestWhatPlanningTookIsInTheMetrics(t *testing.T) {
	const text = "# HELP tranship_balance_rounds_total Planning rounds.\ntranship_balance_rounds_total 250\ntranship_balance_plan_seconds_total 1.25e-01\ntranship_balance_look_seconds_total 9\n"
	if rounds, seconds, err := planningOf(text); rounds != 250 || seconds != 0.125 || err != nil {
		t.Errorf("%v rounds, %v s, %v", rounds, seconds, err)
	}
	if _, _, err := planningOf("tranship_balance_rounds_total many\n"); err == nil {
		t.Error("a metric that is no number")
	}
}
