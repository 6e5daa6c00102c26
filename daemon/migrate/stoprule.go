package migrate

import (
	"cmp"
	"slices"
	"time"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer"
)

// RoundResult is what one pre-copy round did.
type RoundResult struct {
	N         int
	Pages     checkpoint.Pages // pages that were found written, zero runs not counted
	BytesRaw  checkpoint.Bytes
	BytesSent checkpoint.Bytes
	Duration  time.Duration
	// Level is how many times the shard had been slowed when the round began.
	Level int
	// CPUs is the limit that the shard was held to, 0 for its own.
	CPUs float64
	// Sent says how the pages went, nil when no round of the session carried them.
	Sent *transfer.RoundStats
}

// StopRule decides when pre-copy ends. It is pure: the caller gives the rounds.
type StopRule struct {
	// MaxBlackout is what the operator allows.
	MaxBlackout time.Duration
	// Fixed is the part of the blackout that does not depend on how much memory
	// is left: freeze, dump, restore. Measured by earlier migrations of this host.
	Fixed time.Duration
	// MaxRounds ends pre-copy whatever happens; QEMU and Xen use about 30.
	MaxRounds int
	// Levels is how many times the shard may be slowed.
	Levels int
}

// Verdict is the rule's answer.
type Verdict string

// Verdicts.
const (
	Continue     Verdict = "continue"
	Throttle     Verdict = "throttle"      // the shard writes as fast as the link carries: slow it, then go on
	Small        Verdict = "small"         // the rest fits into the allowed blackout, and another round would bring little
	NotShrinking Verdict = "not-shrinking" // the same, and it may not be slowed further
	TooMany      Verdict = "too-many-rounds"
)

// minStopTime is the least time that is granted to the last pages even if the
// fixed part alone eats the allowed blackout: below it, rounds cost more than
// they bring.
const minStopTime = 20 * time.Millisecond

// shrinkFactor is what the smallest round so far must shrink to in order to count
// as progress, and stallRounds how many rounds in a row may fail to: one slow
// round can be noise.
const (
	shrinkFactor = 0.9
	stallRounds  = 3
	// A stall that leads to nothing worse than a slower shard is believed sooner.
	throttleRounds = 2
	// A slowed shard shall not be slow for long: from 0.7 on it takes eight rounds
	// and more to come down to a twentieth.
	slowedFactor = 0.7
)

// Remaining predicts how much would have to be sent if the shard were frozen
// now. Pages written while the last round ran are the next round's; the shard
// is assumed to go on writing at the rate seen over the last two rounds.
func (StopRule) Remaining(rounds []RoundResult) (checkpoint.Bytes, bool) {
	if len(rounds) < 2 {
		return 0, false
	}
	last, before := rounds[len(rounds)-1], rounds[len(rounds)-2]
	// What the last round carried was written during the one before it.
	if before.Duration <= 0 {
		return last.BytesRaw, true
	}
	rate := float64(last.BytesRaw) / before.Duration.Seconds()
	return checkpoint.Bytes(rate * last.Duration.Seconds()), true
}

// Bandwidth is the raw memory moved per second over the given rounds, 0 if unknown.
func Bandwidth(rounds []RoundResult) float64 {
	var raw checkpoint.Bytes
	var took time.Duration
	for _, r := range rounds {
		raw += r.BytesRaw
		took += r.Duration
	}
	if took <= 0 {
		return 0
	}
	return float64(raw) / took.Seconds()
}

// RestTakes predicts how long it would take to send what remains: 0 if unknown.
func (s StopRule) RestTakes(rounds []RoundResult) time.Duration {
	remaining, _ := s.Remaining(rounds)
	bw := Bandwidth(rounds)
	if bw <= 0 {
		return 0
	}
	return time.Duration(float64(remaining) / bw * float64(time.Second))
}

// Decide says whether another round is worth it.
func (s StopRule) Decide(rounds []RoundResult) Verdict {
	remaining, known := s.Remaining(rounds)
	if !known {
		return Continue
	}
	budget := max(s.MaxBlackout-s.Fixed, minStopTime)
	bw := Bandwidth(rounds)
	fits := bw > 0 && float64(remaining) <= bw*budget.Seconds()
	switch {
	case fits && (!worthMore(rounds) || len(rounds) >= s.MaxRounds && s.MaxRounds > 0):
		return Small
	case s.MaxRounds > 0 && len(rounds) >= s.MaxRounds:
		return TooMany
	case !s.stalled(rounds):
		return Continue
	case fits:
		return Small
	case rounds[len(rounds)-1].Level < s.Levels:
		return Throttle
	}
	return NotShrinking
}

// worthMore says that the next round would still take a part of the blackout
// away that somebody could notice. What a round carries was written during the one
// before it, so the next will take about last * last / before.
func worthMore(rounds []RoundResult) bool {
	last, before := rounds[len(rounds)-1].Duration.Seconds(), rounds[len(rounds)-2].Duration.Seconds()
	return before > 0 && last < slowedFactor*before && last*last/before > minStopTime.Seconds()
}

// stalled compares the last rounds with the smallest before them, not with their
// neighbours: what a shard writes goes up and down, and each down after an up
// would look like progress for ever. Only rounds since the shard was last slowed
// count.
func (s StopRule) stalled(rounds []RoundResult) bool {
	level := rounds[len(rounds)-1].Level
	factor, patience := shrinkFactor, stallRounds
	switch {
	case level > 0:
		rounds = rounds[slices.IndexFunc(rounds, func(r RoundResult) bool { return r.Level == level }):]
		if level < s.Levels {
			factor, patience = slowedFactor, 1
		} else {
			patience = throttleRounds // there is nothing left but to freeze it
		}
	default:
		// The first round carries everything and says nothing about shrinking.
		rounds = rounds[1:]
		if s.Levels > 0 {
			patience = throttleRounds
		}
	}
	if len(rounds) < patience+1 {
		return false
	}
	before, last := rounds[:len(rounds)-patience], rounds[len(rounds)-patience:]
	least := slices.MinFunc(before, func(a, b RoundResult) int { return cmp.Compare(a.BytesRaw, b.BytesRaw) }).BytesRaw
	return !slices.ContainsFunc(last, func(r RoundResult) bool { return float64(r.BytesRaw) < factor*float64(least) })
}
