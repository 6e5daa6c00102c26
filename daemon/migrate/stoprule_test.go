package migrate

import (
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
)

func rounds(raw []checkpoint.Bytes, took []time.Duration) []RoundResult {
	out := make([]RoundResult, len(raw))
	for i := range raw {
		out[i] = RoundResult{N: i + 1, BytesRaw: raw[i], Duration: took[i]}
	}
	return out
}

func TestStopRule(t *testing.T) {
	const mib = checkpoint.Bytes(1 << 20)
	ms := time.Millisecond
	rule := StopRule{MaxBlackout: 300 * ms, Fixed: 200 * ms, MaxRounds: 8}
	tests := []struct {
		name   string
		rounds []RoundResult
		want   Verdict
	}{
		{"nothing was sent yet", nil, Continue},
		{"one round says nothing about the dirty rate", rounds([]checkpoint.Bytes{256 * mib}, []time.Duration{1000 * ms}), Continue},
		{"an idle shard stops after an empty second round", rounds([]checkpoint.Bytes{256 * mib, 0}, []time.Duration{1000 * ms, 5 * ms}), Small},
		// 35 MiB were written in 1 s; the 140 ms of the second round leave 4.9 MiB, the
		// budget of 100 ms carries 25 MiB, and a third would take less than 20 ms.
		{"a rest that fits the budget stops", rounds([]checkpoint.Bytes{256 * mib, 35 * mib}, []time.Duration{1000 * ms, 140 * ms}), Small},
		{"a rest that does not fit goes on", rounds([]checkpoint.Bytes{256 * mib, 200 * mib}, []time.Duration{1000 * ms, 800 * ms}), Continue},
		{"rounds that do not shrink end", rounds(
			[]checkpoint.Bytes{256 * mib, 250 * mib, 250 * mib, 250 * mib, 250 * mib},
			[]time.Duration{1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms}), NotShrinking},
		{"one slow round among shrinking ones is forgiven", rounds(
			[]checkpoint.Bytes{900 * mib, 800 * mib, 700 * mib, 710 * mib, 600 * mib},
			[]time.Duration{1000 * ms, 1000 * ms, 900 * ms, 900 * ms, 900 * ms}), Continue},
		{"rounds that go up and down without getting smaller end", rounds(
			[]checkpoint.Bytes{900 * mib, 300 * mib, 800 * mib, 290 * mib, 700 * mib},
			[]time.Duration{1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms}), NotShrinking},
		{"rounds that go up and down and get smaller go on", rounds(
			[]checkpoint.Bytes{900 * mib, 300 * mib, 800 * mib, 260 * mib, 700 * mib},
			[]time.Duration{1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms}), Continue},
		{"too many rounds end", rounds(
			[]checkpoint.Bytes{900 * mib, 800 * mib, 700 * mib, 620 * mib, 550 * mib, 490 * mib, 430 * mib, 380 * mib},
			[]time.Duration{1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms, 1000 * ms}), TooMany},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := rule.Decide(tt.rounds); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestABlackoutSmallerThanTheFixedPartStillGrantsTheLeastTime(t *testing.T) {
	rule := StopRule{MaxBlackout: 10 * time.Millisecond, Fixed: 200 * time.Millisecond}
	r := rounds([]checkpoint.Bytes{256 << 20, 1 << 20}, []time.Duration{time.Second, 4 * time.Millisecond})
	if got := rule.Decide(r); got != Small {
		t.Errorf("got %s", got)
	}
}

func TestTheRestTakesAsLongAsTheLinkNeeds(t *testing.T) {
	var rule StopRule
	// 100 MiB were written in 1 s, so that the 500 ms of the second round leave 50
	// MiB; 300 MiB went in 1.5 s.
	r := rounds([]checkpoint.Bytes{200 << 20, 100 << 20}, []time.Duration{time.Second, 500 * time.Millisecond})
	if got := rule.RestTakes(r); got != 250*time.Millisecond {
		t.Errorf("got %v", got)
	}
	if got := rule.RestTakes(r[:1]); got != 0 {
		t.Errorf("of one round: %v", got)
	}
}

// at marks from which round on the shard was slowed how often.
func at(level int, r ...RoundResult) []RoundResult {
	for i := range r {
		r[i].Level = level
	}
	return r
}

func TestAShardThatWritesFasterThanTheLinkIsSlowedInSteps(t *testing.T) {
	const mib = checkpoint.Bytes(1 << 20)
	sec := time.Second
	rule := StopRule{MaxBlackout: 300 * time.Millisecond, MaxRounds: 30, Levels: 2}
	as := func(mibs ...checkpoint.Bytes) (out []RoundResult) {
		for _, n := range mibs {
			out = append(out, RoundResult{BytesRaw: n * mib, Duration: time.Duration(n) * sec / 100})
		}
		return out
	}
	join := func(parts ...[]RoundResult) (out []RoundResult) {
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	for _, tt := range []struct {
		name   string
		rounds []RoundResult
		want   Verdict
	}{
		{"one round that did not shrink can be noise", as(900, 500, 500), Continue},
		{"two cannot", as(900, 500, 500, 490), Throttle},
		{"the first round after it carries what was written before", join(as(900, 500, 500, 490), at(1, as(480)...)), Continue},
		{"half of it is progress", join(as(900, 500, 500, 490), at(1, as(480, 240)...)), Continue},
		{"too little of it is not", join(as(900, 500, 500, 490), at(1, as(480, 400)...)), Throttle},
		{"slow progress, later, is not either", join(as(900, 500, 500, 490), at(1, as(480, 240, 200)...)), Throttle},
		{"at the last step slow progress is all there is", join(as(900, 500, 500, 490), at(1, as(480, 400)...), at(2, as(400, 300, 240)...)), Continue},
		{"there is an end to it", join(as(900, 500, 500, 490), at(1, as(480, 400)...), at(2, as(400, 390, 395)...)), NotShrinking},
		{"a stall that fits the blackout needs no slowing", as(900, 25, 25, 25), Small},
		// 20 MiB took 200 ms after 60 MiB in 600: the next takes 67 ms.
		{"a rest that fits is made smaller while that is cheap", as(900, 60, 20), Continue},
		{"and no longer", as(900, 60, 20, 6), Small},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := rule.Decide(tt.rounds); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
