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
		// 40 MiB were written in 1 s; the 160 ms of the second round leave 6.4 MiB, the
		// budget of 100 ms carries 25 MiB.
		{"a rest that fits the budget stops", rounds([]checkpoint.Bytes{256 * mib, 40 * mib}, []time.Duration{1000 * ms, 160 * ms}), Small},
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
