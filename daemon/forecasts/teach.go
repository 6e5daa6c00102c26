package forecasts

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"

	"github.com/tranship/tranship/ebpf/profile"
)

// Teach writes into the store at path, which no daemon has open, what a shard's
// forecasters learn from its past: means of ten seconds, oldest first. It is for
// a shard whose history was recorded elsewhere; the forecasters are those that
// would have watched it. What the store has of the shard is replaced.
func Teach(path, key string, labels Labels, past iter.Seq[*profile.Point]) (err error) {
	k, err := Open(path, "", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	sh := &shard{labels: labels}
	for pt := range past {
		if c := cellOf(pt); c.start.Before(sh.until) {
			return fmt.Errorf("the past of %s: %v comes after %v", key, pt.Start, sh.until)
		} else {
			k.feed(sh, c)
		}
	}
	if sh.samples() == 0 {
		return fmt.Errorf("the past of %s is empty", key)
	}
	return k.store.write(map[string][]byte{key: encodeShard(sh)}, nil)
}
