package transfer

import (
	"math/rand/v2"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

func TestClaims(t *testing.T) {
	type extent struct{ from, to uint64 }
	tests := []struct {
		name   string
		before []extent
		claim  extent
		free   bool
	}{
		{"the first", nil, extent{1, 2}, true},
		{"one after another", []extent{{1, 2}}, extent{2, 3}, true},
		{"one before another", []extent{{2, 3}}, extent{1, 2}, true},
		{"one that fills a gap", []extent{{1, 2}, {3, 4}}, extent{2, 3}, true},
		{"the same again", []extent{{1, 2}}, extent{1, 2}, false},
		{"one inside", []extent{{1, 9}}, extent{4, 5}, false},
		{"one around", []extent{{4, 5}}, extent{1, 9}, false},
		{"one that overlaps the begin", []extent{{4, 6}}, extent{3, 5}, false},
		{"one that overlaps the end", []extent{{4, 6}}, extent{5, 7}, false},
		{"one inside what melted together", []extent{{1, 2}, {3, 4}, {2, 3}}, extent{1, 3}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := newClaims()
			for _, e := range test.before {
				if err := c.add(1, e.from*page, e.to*page); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.add(1, test.claim.from*page, test.claim.to*page); (err == nil) != test.free {
				t.Error(err)
			}
			if err := c.add(2, test.claim.from*page, test.claim.to*page); err != nil {
				t.Errorf("of another process: %v", err)
			}
		})
	}
}

func TestClaimsAgreeWithAModelAndStaySmall(t *testing.T) {
	const pages = 400
	rng := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		c := newClaims()
		var taken [pages]bool
		for range 600 {
			from := rng.IntN(pages)
			to := min(from+1+rng.IntN(6), pages)
			free := true
			for i := from; i < to; i++ {
				free = free && !taken[i]
			}
			if err := c.add(1, uint64(from)*page, uint64(to)*page); (err == nil) != free {
				t.Fatalf("[%d, %d): %v, free: %v", from, to, err, free)
			}
			for i := from; free && i < to; i++ {
				taken[i] = true
			}
		}
		runs := 0
		for i := range taken {
			if taken[i] && (i == 0 || !taken[i-1]) {
				runs++
			}
		}
		if got := c.spans[checkpoint.PID(1)].Len(); got != runs {
			t.Errorf("%d spans for %d runs", got, runs)
		}
	}
}
