package workcheck

import (
	"slices"
	"time"
)

// count adds up what the connections have seen.
func count(o *LoadOptions, conns []*connection) Counts {
	c := Counts{ByServer: make([]int, len(conns)), BySecond: make([]int, int(o.End.Sub(o.Start)/time.Second)+1)}
	var took []time.Duration
	for i, conn := range conns {
		late := func(due time.Time) {
			c.Late++
			c.ByServer[i]++
			c.BySecond[int(due.Sub(o.Start)/time.Second)]++
		}
		c.Requests += len(conn.took) + len(conn.left)
		c.Unanswered += len(conn.left)
		for _, due := range conn.left {
			late(due)
		}
		for _, r := range conn.took {
			took = append(took, r.took)
			if r.took > o.Limit {
				late(r.due)
			}
		}
	}
	if len(took) == 0 {
		return c
	}
	slices.Sort(took)
	at := func(q float64) float64 {
		return float64(took[min(len(took)-1, int(q*float64(len(took))))]) / float64(time.Millisecond)
	}
	c.P50MS, c.P99MS, c.WorstMS = at(0.5), at(0.99), at(1)
	return c
}
