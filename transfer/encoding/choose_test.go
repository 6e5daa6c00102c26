package encoding

import (
	"testing"
	"time"
)

const mbit = 1e6 / 8

func TestTheEncodingThatMovesMemoryFastestIsChosen(t *testing.T) {
	heap := costs{Raw: {0, 1}, S2: {0.7e-9, 0.35}, Zstd: {2.2e-9, 0.25}}
	hard := costs{Raw: {0, 1}, S2: {1e-9, 0.93}, Zstd: {3e-9, 0.9}}
	letters := costs{Raw: {0, 1}, S2: {1e-9, 1}, Zstd: {3e-9, 0.75}}
	tests := []struct {
		name  string
		link  float64
		cores float64
		known costs
		want  Kind
	}{
		{"a slow link takes what is smallest", 100 * mbit, 1, heap, Zstd},
		{"so does a modem", 1 * mbit, 1, heap, Zstd},
		{"at a gigabit one core has no time for zstd", 1000 * mbit, 1, heap, S2},
		{"at a gigabit four cores have", 1000 * mbit, 4, heap, Zstd},
		{"and not at ten", 10_000 * mbit, 4, heap, S2},
		{"an unknown link is none", 0, 1, heap, S2},
		{"what hardly shrinks goes raw over a fast link", 10_000 * mbit, 1, hard, Raw},
		{"and as s2 on a slow one", 100 * mbit, 1, hard, S2},
		{"letters without repetition are for zstd on a slow link", 100 * mbit, 1, letters, Zstd},
		{"and raw on a fast one", 4000 * mbit, 1, letters, Raw},
		{"a little less on the link is not worth zstd's time", 100 * mbit, 1, costs{Raw: {0, 1}, S2: {0.8e-9, 0.45}, Zstd: {2.5e-9, 0.42}}, S2},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			road := Road{Link: test.link, Send: 2.5e-9, Cores: test.cores}
			if got := road.best(test.known); got != test.want {
				t.Errorf("kind %d, want %d (%.2f, %.2f, %.2f ns a byte)", got, test.want,
					1e9*road.perByte(test.known[Raw]), 1e9*road.perByte(test.known[S2]), 1e9*road.perByte(test.known[Zstd]))
			}
		})
	}
}

// run lets a Choice decide over batches that cost what truth says.
func run(c *Choice, truth costs, batches int) (used [Zstd + 1]int) {
	for range batches {
		k := c.kind()
		used[k]++
		if k != Raw {
			c.saw(k, 1e6, int(1e6*truth[k].Ratio), time.Duration(1e6*1e9*truth[k].CPU))
		}
	}
	return used
}

func TestTheChoiceFollowsLinkAndContent(t *testing.T) {
	heap := costs{Raw: {0, 1}, S2: {0.7e-9, 0.35}, Zstd: {2.2e-9, 0.25}}
	hard := costs{Raw: {0, 1}, S2: {1e-9, 0.93}, Zstd: {3e-9, 0.9}}
	road := Road{Link: 4000 * mbit, Send: 2.5e-9, Cores: 1}
	c := NewChoice(func() Road { return road })
	const settle = 6 * probeEvery
	steps := []struct {
		name  string
		link  float64
		truth costs
		want  Kind
	}{
		{"a fast link", 4000 * mbit, heap, S2},
		{"becomes slow", 100 * mbit, heap, Zstd},
		{"and fast again", 4000 * mbit, heap, S2},
		{"then comes what hardly shrinks", 4000 * mbit, hard, Raw},
		{"then heap", 4000 * mbit, heap, S2},
	}
	for _, step := range steps {
		road.Link = step.link
		run(c, step.truth, settle)
		if used := run(c, step.truth, 100); used[step.want] < 100-100/probeEvery-1 {
			t.Errorf("%s: raw, s2, zstd were used %v times, want kind %d", step.name, used, step.want)
		}
	}
}

func TestAKindThatCannotWinIsNotTried(t *testing.T) {
	c := NewChoice(func() Road { return Road{Link: 20_000 * mbit, Send: 2.5e-9, Cores: 1} })
	if used := run(c, costs{Raw: {0, 1}, S2: {0.7e-9, 0.3}, Zstd: {2.2e-9, 0.2}}, 1000); used[Zstd] > 0 {
		t.Errorf("zstd was tried %d times on a link of 20 Gbit/s", used[Zstd])
	}
}
