package forecasts

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tranship/tranship/predict"
)

// A shard's state, on disk and between hosts, little endian:
//
//	version u8 | end of the newest cell, unix ms i64 | tenant, workload, scope of
//	the lenders: u16 length and bytes each | for every signal: u32 length and
//	the forecaster's own state, 0 for none

const stateVersion = 1

// maxShard bounds a state: it may come from another host.
const maxShard = signals*(predict.MaxState+4) + 4096

var errState = errors.New("state of a shard's forecasters")

func encodeShard(sh *shard) []byte {
	b := []byte{stateVersion}
	b = binary.LittleEndian.AppendUint64(b, uint64(sh.until.UnixMilli()))
	for _, s := range []string{sh.labels.Tenant, sh.labels.Workload, sh.borrowed} {
		s = s[:min(len(s), 1024)]
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	for _, f := range sh.series {
		var raw []byte
		if f != nil {
			// It fails for a forecaster that holds what it would refuse to read,
			// which is then better lost.
			raw, _ = f.MarshalBinary()
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(raw)))
		b = append(b, raw...)
	}
	return b
}

// parseShard refuses what is cut, damaged, of another version or of another
// configuration.
func parseShard(raw []byte) (*shard, error) {
	if len(raw) > maxShard {
		return nil, fmt.Errorf("%w: %d bytes", errState, len(raw))
	}
	sh := &shard{}
	cut := func(n int) []byte {
		if n > len(raw) {
			raw = nil
			return nil
		}
		b := raw[:n:n]
		raw = raw[n:]
		return b
	}
	head := cut(9)
	if head == nil || head[0] != stateVersion {
		return nil, fmt.Errorf("%w: cut, or of another version", errState)
	}
	sh.until = time.UnixMilli(int64(binary.LittleEndian.Uint64(head[1:])))
	for _, s := range []*string{&sh.labels.Tenant, &sh.labels.Workload, &sh.borrowed} {
		n := cut(2)
		if n == nil {
			return nil, fmt.Errorf("%w: cut", errState)
		}
		text := cut(int(binary.LittleEndian.Uint16(n)))
		if text == nil && binary.LittleEndian.Uint16(n) > 0 {
			return nil, fmt.Errorf("%w: cut", errState)
		}
		*s = string(text)
	}
	for i := range sh.series {
		n := cut(4)
		if n == nil {
			return nil, fmt.Errorf("%w: cut", errState)
		}
		size := binary.LittleEndian.Uint32(n)
		if size == 0 {
			continue
		}
		if size > predict.MaxState {
			return nil, fmt.Errorf("%w: %v takes %d bytes", errState, Signals[i], size)
		}
		one := cut(int(size))
		if one == nil {
			return nil, fmt.Errorf("%w: cut", errState)
		}
		f := newForecaster()
		if err := f.UnmarshalBinary(one); err != nil {
			return nil, fmt.Errorf("%w: %v: %w", errState, Signals[i], err)
		}
		if c := f.Config(); c.Step != step || !slices.Equal(c.Horizons, horizons()) {
			return nil, fmt.Errorf("%w: %v is of another configuration", errState, Signals[i])
		}
		sh.series[i] = f
	}
	if len(raw) != 0 {
		return nil, fmt.Errorf("%w: %d bytes too many", errState, len(raw))
	}
	return sh, nil
}

// untilOf reads only how new a state is.
func untilOf(raw []byte) time.Time {
	if len(raw) < 9 || raw[0] != stateVersion {
		return time.Time{}
	}
	return time.UnixMilli(int64(binary.LittleEndian.Uint64(raw[1:])))
}
