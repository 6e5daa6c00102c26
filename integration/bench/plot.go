package main

import (
	"bytes"
	"fmt"
	"html"
	"maps"
	"math"
	"slices"
)

// series is a line of the plot: medians with the range that was measured.
type series struct {
	name, colour string
	points       []point
}

// point is one size; y in milliseconds.
type point struct {
	label       string
	x           float64 // GiB, above 0
	y, min, max float64
}

// drawBlackout draws blackout over memory for both subjects; nil without points.
func drawBlackout(r *results) []byte {
	all := []series{{name: "runc checkpoint + copy + restore", colour: "#b3423a"}, {name: "tranship", colour: "#1f6f8b"}}
	subjects := []string{stock, tranship}
	found := false
	for i := range all {
		for _, size := range sizes {
			g, _ := r.group(size.group)
			s := summarize(g.of(subjects[i], blackoutMetric))
			if s.N == 0 {
				continue
			}
			found = true
			all[i].points = append(all[i].points, point{label: sizeLabel(size.gib), x: size.gib, y: s.Median, min: s.Min, max: s.Max})
		}
	}
	if !found {
		return nil
	}
	return plot("Blackout of a redis under 50 MB/s of overwrites", "memory of the shard", "blackout, ms", all)
}

func sizeLabel(gib float64) string {
	if gib < 1 {
		return fmt.Sprintf("%.0f MiB", gib*1024)
	}
	return fmt.Sprintf("%.0f GiB", gib)
}

// The plot's sizes, in pixels: a width that fits a README.
const (
	plotWidth, plotHeight              = 720.0, 420.0
	plotLeft, plotRight                = 80.0, 24.0
	plotTop, plotBottom                = 64.0, 56.0
	plotInnerWidth, plotInnerHeight    = plotWidth - plotLeft - plotRight, plotHeight - plotTop - plotBottom
	plotFont, plotInk, plotGrid, paper = "ui-sans-serif, system-ui, sans-serif", "#333", "#ddd", "#fff"
)

// plot writes an SVG with two logarithmic axes: sizes and blackouts both span
// factors, and a straight line of slope 1 is growth with memory.
func plot(title, xName, yName string, all []series) []byte {
	minX, maxX, minY, maxY := math.Inf(1), math.Inf(-1), math.Inf(1), math.Inf(-1)
	labels := map[float64]string{}
	for _, s := range all {
		for _, p := range s.points {
			minX, maxX = min(minX, p.x), max(maxX, p.x)
			minY, maxY = min(minY, p.min), max(maxY, p.max)
			labels[p.x] = p.label
		}
	}
	minY, maxY = below(minY), above(maxY)
	x := scale(minX/1.3, maxX*1.3, plotLeft, plotLeft+plotInnerWidth)
	y := scale(minY, maxY, plotTop+plotInnerHeight, plotTop)

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%g" height="%g" viewBox="0 0 %g %g" font-family="%s" font-size="13" fill="%s">`+"\n",
		plotWidth, plotHeight, plotWidth, plotHeight, plotFont, plotInk)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="%s"/>`+"\n", paper)
	text(&b, plotLeft, 24, "start", title, ` font-size="16" font-weight="600"`)
	for v := range ticks(minY, maxY) {
		fmt.Fprintf(&b, `<path d="M%.1f %.1fH%.1f" stroke="%s"/>`+"\n", plotLeft, y(v), plotLeft+plotInnerWidth, plotGrid)
		text(&b, plotLeft-8, y(v)+4, "end", fmt.Sprintf("%.0f", v), "")
	}
	for _, v := range slices.Sorted(maps.Keys(labels)) {
		text(&b, x(v), plotTop+plotInnerHeight+20, "middle", labels[v], "")
	}
	text(&b, plotLeft+plotInnerWidth/2, plotHeight-14, "middle", xName, "")
	text(&b, 18, plotTop+plotInnerHeight/2, "middle", yName, fmt.Sprintf(` transform="rotate(-90 18 %.1f)"`, plotTop+plotInnerHeight/2))
	for i, s := range all {
		drawSeries(&b, s, x, y)
		at := plotLeft + float64(i)*280
		fmt.Fprintf(&b, `<path d="M%.1f 44h22" stroke="%s" stroke-width="3"/>`+"\n", at, s.colour)
		text(&b, at+30, 48, "start", s.name, "")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// drawSeries draws the line, each size's range, and its median in figures.
func drawSeries(b *bytes.Buffer, s series, x, y func(float64) float64) {
	for i, p := range s.points {
		if i > 0 {
			q := s.points[i-1]
			fmt.Fprintf(b, `<path d="M%.1f %.1fL%.1f %.1f" stroke="%s" stroke-width="2"/>`+"\n", x(q.x), y(q.y), x(p.x), y(p.y), s.colour)
		}
		fmt.Fprintf(b, `<path d="M%.1f %.1fV%.1f" stroke="%s" stroke-width="5" stroke-opacity="0.35"/>`+"\n", x(p.x), y(p.min), y(p.max), s.colour)
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", x(p.x), y(p.y), s.colour)
		text(b, x(p.x)+8, y(p.y)-8, "start", fmt.Sprintf("%.0f", p.y), fmt.Sprintf(` fill="%s"`, s.colour))
	}
}

func text(b *bytes.Buffer, x, y float64, anchor, s, more string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>`+"\n", x, y, anchor, more, html.EscapeString(s))
}

// scale maps lo..hi logarithmically to from..to.
func scale(lo, hi, from, to float64) func(float64) float64 {
	return func(v float64) float64 {
		return from + (to-from)*(math.Log(v)-math.Log(lo))/(math.Log(hi)-math.Log(lo))
	}
}

// steps of a decade that may end the axis and have a line.
var steps = []float64{1, 2, 5}

// below and above are the nearest ends of an axis that hold v.
func below(v float64) float64 {
	decade := math.Pow(10, math.Floor(math.Log10(v)))
	end := decade
	for _, s := range steps {
		if s*decade <= v {
			end = s * decade
		}
	}
	return end
}

func above(v float64) float64 {
	decade := math.Pow(10, math.Floor(math.Log10(v)))
	for _, s := range steps {
		if s*decade >= v {
			return s * decade
		}
	}
	return 10 * decade
}

// ticks yields the lines from lo to hi.
func ticks(lo, hi float64) func(yield func(float64) bool) {
	return func(yield func(float64) bool) {
		for decade := math.Pow(10, math.Floor(math.Log10(lo))); decade <= hi; decade *= 10 {
			for _, s := range steps {
				// A hair of room for what powers of ten lose.
				if v := s * decade; v >= lo*0.999 && v <= hi*1.001 && !yield(v) {
					return
				}
			}
		}
	}
}
