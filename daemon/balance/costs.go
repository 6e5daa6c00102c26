package balance

import (
	"time"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// costs are what migrations from here really cost, for the next plans.
type costs struct {
	// Link is bytes/s of memory that rounds of a migration carried, 0 unknown.
	Link float64 `json:"link"`
	// Fixed is a blackout without its last pages, 0 unknown.
	Fixed  time.Duration                  `json:"fixed"`
	Shards map[allocate.ShardID]shardCost `json:"shards"`
}

type shardCost struct {
	At    time.Time `json:"at"`
	Dirty float64   `json:"dirty"` // bytes/s
	Share float64   `json:"share"` // of its memory that a move carried; 0 unknown
}

const (
	// weightOfLast is the last move's in a mean of all before: links and disks
	// change seldom, and single moves meet bursts.
	weightOfLast = 0.3
	// tellingBytes: smaller rounds measure round trips, not a link.
	tellingBytes = 4 << 20
	// dirtyFor: how long what a migration saw of a shard's writes is better than
	// the profiler's measurements, which last a second.
	dirtyFor = 30 * time.Minute
	// defaultLink, bytes/s, where neither the interface nor a move has told: 1 Gbit/s.
	defaultLink = 125e6
	maxCosts    = 1024
)

func (c *costs) dirty(now time.Time, id allocate.ShardID) (float64, bool) {
	s, ok := c.Shards[id]
	return s.Dirty, ok && now.Sub(s.At) < dirtyFor && now.Sub(s.At) > -dirtyFor
}

func (c *costs) share(id allocate.ShardID) float64 {
	if s := c.Shards[id]; s.Share > 0 {
		return s.Share
	}
	return 1
}

// link is what plans count on: what moves showed, and never more than the
// interface has.
func (c *costs) link(interfaces float64) float64 {
	switch {
	case c.Link > 0 && interfaces > 0:
		return min(c.Link, interfaces)
	case c.Link > 0:
		return c.Link
	case interfaces > 0:
		return min(interfaces, defaultLink)
	}
	return defaultLink
}

func (c *costs) blackout() time.Duration { return c.Fixed }

// learn takes what a migration did with a shard that was thought to carry so
// many bytes, and returns it as a cost.
func (c *costs) learn(now time.Time, id allocate.ShardID, used float64, m *v1.Migration) *v1.BalanceCost {
	rounds := m.GetRounds()
	raw, ms := 0.0, 0.0
	rewritten, while := 0.0, 0.0
	for i, r := range rounds {
		raw += float64(r.GetBytesRaw())
		ms += r.GetMs()
		if i > 0 {
			rewritten += float64(r.GetBytesRaw())
			while += rounds[i-1].GetMs()
		}
	}
	s := shardCost{At: now}
	if while > 0 {
		s.Dirty = rewritten / while * 1e3
	}
	if len(rounds) > 0 && used > 0 {
		s.Share = min(1, float64(rounds[0].GetBytesRaw())/used)
	}
	c.put(id, s)
	if raw >= tellingBytes && ms > 0 {
		c.Link = blend(c.Link, raw/ms*1e3)
	}
	if blackout := m.GetBlackoutMs(); blackout > 0 {
		if len(rounds) > 0 {
			blackout = max(0, blackout-rounds[len(rounds)-1].GetMs())
		}
		c.Fixed = time.Duration(blend(float64(c.Fixed), blackout*1e6))
	}
	return &v1.BalanceCost{Bytes: float64(m.GetBytesSent()), TookMs: m.GetTotalMs(), BlackoutMs: m.GetBlackoutMs(), DirtyBytesPerSecond: s.Dirty}
}

func blend(old, last float64) float64 {
	if old == 0 {
		return last
	}
	return old + weightOfLast*(last-old)
}

// adopt takes what the source saw of a shard that came here.
func (c *costs) adopt(now time.Time, id allocate.ShardID, dirty float64) {
	c.put(id, shardCost{At: now, Dirty: dirty})
}

func (c *costs) put(id allocate.ShardID, s shardCost) {
	if c.Shards == nil {
		c.Shards = map[allocate.ShardID]shardCost{}
	}
	c.Shards[id] = s
	for len(c.Shards) > maxCosts {
		oldest, at := allocate.ShardID(""), time.Time{}
		for id, s := range c.Shards {
			if oldest == "" || s.At.Before(at) {
				oldest, at = id, s.At
			}
		}
		delete(c.Shards, oldest)
	}
}
