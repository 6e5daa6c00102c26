package backtest

import (
	"crypto/sha256"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Series is one column of a file: samples in order of time, gaps left out.
type Series struct {
	File   string
	Column string
	Times  []time.Time
	Values []float64
}

// Sample is one of two halves of all series that ever were, told apart by
// their names alone: what is changed in a model is judged on the first, and
// what is said of it, on the second.
type Sample string

const (
	Everything  Sample = "all"
	Development Sample = "development"
	Holdout     Sample = "holdout"
)

// Sample says whether the series belongs to Development or Holdout.
func (s *Series) Sample() Sample {
	// The seventh byte, because it leaves small folders with two halves too.
	if sum := sha256.Sum256([]byte(filepath.Base(s.File) + "\x00" + s.Column)); sum[6]&1 == 1 {
		return Holdout
	}
	return Development
}

// Includes says whether s belongs to the sample.
func (p Sample) Includes(s *Series) bool { return p == Everything || p == s.Sample() }

// maxColumns bounds what a hostile file can make Read allocate; the widest
// public trace has about a thousand.
const maxColumns = 65536

// Read parses one file: a header, then a time in the first column and one
// series in every other; an empty cell, NaN or NA is a gap. Times are unix
// seconds, RFC 3339 or "2006-01-02 15:04:05" (taken as UTC). Rows out of order
// are sorted. Units are the file's own.
func Read(r io.Reader, file string) ([]Series, error) {
	in := csv.NewReader(r)
	in.ReuseRecord = true
	head, err := in.Read()
	if err != nil {
		return nil, fmt.Errorf("header of %s: %w", file, err)
	}
	if len(head) < 2 || len(head) > maxColumns {
		return nil, fmt.Errorf("header of %s: %d columns, want a time and at least one series", file, len(head))
	}
	out := make([]Series, len(head)-1)
	for i := range out {
		out[i] = Series{File: file, Column: strings.TrimSpace(head[i+1])}
	}
	sorted := true
	for {
		row, err := in.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		line, _ := in.FieldPos(0)
		at, err := parseTime(row[0])
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, line, err)
		}
		for i := range out {
			text := strings.TrimSpace(row[i+1])
			switch strings.ToLower(text) {
			case "", "nan", "na", "null":
				continue
			}
			v, err := strconv.ParseFloat(text, 64)
			if err != nil || math.IsInf(v, 0) {
				return nil, fmt.Errorf("%s:%d: column %s: %q is not a number", file, line, out[i].Column, text)
			}
			s := &out[i]
			if n := len(s.Times); n > 0 && at.Before(s.Times[n-1]) {
				sorted = false
			}
			s.Times = append(s.Times, at)
			s.Values = append(s.Values, v)
		}
	}
	if !sorted {
		for i := range out {
			out[i].sort()
		}
	}
	return out, nil
}

func parseTime(text string) (time.Time, error) {
	text = strings.TrimSpace(text)
	if s, err := strconv.ParseFloat(text, 64); err == nil {
		// Beyond ±1e11 s the nanoseconds of time.Time's Unix form overflow soon after.
		if math.IsNaN(s) || math.Abs(s) > 9e9 {
			return time.Time{}, fmt.Errorf("time %q is out of range", text)
		}
		whole := math.Floor(s)
		return time.Unix(int64(whole), int64((s-whole)*1e9)).UTC(), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateTime} {
		if t, err := time.Parse(layout, text); err == nil {
			if y := t.Year(); y < 1700 || y > 2250 {
				return time.Time{}, fmt.Errorf("time %q is out of range", text)
			}
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("time %q is neither unix seconds, RFC 3339 nor YYYY-MM-DD HH:MM:SS", text)
}

func (s *Series) sort() {
	order := make([]int, len(s.Times))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return s.Times[a].Compare(s.Times[b]) })
	times, values := make([]time.Time, len(order)), make([]float64, len(order))
	for to, from := range order {
		times[to], values[to] = s.Times[from], s.Values[from]
	}
	s.Times, s.Values = times, values
}

// Step is the median interval between samples, which becomes the grid's.
func (s *Series) Step() (time.Duration, error) {
	gaps := make([]time.Duration, 0, len(s.Times))
	for i := 1; i < len(s.Times); i++ {
		if d := s.Times[i].Sub(s.Times[i-1]); d > 0 {
			gaps = append(gaps, d)
		}
	}
	if len(gaps) == 0 {
		return 0, fmt.Errorf("%s: column %s: fewer than two samples at different times", s.File, s.Column)
	}
	slices.Sort(gaps)
	return gaps[len(gaps)/2], nil
}

// grid is a series on a regular grid: the mean of every cell, NaN for a gap.
// Cell i is centred on start + i·step.
type grid struct {
	start time.Time
	step  time.Duration
	v     []float64
}

// maxCells bounds the grid: two years of seconds.
const maxCells = 1 << 26

func (s *Series) grid() (grid, error) {
	step, err := s.Step()
	if err != nil {
		return grid{}, err
	}
	start := s.Times[0]
	n := int64(s.Times[len(s.Times)-1].Sub(start)/step) + 2
	if n > maxCells {
		return grid{}, fmt.Errorf("%s: column %s: %d cells of %v are too many", s.File, s.Column, n, step)
	}
	g := grid{start: start, step: step, v: make([]float64, n)}
	count := make([]int32, n)
	last := 0
	for i, t := range s.Times {
		c := int((t.Sub(start) + step/2) / step)
		g.v[c] += s.Values[i]
		count[c]++
		last = max(last, c)
	}
	g.v = g.v[:last+1]
	for i := range g.v {
		if count[i] == 0 {
			g.v[i] = math.NaN()
			continue
		}
		g.v[i] /= float64(count[i])
	}
	return g, nil
}
