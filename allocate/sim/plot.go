package sim

import (
	"fmt"
	"strings"
)

// Plot draws what happened over time as columns of characters: a row of bars
// for each policy, of overloaded hosts, hosts in use and moves.
func Plot(reports []Report, width int) string {
	var b strings.Builder
	for _, row := range []struct {
		title string
		of    func(Point) int
	}{
		{"overloaded hosts", func(p Point) int { return p.Overloaded }},
		{"hosts in use", func(p Point) int { return p.Used }},
		{"moves a step", func(p Point) int { return p.Moves }},
	} {
		lines, top := make([][]float64, len(reports)), 0.0
		for i := range reports {
			lines[i] = squeeze(reports[i].Timeline, width, row.of)
			for _, v := range lines[i] {
				top = max(top, v)
			}
		}
		fmt.Fprintf(&b, "%s (full bar: %.4g)\n", row.title, top)
		for i := range reports {
			fmt.Fprintf(&b, "%10s │%s\n", reports[i].Policy, bars(lines[i], top))
		}
	}
	if len(reports) > 0 {
		fmt.Fprintf(&b, "%10s └%s %.4g h\n", "", strings.Repeat("─", width), reports[0].DurationS/3600)
	}
	return b.String()
}

// squeeze takes the largest of the points that share a column.
func squeeze(points []Point, width int, of func(Point) int) []float64 {
	width = min(width, len(points))
	out := make([]float64, width)
	for i, p := range points {
		c := i * width / len(points)
		out[c] = max(out[c], float64(of(p)))
	}
	return out
}

func bars(values []float64, top float64) string {
	steps := []rune(" ▁▂▃▄▅▆▇█")
	var b strings.Builder
	for _, v := range values {
		k := 0
		if v > 0 {
			k = max(1, min(len(steps)-1, int(v/top*float64(len(steps)-1)+0.5)))
		}
		b.WriteRune(steps[k])
	}
	return b.String()
}
