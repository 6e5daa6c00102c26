package image

import (
	"fmt"
	"io"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/stats"
)

const statsMagic magic = 0x57093306

// Part is one measured part of what CRIU did.
type Part struct {
	Name string
	Took time.Duration
}

// ReadStats reads CRIU's own times from stats-dump or stats-restore (criu/stats.c),
// which it writes into its work directory, in microseconds, by its own clock.
func ReadStats(r io.Reader) ([]Part, error) {
	e, err := openImage(r, statsMagic)
	if err != nil {
		return nil, fmt.Errorf("stats: %w", err)
	}
	var s stats.StatsEntry
	if err := e.only(&s); err != nil {
		return nil, fmt.Errorf("stats: %w", err)
	}
	us := func(name string, n uint32) Part { return Part{name, time.Duration(n) * time.Microsecond} }
	switch d, re := s.GetDump(), s.GetRestore(); {
	case d != nil:
		return []Part{
			us("freeze", d.GetFreezingTime()),
			us("memory", d.GetMemdumpTime()), us("write memory", d.GetMemwriteTime()),
			// From its freezing to its thawing, the others included.
			us("frozen", d.GetFrozenTime()),
		}, nil
	case re != nil:
		return []Part{us("fork", re.GetForkingTime()), us("restore", re.GetRestoreTime())}, nil
	}
	return nil, fmt.Errorf("stats: %w", malformed("neither of a dump nor of a restore"))
}
