package forecasts

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"
)

func aState(t testing.TB, k *Keeper) []byte {
	t.Helper()
	feedAll(k, "default/web", Labels{"acme", "web"}, 0, 60)
	raw, err := k.State("default/web")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestAStateIsReadAsItWasWritten(t *testing.T) {
	raw := aState(t, open(t, filepath.Join(t.TempDir(), "f.db")))
	sh, err := parseShard(raw)
	if err != nil {
		t.Fatal(err)
	}
	if sh.labels != (Labels{"acme", "web"}) || !sh.until.Equal(used(60).Start) || !slices.Equal(encodeShard(sh), raw) {
		t.Errorf("%+v", sh)
	}
}

func TestAStateThatIsCutOrDamagedIsRefused(t *testing.T) {
	raw := aState(t, open(t, filepath.Join(t.TempDir(), "f.db")))
	for n := 0; n < len(raw); n += 1 + n/16 {
		if _, err := parseShard(raw[:n]); !errors.Is(err, errState) {
			t.Fatalf("cut at %d of %d: %v", n, len(raw), err)
		}
	}
	if _, err := parseShard(append(slices.Clone(raw), 0)); !errors.Is(err, errState) {
		t.Errorf("one byte too many: %v", err)
	}
	bad := slices.Clone(raw)
	bad[len(bad)/3] ^= 1
	if _, err := parseShard(bad); !errors.Is(err, errState) {
		t.Errorf("a flipped bit: %v", err)
	}
	if _, err := parseShard(make([]byte, maxShard+1)); !errors.Is(err, errState) {
		t.Errorf("too large: %v", err)
	}
}

func TestAStateOnDiskThatIsDamagedMakesAColdShard(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	if err := k.store.write(map[string][]byte{"default/web": []byte("no state")}, nil); err != nil {
		t.Fatal(err)
	}
	feedAll(k, "default/web", Labels{}, 0, 3)
	if k.counts.lost != 1 || k.shards["default/web"].samples() != 3 {
		t.Errorf("%v lost, %d samples", k.counts.lost, k.shards["default/web"].samples())
	}
}

func FuzzParseShard(f *testing.F) {
	f.Add(encodeShard(&shard{labels: Labels{"acme", "web"}, until: begin}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if sh, err := parseShard(raw); err == nil && len(encodeShard(sh)) == 0 {
			t.Error("a state without bytes")
		}
	})
}
