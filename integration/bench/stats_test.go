package main

import (
	"math"
	"testing"
)

func TestQuantilesInterpolateBetweenOrderStatistics(t *testing.T) {
	tests := []struct {
		name    string
		samples []float64
		q, want float64
	}{
		{"the median of an odd number", []float64{9, 1, 5}, 0.5, 5},
		{"the median of an even number", []float64{4, 1, 3, 2}, 0.5, 2.5},
		{"a quartile between two samples", []float64{1, 2, 3, 4}, 0.25, 1.75},
		{"the smallest", []float64{3, 1, 2}, 0, 1},
		{"the largest", []float64{3, 1, 2}, 1, 3},
		{"one sample", []float64{7}, 0.9, 7},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := quantile(test.samples, test.q); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
	if got := quantile(nil, 0.5); !math.IsNaN(got) {
		t.Errorf("of nothing: %v", got)
	}
}

func TestQuantileLeavesItsSamplesInOrder(t *testing.T) {
	samples := []float64{3, 1, 2}
	quantile(samples, 0.5)
	if samples[0] != 3 || samples[1] != 1 {
		t.Errorf("they are %v now", samples)
	}
}

func TestTheWorstOfAHundredIsTheSecondLargest(t *testing.T) {
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(i+1))
	}
	if got := worst99(hundred); got != 99 {
		t.Errorf("of a hundred: %v", got)
	}
	if got := worst99(hundred[:50]); got != 50 {
		t.Errorf("of fifty: %v, and the largest is 50", got)
	}
	if got := worst99(nil); !math.IsNaN(got) {
		t.Errorf("of nothing: %v", got)
	}
}

func TestASummaryHasTheSpreadOfTheMiddleHalf(t *testing.T) {
	s := summarize([]float64{80, 90, 100, 110, 200})
	if s.N != 5 || s.Median != 100 || s.Min != 80 || s.Max != 200 || s.Spread != 0.1 {
		t.Errorf("%+v", s)
	}
	if s := summarize(nil); s != (summary{}) {
		t.Errorf("of nothing: %+v", s)
	}
}

func TestASlopeIsThatOfTheLine(t *testing.T) {
	got, err := slope([]float64{0.25, 1, 4}, []float64{110 + 25, 110 + 100, 110 + 400})
	if err != nil || math.Abs(got-100) > 1e-9 {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := slope([]float64{0, 1, 2}, []float64{1, 5, 3}); err != nil || math.Abs(got-1) > 1e-9 {
		t.Errorf("of a cloud: %v, %v", got, err)
	}
	for _, x := range [][]float64{nil, {1}, {2, 2}} {
		if got, err := slope(x, make([]float64, len(x))); err == nil {
			t.Errorf("of %v: %v", x, got)
		}
	}
}
