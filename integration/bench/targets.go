package main

import (
	"fmt"
	"math"
	"slices"
)

// method says how each number of the table is measured.
var method = []string{
	"Both subjects run the same image with the same OCI spec on the same machine, and are moved in turn; every value is the median of its samples.",
	"tranship's blackout is what `tranship migrate -o json` reports: from the first frozen task on the source to the first running task on the destination.",
	"runc's blackout goes from the start of `runc checkpoint --tcp-established` on a tmpfs, over `cp -a` to another directory of it, to the return of `runc restore -d`, less the time that starting runc twice takes, measured beside it. Its images do not cross a link, tranship's pages do.",
	"The client's longest gap is the longest time between two answers over its one connection, from before the move to after it, measured in the same way for both.",
	"Throughput is memory a second: the same bytes again and again for at least two seconds, each pass acknowledged; the receiver drops what arrives. The heap is the private memory of a running redis without its pages of zeros; it is sent raw by TLS and quic-go, and as a migration sends it by the page road.",
	"The closed loop runs the same load, of the same seed, with forecasts and under the reactive policy in turns, and once with the autopilot off; late is a request that was answered more than 250 ms after it was due, or not at all. A host's shards together may use 0.3 CPUs. The week that the forecasts know of is made of a recording of the same load, whose day begins at the same time; the day that is measured is real. The reactive policy looks at a new sample every second.",
	"The shard that writes faster than the link carries rewrites random pages of noise, knows what each of them must hold, and looks at all of them after every move.",
	"CRIU alone is the last time in its dump's log plus that in its restore's log, of the idle container without a connection.",
}

// sizes are the groups that the blackout's growth is computed from, in GiB.
var sizes = []struct {
	group string
	gib   float64
}{{"redis-64MiB", 1.0 / 16}, {"redis-256MiB", 0.25}, {"redis-1GiB", 1}, {"redis-4GiB", 4}}

// targets computes the rows that have a target from what was measured.
func targets(r *results) []row {
	rows := []row{
		ratioRow(r, "blackout, redis 1 GiB, of runc's", "redis-1GiB", 0.15),
		ratioRow(r, "blackout, redis 4 GiB, of runc's", "redis-4GiB", 0.06),
		slopeRow(r),
		ratioRow(r, "blackout, redis 64 MiB, of runc's", "redis-64MiB", 0.60),
		criuRow(r),
	}
	return slices.Concat(rows, lineupRows(r), []row{crowdRow(r)}, throughputRows(r), profileRows(r), closedLoopRows(r))
}

// atMost makes a row and compares; NaN is "not measured".
func atMost(name string, value float64, unit string, target float64, note string) row {
	return newRow(name, value, unit, target, false, note)
}

// atLeast is atMost for what should be large.
func atLeast(name string, value float64, unit string, target float64, note string) row {
	return newRow(name, value, unit, target, true, note)
}

func newRow(name string, value float64, unit string, target float64, least bool, note string) row {
	r := row{Name: name, Unit: unit, Target: target, AtLeast: least, Note: note}
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return r
	}
	r.Value = &value
	r.Pass = !least && value <= target || least && value >= target
	return r
}

// restsOn takes the pass from a row that rests on fewer samples than it should.
func (r row) restsOn(n, want int) row {
	if r.Value != nil && n < want {
		r.Pass, r.Few = false, want
	}
	return r
}

// verdict says whether a row reached its target, or by how much not.
func (r row) verdict() string {
	switch {
	case r.Value == nil:
		return "not measured"
	case r.Few > 0:
		return fmt.Sprintf("fewer samples than %d", r.Few)
	case r.Pass:
		return "reached"
	case r.Target == 0:
		return fmt.Sprintf("missed by %.3g", *r.Value)
	case r.AtLeast:
		return fmt.Sprintf("missed: %.0f %% of it", 100**r.Value/r.Target)
	}
	return fmt.Sprintf("missed: %.2f × it", *r.Value/r.Target)
}

// medianOf is NaN for what was not measured.
func medianOf(r *results, name, subject, metric string) float64 {
	g, ok := r.group(name)
	if !ok {
		return math.NaN()
	}
	return median(g.of(subject, metric))
}

const (
	// leastSamples of each subject make a median, leastGaps a percentile of the
	// client's gaps, and leastMoves a long row.
	leastSamples = 5
	leastGaps    = 50
	leastMoves   = 100
)

func ratioRow(r *results, name, groupName string, target float64) row {
	own, other := medianOf(r, groupName, tranship, blackoutMetric), medianOf(r, groupName, stock, blackoutMetric)
	g, _ := r.group(groupName)
	n := min(len(g.of(tranship, blackoutMetric)), len(g.of(stock, blackoutMetric)))
	return atMost(name, own/other, "×", target, spread("%.0f ms", own)+spread(" of %.0f ms", other)).restsOn(n, leastSamples)
}

// slopeRow compares what a GiB adds to the blackout, by least squares over the
// medians of every size that both were measured at.
func slopeRow(r *results) row {
	var x, own, other []float64
	for _, s := range sizes {
		a, b := medianOf(r, s.group, tranship, blackoutMetric), medianOf(r, s.group, stock, blackoutMetric)
		if !math.IsNaN(a) && !math.IsNaN(b) {
			x, own, other = append(x, s.gib), append(own, a), append(other, b)
		}
	}
	a, err := slope(x, own)
	b, err2 := slope(x, other)
	const name, target = "blackout added by a GiB, of runc's", 1.0 / 25
	if err != nil || err2 != nil {
		return atMost(name, math.NaN(), "×", target, "")
	}
	return atMost(name, a/b, "×", target, fmt.Sprintf("%.0f ms of %.0f ms a GiB", a, b))
}

func criuRow(r *results) row {
	own, alone := medianOf(r, "redis-64MiB", tranship, blackoutMetric), medianOf(r, "idle", stockAlone, criuMetric)
	return atMost("blackout, redis 64 MiB, of CRIU alone with the idle container", own/alone, "×", 1.2, spread("%.0f ms", own)+spread(" of %.0f ms", alone))
}

// lineupRows are of the long row of moves.
func lineupRows(r *results) []row {
	g, _ := r.group(lineupGroup)
	blackouts, gaps := g.of(tranship, blackoutMetric), g.of(tranship, gapMetric)
	var over []float64
	for i := range min(len(gaps), len(blackouts)) {
		over = append(over, gaps[i]-blackouts[i])
	}
	made := ""
	if len(blackouts) > 0 {
		made = fmt.Sprintf("%d moves", len(blackouts))
	}
	med, worst := median(blackouts), worst99(blackouts)
	count := func(metric string) float64 { return median(g.of(overall, metric)) }
	return []row{
		atMost("client's longest gap beyond the blackout, p99", worst99(over), "ms", 50, made+spread(", median %.0f ms", median(over))).restsOn(len(over), leastGaps),
		atMost("moves in a row: errors", count(errorsMetric), "", 0, made).restsOn(len(blackouts), leastMoves),
		atMost("moves in a row: leaks", count(leaksMetric), "", 0, made).restsOn(len(blackouts), leastMoves),
		atMost("moves in a row: blackout, p99 of the median", worst/med, "×", 2, spread("%.0f ms", worst)+spread(" of %.0f ms", med)).restsOn(len(blackouts), leastMoves),
	}
}

// spread prints a number that may be missing.
func spread(format string, v float64) string {
	if math.IsNaN(v) {
		return ""
	}
	return fmt.Sprintf(format, v)
}
