package allocate

import (
	"testing"
	"time"
)

func TestTheReactivePolicyShedsWhatMovesFastestToTheFullestThatHasRoom(t *testing.T) {
	cfg := Config{Threshold: ReactiveThreshold}
	peer := func(id string, used float64, shards int) Peer {
		return Peer{Host: testHost(id, 4), Load: known(used, 1e9), Usage: Amount{CPU: used}, Shards: shards}
	}
	view := func(usage ...float64) *View {
		v := &View{Host: testHost("self", 4), Peers: &listed{busy: []Peer{peer("half", 2, 2), peer("full", 3.1, 3), peer("some", 1, 1)}, idle: []Peer{peer("idle", 0, 0)}}}
		for i, u := range usage {
			s := shard(string(rune('a'+i)), 0, known(u, 1e9))
			s.Bytes = float64(len(usage)-i) * 1e9 // the last moves fastest
			v.Shards = append(v.Shards, s)
		}
		return v
	}
	for _, c := range []struct {
		name  string
		usage []float64
		moves []string // "SHARD HOST"
	}{
		{"below the threshold", []float64{1.5, 1.6}, nil},
		{"the one that moves fastest is enough", []float64{1.2, 1.1, 1.0}, []string{"c half"}},
		{"the second counts what the first brings", []float64{1.9, 0.7, 1.0, 0.9}, []string{"c half", "d some"}},
		{"nobody would stay below the threshold", []float64{3.9}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan := round(t, planner(t, cfg), t0, view(c.usage...))
			var got []string
			for _, m := range plan.Moves {
				got = append(got, string(m.Shard)+" "+string(m.Targets[0].Host))
				if m.Reason != Threshold || m.Takes <= 0 {
					t.Errorf("%+v", m)
				}
			}
			if len(got) != len(c.moves) {
				t.Fatalf("moves %v, want %v; not: %v", got, c.moves, plan.Not)
			}
			for i := range got {
				if got[i] != c.moves[i] {
					t.Errorf("move %s, want %s", got[i], c.moves[i])
				}
			}
		})
	}

	t.Run("an idle host if no other will do", func(t *testing.T) {
		plan := round(t, planner(t, cfg), t0, view(1.4, 2.5))
		if len(plan.Moves) != 1 || plan.Moves[0].Targets[0].Host != "idle" {
			t.Errorf("%+v", plan.Moves)
		}
	})
	t.Run("a forecast is no reason", func(t *testing.T) {
		v := view(1, 1)
		v.Shards[0].Demand = known(100, 1e9)
		if plan := round(t, planner(t, cfg), t0, v); len(plan.Moves) > 0 {
			t.Errorf("%+v", plan.Moves)
		}
	})
	t.Run("no cool-down, but moves at a time", func(t *testing.T) {
		p, v := planner(t, cfg), view(1.2, 1.1, 1.0)
		v.Shards[2].MovedAt, v.Shards[2].LastHost = t0.Add(-time.Second), "half"
		if plan := round(t, p, t0, v); len(plan.Moves) != 1 || plan.Moves[0].Shard != "c" || plan.Moves[0].Targets[0].Host != "half" {
			t.Errorf("%+v", plan.Moves)
		}
		for _, id := range []ShardID{"x", "y"} {
			p.Started(t0, id, "half")
		}
		if plan := round(t, p, t0, v); len(plan.Moves) > 0 {
			t.Errorf("beyond what may be under way: %+v", plan.Moves)
		}
	})
}
