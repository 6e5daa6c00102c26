package encoding

import (
	"sync"
	"time"
)

// Cost is what an encoding makes of memory.
type Cost struct {
	// CPU is the processor time of a raw byte, in seconds.
	CPU float64
	// Ratio is the encoded length of a raw byte.
	Ratio float64
}

// Road is what encoded bytes have before them.
type Road struct {
	// Link is how many encoded bytes a second the link takes, 0 when that is not
	// known.
	Link float64
	// Send is the processor time of sending an encoded byte, in seconds.
	Send float64
	// Cores is how many cores may encode and send.
	Cores float64
}

// perByte is the time that a raw byte takes: whatever takes longer, the
// processors or the link, since they work beside each other.
func (r Road) perByte(c Cost) float64 {
	cpu := (c.CPU + c.Ratio*r.Send) / r.Cores
	if r.Link <= 0 {
		return cpu
	}
	return max(cpu, c.Ratio/r.Link)
}

// costs are those of all kinds, by their number.
type costs [Zstd + 1]Cost

// best is the kind that moves raw memory fastest. A dearer one must do so clearly:
// its processor time is taken from somebody, and costs are averages of content
// that differs. Each batch may take another, which costs nothing.
func (r Road) best(known costs) Kind {
	best := Raw
	for k := S2; k <= Zstd; k++ {
		if r.perByte(known[k]) < clearly[k]*r.perByte(known[best]) {
			best = k
		}
	}
	return best
}

// clearly is which part of a cheaper encoding's time a dearer one may take. Redis
// heaps, of which zstd makes 0.42 and s2 0.45, are not worth three times the
// processor time; PostgreSQL's buffers, 0.13 and 0.24, are.
var clearly = [Zstd + 1]float64{S2: 0.95, Zstd: 0.85}

const (
	// probeEvery is how often, in batches, a kind that is not used is tried when
	// the road would let it win if its content had become twice as good.
	probeEvery = 16
	// memory is how many batches an average looks back on.
	memory = 4
)

// assumed are the costs until the first batch: of redis and PostgreSQL heaps on
// a machine of 2020.
var assumed = costs{Raw: {0, 1}, S2: {0.8e-9, 0.5}, Zstd: {2.5e-9, 0.4}}

// Choice says which encoding to try, for all streams of a session: it keeps what
// the encodings cost and were worth, as averages over the last batches that
// shrank at all. What does not is each Encoder's own matter.
type Choice struct {
	// Road is asked for before every batch.
	Road func() Road

	mu    sync.Mutex
	known costs
	seen  [Zstd + 1]int // batches in the average
	last  [Zstd + 1]int // the batch that was tried last
	batch int
	now   Kind
}

// NewChoice makes a Choice that begins with s2.
func NewChoice(road func() Road) *Choice {
	return &Choice{Road: road, known: assumed, now: S2}
}

// kind is the one to try next.
func (c *Choice) kind() Kind {
	road := c.Road()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batch++
	c.now = road.best(c.known)
	probe := c.now
	defer func() { c.last[probe] = c.batch }()
	if c.batch%probeEvery != 0 {
		return c.now
	}
	for k := S2; k <= Zstd; k++ {
		hoped := Cost{CPU: c.known[k].CPU, Ratio: c.known[k].Ratio / 2}
		if k != c.now && road.perByte(hoped) < road.perByte(c.known[c.now]) && (probe == c.now || c.last[k] < c.last[probe]) {
			probe = k
		}
	}
	return probe
}

// saw enters what a batch took and became.
func (c *Choice) saw(k Kind, raw, encoded int, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen[k] < memory {
		c.seen[k]++
	}
	share := 1 / float64(c.seen[k])
	c.known[k].CPU += share * (took.Seconds()/float64(raw) - c.known[k].CPU)
	c.known[k].Ratio += share * (float64(encoded)/float64(raw) - c.known[k].Ratio)
}
