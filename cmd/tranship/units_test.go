package main

import (
	"strings"
	"testing"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func TestSizesAndRatesAreReadWithTheirUnits(t *testing.T) {
	for _, tt := range []struct {
		name  string
		parse func(string) (int64, error)
		in    string
		want  int64 // -1: an error
	}{
		{"megabytes of memory", parseSize, "512m", 512 << 20},
		{"upper case with i", parseSize, "1.5GiB", 3 << 29},
		{"plain bytes", parseSize, "4096", 4096},
		{"no number", parseSize, "m", -1},
		{"a negative size", parseSize, "-1m", -1},
		{"an unknown unit", parseSize, "5x", -1},
		{"nothing", parseSize, "", -1},
		{"an exponent", parseSize, "1e3", -1},
		{"more than an int64", parseSize, "99999999999t", -1},
		{"megabits as tc writes them", parseRate, "500mbit", 500e6},
		{"a gigabit", parseRate, "1gbit", 1e9},
		{"a fraction of a gigabit", parseRate, "2.5Gbit", 2.5e9},
		{"megabytes a second", parseRate, "50MB/s", 400e6},
		{"mebibytes a second", parseRate, "1MiB/s", 8 << 20},
		{"a rate without its unit", parseRate, "100", -1},
		{"a rate that is a size", parseRate, "100MB", -1},
		{"not a number", parseRate, "nanbit", -1},
		{"two points", parseRate, "1.2.3gbit", -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.parse(tt.in)
			if (err != nil) != (tt.want < 0) || err == nil && got != tt.want {
				t.Errorf("%q: %d %v, want %d", tt.in, got, err, tt.want)
			}
		})
	}
}

func FuzzUnits(f *testing.F) {
	for _, s := range []string{"512m", "1.5GiB", "500mbit", "50MB/s", "", "9e99t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, parse := range []func(string) (int64, error){parseSize, parseRate} {
			if n, err := parse(s); err == nil && n < 0 {
				t.Errorf("%q is %d", s, n)
			}
		}
	})
}

func TestProgressIsALinePerChange(t *testing.T) {
	var out strings.Builder
	now := time.Unix(0, 0)
	l := &lines{w: &out, now: func() time.Time { return now }}
	p := func(phase string, round uint32) *v1.Progress {
		return &v1.Progress{Id: "m1", Phase: phase, Round: round, BytesSent: 3 << 19, BytesPerSecond: 2.5e8, DirtyPagesPerSecond: 40, RemainingBytes: 1 << 30, EtaMs: 4321}
	}
	l.show(p("pre-copy", 1))
	l.show(p("pre-copy", 1)) // too soon
	now = now.Add(lineEvery)
	l.show(p("pre-copy", 1))
	l.show(p("pre-copy", 2))
	want := "m1: pre-copy round 1, 1.5MiB sent, 250MB/s, 40 pages/s dirtied, 1.0GiB left, 4.3s to go\n"
	if got := out.String(); got != want+want+strings.Replace(want, "round 1", "round 2", 1) {
		t.Errorf("%s", got)
	}
}

func TestABarFitsItsTerminal(t *testing.T) {
	var out strings.Builder
	b := &bar{w: &out, width: func() int { return 40 }}
	b.show(&v1.Progress{Phase: "pre-copy", RemainingBytes: 100, BytesSent: 1 << 30})
	b.show(&v1.Progress{Phase: "pre-copy", RemainingBytes: 50, BytesSent: 1 << 30})
	b.end()
	frames := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\r\x1b[K")[1:]
	if len(frames) != 2 || !strings.HasPrefix(frames[0], "[    ") || !strings.HasPrefix(frames[1], "[==========          ]") {
		t.Errorf("%q", frames)
	}
	for _, frame := range frames {
		if len(frame) > 39 {
			t.Errorf("%q is longer than the terminal is wide", frame)
		}
	}
}
