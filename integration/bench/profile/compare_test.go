package profile

import (
	"math/rand/v2"
	"testing"
)

func TestTheMediansBoundsHoldIt(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const times, truth = 400, 0.98
	held := 0
	for range times {
		with, without := make([]float64, leastRounds), make([]float64, leastRounds)
		for i := range with {
			with[i], without[i] = truth*(1+0.1*r.NormFloat64()), 1
		}
		ratio, low, high := compare(with, without)
		if low > ratio || ratio > high {
			t.Fatalf("%v is not between %v and %v", ratio, low, high)
		}
		if low <= truth && truth <= high {
			held++
		}
	}
	if held < times*93/100 {
		t.Errorf("the truth is within the bounds %d of %d times", held, times)
	}
}
