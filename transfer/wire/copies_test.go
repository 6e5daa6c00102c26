package wire

import (
	"errors"
	"math"
	"testing"
)

func copiesOf(runs ...Copy) Copies {
	c := Copies{Seed: 7, Runs: runs}
	for _, run := range runs {
		if run.Pages <= 2*MaxCopies {
			c.Sums = append(c.Sums, make([]byte, sumLen*run.Pages)...)
		}
	}
	return c
}

func TestCopies(t *testing.T) {
	full := make([]Copy, MaxCopies)
	for i := range full {
		full[i] = Copy{PID: math.MaxInt32, Addr: MaxAddr - page, FromPID: math.MaxInt32, From: MaxAddr - page, Pages: 1}
	}
	for name, c := range map[string]Copies{
		"of one page":              copiesOf(Copy{PID: 1, Addr: 0x1000, FromPID: 2, From: 0x9000, Pages: 1}),
		"of runs":                  copiesOf(Copy{PID: 1, FromPID: 2, Pages: 300}, Copy{PID: 2, Addr: 0x1000, FromPID: 2, From: 0x9000, Pages: 2}),
		"of another shard":         copiesOf(Copy{PID: 1, Addr: 0x1000, Pages: 300}),
		"of as many as may be":     copiesOf(Copy{PID: 1, FromPID: 2, Pages: MaxCopies}),
		"as large as a frame gets": copiesOf(full...),
	} {
		t.Run(name, func(t *testing.T) { conforms(t, TypeCopies, c) })
	}
}

func TestCopiesAreRefused(t *testing.T) {
	one := Copy{PID: 1, Addr: 0x1000, FromPID: 2, From: 0x9000, Pages: 1}
	change := func(f func(*Copy)) Copies {
		c := one
		f(&c)
		return copiesOf(c)
	}
	short := copiesOf(one)
	short.Sums = short.Sums[1:]
	tests := []struct {
		name string
		c    Copies
		want error
	}{
		{"of nothing", copiesOf(), ErrMalformed},
		{"of no process", change(func(c *Copy) { c.PID = 0 }), ErrMalformed},
		{"from no process", change(func(c *Copy) { c.FromPID = 0 }), ErrMalformed},
		{"of no pages", change(func(c *Copy) { c.Pages = 0 }), ErrMalformed},
		{"that end outside", change(func(c *Copy) { c.Addr, c.Pages = MaxAddr-page, 2 }), ErrLimit},
		{"from outside", change(func(c *Copy) { c.From, c.Pages = MaxAddr-page, 2 }), ErrLimit},
		{"of too many pages", change(func(c *Copy) { c.Pages = MaxCopies + 1 }), ErrLimit},
		{"of too many pages in sum", copiesOf(Copy{PID: 1, FromPID: 2, Pages: MaxCopies}, one), ErrLimit},
		{"with half a hash", short, ErrMalformed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw := test.c.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err == nil {
				_, err = ParseCopies(raw[head:])
			}
			if !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}
