package main

import (
	"errors"
	"math"
	"slices"
)

// summary is what the table says of a series of samples.
type summary struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	// Spread is half of the distance between the quartiles, over the median: 0.1
	// says that the middle half of the samples lies within about 10 % of it.
	Spread float64 `json:"spread"`
}

// summarize describes samples; none give the zero value.
func summarize(samples []float64) summary {
	if len(samples) == 0 {
		return summary{}
	}
	s := summary{N: len(samples), Median: quantile(samples, 0.5), Min: slices.Min(samples), Max: slices.Max(samples)}
	if s.Median != 0 {
		s.Spread = (quantile(samples, 0.75) - quantile(samples, 0.25)) / 2 / math.Abs(s.Median)
	}
	return s
}

func median(samples []float64) float64 { return quantile(samples, 0.5) }

// quantile interpolates between order statistics (Hyndman and Fan, type 7, as R
// and NumPy do), for q from 0 to 1. Of no samples it is NaN.
func quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(samples))
	at := q * float64(len(sorted)-1)
	low := int(math.Floor(at))
	if low+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// worst99 is the 99th percentile by nearest rank: a value that was measured, of
// fewer than a hundred samples the largest one.
func worst99(samples []float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[int(math.Ceil(0.99*float64(len(sorted))))-1]
}

var errNoSlope = errors.New("a slope needs two different sizes")

// slope is what y grows by per unit of x, by least squares.
func slope(x, y []float64) (float64, error) {
	if len(x) != len(y) || len(x) < 2 {
		return 0, errNoSlope
	}
	var meanX, meanY float64
	for i := range x {
		meanX += x[i] / float64(len(x))
		meanY += y[i] / float64(len(y))
	}
	var sxy, sxx float64
	for i := range x {
		sxy += (x[i] - meanX) * (y[i] - meanY)
		sxx += (x[i] - meanX) * (x[i] - meanX)
	}
	if sxx == 0 {
		return 0, errNoSlope
	}
	return sxy / sxx, nil
}
