package main

import (
	"fmt"
	"html"
	"math"
	"strings"
	"time"
)

// plane maps times and values of a forecast to a picture.
type plane struct {
	from, to      time.Time
	low, high     float64
	width, height float64
}

// planeOf spans history and path; zero is in it, because a load's distance to
// nothing says more than its wiggles.
func planeOf(doc *forecastDocument, width, height float64) plane {
	p := plane{from: doc.At, to: doc.At, width: width, height: height}
	see := func(at time.Time, values ...float64) {
		if at.Before(p.from) {
			p.from = at
		}
		if at.After(p.to) {
			p.to = at
		}
		for _, v := range values {
			p.low, p.high = math.Min(p.low, v), math.Max(p.high, v)
		}
	}
	for _, h := range doc.History {
		see(h.At, h.Value)
	}
	for _, q := range doc.Path {
		see(q.At, q.P10, q.P95)
	}
	if p.high == p.low {
		p.high = p.low + 1
	}
	return p
}

// x and y lie in [0, width] and, from the top, [0, height].
func (p plane) x(at time.Time) float64 {
	if !p.to.After(p.from) {
		return 0
	}
	return p.width * float64(at.Sub(p.from)) / float64(p.to.Sub(p.from))
}

func (p plane) y(v float64) float64 { return p.height * (p.high - v) / (p.high - p.low) }

// forecastPlot draws history (•), median (─) and the band from P10 to P95 (░)
// in characters, with the scale on the left.
func forecastPlot(doc *forecastDocument, width, height int) string {
	p := planeOf(doc, float64(width-1), float64(height-1))
	cells := make([][]rune, height)
	for i := range cells {
		cells[i] = []rune(strings.Repeat(" ", width))
	}
	column := func(at time.Time) int { return min(max(int(math.Round(p.x(at))), 0), width-1) }
	row := func(v float64) int { return min(max(int(math.Round(p.y(v))), 0), height-1) }
	for _, q := range doc.Path {
		for r := row(q.P95); r <= row(q.P10); r++ {
			cells[r][column(q.At)] = '░'
		}
	}
	for _, q := range doc.Path {
		cells[row(q.P50)][column(q.At)] = '─'
	}
	for _, h := range doc.History {
		cells[row(h.Value)][column(h.At)] = '•'
	}
	var b strings.Builder
	for i, line := range cells {
		label := ""
		switch i {
		case 0:
			label = formatSignal(doc.Signal, p.high)
		case height - 1:
			label = formatSignal(doc.Signal, p.low)
		}
		fmt.Fprintf(&b, "%12s │%s\n", label, strings.TrimRight(string(line), " "))
	}
	now := column(doc.At)
	fmt.Fprintf(&b, "%12s └%s┴%s\n", "", strings.Repeat("─", now), strings.Repeat("─", width-1-now))
	left, right := p.from.Format("15:04"), p.to.Format("15:04")
	fmt.Fprintf(&b, "%14s%-*snow%*s\n", "", max(now-1, len(left)), left, max(width-now-2, len(right)), right)
	return b.String()
}

// forecastSVG is the same as a drawing.
func forecastSVG(doc *forecastDocument) string {
	const width, height, margin = 900.0, 320.0, 60.0
	p := planeOf(doc, width-2*margin, height-2*margin)
	point := func(at time.Time, v float64) string { return fmt.Sprintf("%.1f,%.1f", margin+p.x(at), margin+p.y(v)) }
	var history, median, upper, lower []string
	for _, h := range doc.History {
		history = append(history, point(h.At, h.Value))
	}
	for i, q := range doc.Path {
		median = append(median, point(q.At, q.P50))
		upper = append(upper, point(q.At, q.P95))
		back := doc.Path[len(doc.Path)-1-i]
		lower = append(lower, point(back.At, back.P10))
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%g" height="%g" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="%g" y="24" font-size="14">%s of %s</text>`+"\n", margin, html.EscapeString(doc.Signal), html.EscapeString(doc.Shard))
	fmt.Fprintf(&b, `<polygon points="%s %s" fill="#9ecae1" fill-opacity="0.6"/>`+"\n", strings.Join(upper, " "), strings.Join(lower, " "))
	fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="#08519c" stroke-width="2"/>`+"\n", strings.Join(median, " "))
	fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="#333" stroke-width="1"/>`+"\n", strings.Join(history, " "))
	now := margin + p.x(doc.At)
	fmt.Fprintf(&b, `<line x1="%.1f" y1="%g" x2="%.1f" y2="%g" stroke="#999" stroke-dasharray="4"/>`+"\n", now, margin, now, height-margin)
	for _, v := range []float64{p.low, p.high} {
		fmt.Fprintf(&b, `<text x="%g" y="%.1f" text-anchor="end">%s</text>`+"\n", margin-6, margin+p.y(v)+4, html.EscapeString(formatSignal(doc.Signal, v)))
	}
	for _, at := range []time.Time{p.from, doc.At, p.to} {
		fmt.Fprintf(&b, `<text x="%.1f" y="%g" text-anchor="middle">%s</text>`+"\n", margin+p.x(at), height-margin+20, at.Format("Jan 2 15:04"))
	}
	b.WriteString("</svg>\n")
	return b.String()
}
