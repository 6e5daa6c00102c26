package steward

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/workloads"
)

// A new image that no host can have stops nothing that runs.
func TestWhatCannotBeReplacedRunsOn(t *testing.T) {
	p := newPool(t, "a", "b")
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	images := func() (out []string) {
		for _, h := range p.hosts {
			h.set(func() {
				for _, s := range h.shards {
					out = append(out, s.Image)
				}
			})
		}
		return out
	}
	was := images()
	for _, h := range p.hosts {
		h.set(func() {
			h.fail = func(op, what string) error {
				if op == "image" && what == "none:1" {
					return errors.New("it could not be pulled")
				}
				return nil
			}
		})
	}
	web := spec("web")
	web.Image = "none:1"
	if got, _, why := p.change(t, "b", apply(web)); got != outcomeFailed || !strings.Contains(why, "it could not be pulled") {
		t.Errorf("%s %s", got, why)
	}
	p.mustBe(t, "web-0", "web-1", "web-2")
	if now := images(); strings.Join(now, " ") != strings.Join(was, " ") {
		t.Errorf("they ran %v, and run %v", was, now)
	}
	web.Image = "next:1"
	if got, _, why := p.change(t, "b", apply(web)); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	for _, image := range images() {
		if image != "next:1" {
			t.Errorf("a shard runs %s", image)
		}
	}
}

// A volume that moves with its shard begins empty, wherever the shard is placed;
// one that is shared has to be there.
func TestVolumesAreMadeOrMissed(t *testing.T) {
	p := newPool(t, "a")
	a, dir := p.hosts["a"], t.TempDir()
	web := spec("web")
	web.Shards = 2
	web.Volumes = []workloads.Volume{{Kind: "copy", Source: dir + "/of/{index}", Destination: "/data"}}
	a.set(func() {
		a.fail = func(op, shard string) error {
			if op == "run" && shard == "web-1" {
				return errors.New("no room on the disk")
			}
			return nil
		}
	})
	if got, _, why := p.change(t, "a", apply(web)); got != outcomeFailed {
		t.Fatalf("%s %s", got, why)
	}
	there := func(name string) bool { _, err := os.Stat(filepath.Join(dir, name)); return err == nil }
	if there("of/1") {
		t.Error("what was made for a shard that did not start is left")
	}
	a.set(func() { a.fail = nil })
	if got, _, why := p.change(t, "a", apply(web)); got != outcomeDone || !there("of/0") || !there("of/1") {
		t.Fatalf("%s %s", got, why)
	}
	// What is in it outlives the shard.
	if err := os.WriteFile(filepath.Join(dir, "of/1/kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, shards := range []uint32{1, 2} {
		if got, _, why := p.change(t, "a", scale("web", shards)); got != outcomeDone || !there("of/1/kept") {
			t.Fatalf("%s %s", got, why)
		}
	}
	web.Volumes = append(web.Volumes, workloads.Volume{Kind: "shared", Source: dir + "/nfs", Destination: "/nfs"})
	if got, _, why := p.change(t, "a", apply(web)); got != outcomeRefused || !strings.Contains(why, "volume /nfs: stat "+dir+"/nfs: no such file") || there("nfs") {
		t.Errorf("%s %s", got, why)
	}
	p.mustBe(t, "web-0", "web-1") // as they were: neither was stopped for it
}

// Of a file all of whose workloads are new, a dry run shows the later ones as if
// the earlier were there.
func TestADryRunTakesTheFilesEarlierWorkloadsForThere(t *testing.T) {
	p := newPool(t, "a", "b")
	cache, web := spec("cache"), spec("web")
	cache.Shards, web.Shards, web.Near = 1, 1, []string{"cache"}
	dry := func(s *workloads.Spec, planned ...*v1.PlannedShards) (string, string, string) {
		req := apply(s)
		req.DryRun, req.Planned = true, planned
		return p.change(t, "b", req)
	}
	if got, _, why := dry(web); got != outcomeRefused || !strings.Contains(why, "runs no shard of cache") {
		t.Errorf("alone: %s %s", got, why)
	}
	planned := &v1.PlannedShards{SpecJson: cache.Encode(), Node: map[string]string{"cache-0": "b"}}
	if got, steps, why := dry(web, planned); got != outcomePlanned || steps != "+ shard web-0 on b" {
		t.Errorf("%s %s %s", got, steps, why)
	}
	other := spec("other")
	other.Shards, other.Avoid = 2, []string{"cache"}
	if got, steps, why := dry(other, planned); got != outcomePlanned || steps != "+ shard other-0 on a; + shard other-1 on a" {
		t.Errorf("%s %s %s", got, steps, why)
	}
	if got, _, _ := dry(web, &v1.PlannedShards{SpecJson: []byte("{")}); got != "error" {
		t.Errorf("garbage: %s", got)
	}
	// It is for dry runs alone.
	req := apply(web)
	req.Planned = []*v1.PlannedShards{planned}
	if got, _, why := p.change(t, "b", req); got != outcomeRefused {
		t.Errorf("%s %s", got, why)
	}
	p.mustBe(t)
}
