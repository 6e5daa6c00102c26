// Package redischeck fills a redis with keys whose values can be recomputed,
// writes and verifies them over one connection while the server is moved, and
// reads everything back. It owns the redis database that it is pointed to, and
// refuses to check one that it did not fill.
//
// What a key should hold is a function of its number, its generation and the
// seed of the data set; the checker remembers only generations. Which is why a
// server that came back with an older value is caught, not only one with a
// damaged value.
package redischeck

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/tranship/tranship/integration/workload/check"
)

const (
	metaKey    = "tranship:meta"
	counterKey = "tranship:counter"
	probeKey   = "tranship:probe"
	// extraKeys is how many keys there are besides the numbered ones, at most.
	extraKeys = 3
)

// Dataset describes what load put there; it lies in redis under metaKey.
type Dataset struct {
	Keys  int    `json:"keys"`
	Bytes int64  `json:"bytes"` // of values
	Seed  uint64 `json:"seed"`
}

// plan counts the keys that make about the wanted number of bytes.
func plan(want int64, seed uint64) Dataset {
	d := Dataset{Seed: seed}
	for d.Bytes < want {
		d.Bytes += int64(d.size(d.Keys))
		d.Keys++
	}
	return d
}

// size of a value: from 512 bytes to 16 KiB, 5.25 KiB on average, and fixed for
// a key, so that the server's heap does not grow under overwriting.
func (d Dataset) size(key int) int { return 512 << (check.Mix(d.Seed^uint64(key)) % 6) }

func keyName(key int) []byte { return fmt.Appendf(nil, "tranship:%08d", key) }

// append renders what the key holds in a generation: its name, the generation,
// and content that follows from both.
func (d Dataset) append(dst []byte, key int, gen uint32) []byte {
	from := len(dst)
	dst = fmt.Appendf(dst, "tranship:%08d %d\n", key, gen)
	head := len(dst) - from
	body := d.size(key) - head
	dst = append(dst, make([]byte, body)...)
	check.Fill(dst[from+head:], check.Mix(d.Seed)^check.Mix(uint64(key)<<32|uint64(gen)))
	return dst
}

// generation reads the head of a value and checks that it belongs to the key.
func generation(key int, value []byte) (uint32, error) {
	head, _, ok := bytes.Cut(value, []byte("\n"))
	name, gen, ok2 := bytes.Cut(head, []byte(" "))
	if !ok || !ok2 || !bytes.Equal(name, keyName(key)) {
		return 0, fmt.Errorf("key %s holds %.40q, which is not its own value", keyName(key), value)
	}
	n, err := strconv.ParseUint(string(gen), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("key %s holds %.40q, which has no generation", keyName(key), value)
	}
	return uint32(n), nil
}

// compare says how value differs from what key should hold in generation gen.
func (d Dataset) compare(key int, gen uint32, value, scratch []byte) error {
	want := d.append(scratch[:0], key, gen)
	if bytes.Equal(value, want) {
		return nil
	}
	if got, err := generation(key, value); err != nil {
		return err
	} else if got != gen {
		return fmt.Errorf("key %s holds generation %d, but %d was acknowledged", keyName(key), got, gen)
	}
	at := 0
	for at < len(value) && at < len(want) && value[at] == want[at] {
		at++
	}
	return fmt.Errorf("key %s, generation %d: %d bytes instead of %d, different from byte %d on", keyName(key), gen, len(value), len(want), at)
}

// State is what run knows at its end: verify compares with it exactly.
type State struct {
	Dataset     Dataset  `json:"dataset"`
	Generations []uint32 `json:"generations"`
	Counter     int64    `json:"counter"`
}

// SaveState writes s to path.
func SaveState(path string, s State) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("state %s: %w", path, err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// LoadState reads what SaveState wrote.
func LoadState(path string) (State, error) {
	var s State
	raw, err := os.ReadFile(path)
	if err != nil {
		return s, fmt.Errorf("state: %w", err)
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		return s, fmt.Errorf("state %s: %w", path, err)
	}
	if s.Dataset.Keys != len(s.Generations) {
		return s, fmt.Errorf("state %s: %d keys, but %d generations", path, s.Dataset.Keys, len(s.Generations))
	}
	return s, nil
}

// errNotOurs is a redis that load did not fill.
var errNotOurs = errors.New("this redis was not filled by load")
