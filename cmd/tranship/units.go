package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A unit and how many bytes, or bits per second, it is. Longer suffixes first:
// "mb" ends in "b".
type unit struct {
	suffix string
	scale  float64
}

// Sizes of memory are powers of two under either spelling, as with docker run.
var sizeUnits = []unit{
	{"kib", 1 << 10},
	{"mib", 1 << 20},
	{"gib", 1 << 30},
	{"tib", 1 << 40},
	{"kb", 1 << 10},
	{"mb", 1 << 20},
	{"gb", 1 << 30},
	{"tb", 1 << 40},
	{"k", 1 << 10},
	{"m", 1 << 20},
	{"g", 1 << 30},
	{"t", 1 << 40},
	{"b", 1},
	{"", 1},
}

// Rates of links are powers of ten: bits as tc writes them, bytes as files do.
var rateUnits = []unit{
	{"kbit/s", 1e3},
	{"mbit/s", 1e6},
	{"gbit/s", 1e9},
	{"bit/s", 1},
	{"kbit", 1e3},
	{"mbit", 1e6},
	{"gbit", 1e9},
	{"bit", 1},
	{"kib/s", 8 << 10},
	{"mib/s", 8 << 20},
	{"gib/s", 8 << 30},
	{"kb/s", 8e3},
	{"mb/s", 8e6},
	{"gb/s", 8e9},
	{"b/s", 8},
}

// parseSize reads 512m, 1.5GiB or a number of bytes.
func parseSize(s string) (int64, error) {
	n, err := parseUnit(s, sizeUnits)
	if err != nil {
		return 0, fmt.Errorf("size %q: write it like 512m or 2g", s)
	}
	return n, nil
}

// parseRate reads 500mbit, 1gbit or 50MB/s, in bits per second.
func parseRate(s string) (int64, error) {
	n, err := parseUnit(s, rateUnits)
	if err != nil {
		return 0, fmt.Errorf("rate %q: write it like 500mbit, 1gbit or 50MB/s", s)
	}
	return n, nil
}

func parseUnit(s string, units []unit) (int64, error) {
	for _, u := range units {
		number, ok := strings.CutSuffix(strings.ToLower(s), u.suffix)
		if !ok {
			continue
		}
		// Only digits and a point: ParseFloat also takes 1e9, 0x10, inf and nan.
		if number == "" || strings.Trim(number, "0123456789.") != "" {
			return 0, strconv.ErrSyntax
		}
		f, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return 0, err
		}
		if f *= u.scale; f >= math.MaxInt64 {
			return 0, strconv.ErrRange
		}
		return int64(math.Round(f)), nil
	}
	return 0, strconv.ErrSyntax
}

// formatSize is short: 1.5GiB, 640KiB.
func formatSize(n int64) string {
	return format(float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB"}, "")
}

// formatRate takes bytes per second.
func formatRate(n float64) string { return format(n, 1000, []string{"B", "kB", "MB", "GB"}, "/s") }

func format(v, step float64, names []string, per string) string {
	i := 0
	for v >= step && i < len(names)-1 {
		v /= step
		i++
	}
	digits := 0
	if i > 0 && v < 10 {
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + names[i] + per
}
