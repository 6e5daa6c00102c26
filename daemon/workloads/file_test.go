package workloads

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

const whole = `
[[workload]]
name = "cache"
image = "redis:demo"
shards = 1

[[workload]]
name = "web"
tenant = "shop"
priority = 5
image = "redis:demo"
command = ["redis-server", "--save", ""]
network = "shard"
shards = 6
pinned = false
windows = ["02:00-05:00"]
max_blackout = "300ms"
autopilot = "advise"
env = { LOG = "info", SELF = "web-{index} of {count}" }

[workload.size]
cpus = { request = 0.25, limit = 1.0 }
memory = { request = "64M", limit = "256M" }

[workload.spread]
per_host = 2

[workload.affinity]
near = ["cache"]
avoid = ["batch"]
zones = ["a", "b"]
labels = { disk = "ssd" }

[[workload.volumes]]
kind = "shared"
source = "/srv/web/{index}"
destination = "/data"
read_only = true
`

func TestAFileSaysAllThatThereIsToSay(t *testing.T) {
	specs, err := Parse("w.toml", []byte(whole), "default")
	if err != nil || len(specs) != 2 {
		t.Fatal(specs, err)
	}
	want := &Spec{
		Name: "web", Namespace: "default", Tenant: "shop", Priority: 5, Image: "redis:demo", Command: []string{"redis-server", "--save", ""},
		Env: map[string]string{"LOG": "info", "SELF": "web-{index} of {count}"}, Network: "shard", Shards: 6,
		Size:    Size{0.25, 1, 64 << 20, 256 << 20},
		Volumes: []Volume{{"shared", "/srv/web/{index}", "/data", true}}, Spread: Spread{PerHost: 2},
		Near: []string{"cache"}, Avoid: []string{"batch"}, Zones: []string{"a", "b"}, Labels: map[string]string{"disk": "ssd"},
		Windows: []string{"02:00-05:00"}, MaxBlackout: 300 * time.Millisecond, Autopilot: "advise",
	}
	if !reflect.DeepEqual(specs[1], want) {
		t.Errorf("%+v", specs[1])
	}
	back, err := Decode(want.Encode())
	if err != nil || !reflect.DeepEqual(back, want) {
		t.Errorf("%+v %v", back, err)
	}
	if got := fmt.Sprint(want.EnvOf(3)); got != "[LOG=info SELF=web-3 of 6 SHARD_COUNT=6 SHARD_INDEX=3]" {
		t.Error(got)
	}
	if got := want.SourceOf(want.Volumes[0], 3); got != "/srv/web/3" {
		t.Error(got)
	}
	other := *want
	other.Shards, other.Size.CPULimit, other.Priority = 4, 2, 1
	if other.Digest() != want.Digest() {
		t.Error("a change in place replaces shards")
	}
	other.Image = "redis:next"
	if other.Digest() == want.Digest() {
		t.Error("another image leaves shards as they are")
	}
}

func TestEveryMistakeIsALineWithItsPlaceAndWhatToDo(t *testing.T) {
	const ok = "[[workload]]\nname = \"web\"\nimage = \"i\"\nshards = 1\n"
	for _, c := range []struct{ name, text, want string }{
		{"an unknown key", ok + "shard = 2\n", "w.toml:5: unknown key workload.shard; "},
		{"an unknown key in a table", ok + "[workload.spread]\nper_rack = 1\n", "w.toml:6: unknown key workload.spread.per_rack; "},
		{"no TOML", "[[workload]\n", "w.toml:1: "},
		{"a wrong type", ok + "priority = \"high\"\n", "w.toml:5: "},
		{"a size in no unit", ok + "[workload.size]\nmemory = { limit = \"many\" }\n", "w.toml:6: "},
		{"a key twice", ok + "shards = 2\n", "w.toml:5: "},
		{"no workload", "# nothing\n", "w.toml: no workload in it; "},
		{"no shards", "[[workload]]\nname = \"web\"\nimage = \"i\"\n", "w.toml:1: shards: the number of shards is missing; "},
		{"no name", "[[workload]]\nimage = \"i\"\nshards = 1\n", "w.toml:1: name: \"\" is not a name; "},
		{"a name that is no hostname", strings.Replace(ok, "web", "Web_1", 1), "w.toml:2: name: \"Web_1\" is not a name; "},
		{"no image", strings.Replace(ok, `"i"`, `""`, 1), "w.toml:3: image: "},
		{"too many shards", strings.Replace(ok, "= 1", "= 10001", 1), "w.toml:4: shards: 10001 shards are not possible; "},
		{"fewer shards than none", strings.Replace(ok, "= 1", "= -1", 1), "w.toml:4: shards: -1 shards"},
		{"a priority of ten", ok + "priority = 10\n", "w.toml:5: priority: 10 is not a priority; "},
		{"a request over the limit", ok + "[workload.size]\nmemory = { request = \"2G\", limit = \"1G\" }\n", "w.toml:6: size.memory.request: 2G are more than the limit of 1G; "},
		{"a request of CPUs over the limit", ok + "[workload.size.cpus]\nlimit = 1\nrequest = 1.5\n", "w.toml:7: size.cpus.request: 1.5 CPUs are more than the limit of 1; "},
		{"a size that nothing starts in", ok + "[workload.size.memory]\nlimit = \"1M\"\n", "w.toml:6: size.memory.limit: 1M is not possible; "},
		{"infinite CPUs", ok + "[workload.size.cpus]\nlimit = inf\n", "w.toml:6: size.cpus.limit: +Inf CPUs are not possible; "},
		{"an unknown kind of volume", ok + "[[workload.volumes]]\nkind = \"nfs\"\nsource = \"/a\"\ndestination = \"/b\"\n", "w.toml:6: volumes.0.kind: \"nfs\" is no kind of volume; "},
		{"a volume without a place", ok + "[[workload.volumes]]\nkind = \"copy\"\nsource = \"/a\"\n", "w.toml:5: volumes.0.destination: "},
		{"two volumes in one place", ok + "volumes = [{ kind = \"copy\", source = \"/a\", destination = \"/b\" },\n { kind = \"copy\", source = \"/c\", destination = \"/b/\" }]\n", "w.toml:6: volumes.1.destination: /b is the place of two volumes; "},
		{"a name twice", ok + "\n" + ok, "w.toml:7: name: web is already the name of the workload in line 2; "},
		{"near itself", ok + "[workload.affinity]\nnear = [\"web\"]\n", "w.toml:6: affinity.near: web is to be near itself, a cycle; "},
		{"near and avoid", ok + "[workload.affinity]\nnear = [\"db\"]\navoid = [\"db\"]\n", "w.toml:7: affinity.avoid: web is to be near db and to avoid it; "},
		{"a cycle", ok + "[workload.affinity]\nnear = [\"db\"]\n" + strings.Replace(ok, "web", "db", 1) + "[workload.affinity]\nnear = [\"web\"]\n", "w.toml:6: affinity.near: web → db → web is a cycle"},
		{"a window of no time", ok + "windows = [\"2-5\"]\n", "w.toml:5: windows: \"2-5\" is not a time of day; "},
		{"a blackout of no duration", ok + "max_blackout = \"soon\"\n", "w.toml:5: max_blackout: \"soon\" is not a duration; "},
		{"a variable that is set anyway", ok + "env = { SHARD_INDEX = \"1\" }\n", "w.toml:5: env: SHARD_INDEX is set for every shard; "},
		{"an unknown autopilot", ok + "autopilot = \"yes\"\n", "w.toml:5: autopilot: \"yes\" is unknown; "},
	} {
		t.Run(c.name, func(t *testing.T) {
			specs, err := Parse("w.toml", []byte(c.text), "default")
			if err == nil {
				t.Fatalf("taken for %+v", specs)
			}
			if !strings.HasPrefix(err.Error(), c.want) || !strings.Contains(err.Error(), "; ") {
				t.Errorf("%v\nwant %s…", err, c.want)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line:\n%v", err)
			}
			var m Mistake
			if !errors.As(err, &m) {
				t.Errorf("%T", err)
			}
		})
	}
	if _, err := Parse("w.yaml", []byte(ok), "default"); err == nil || !strings.HasPrefix(err.Error(), "w.yaml: ") {
		t.Errorf("TOML is taken for YAML: %v", err)
	}
	_, err := Parse("w.toml", []byte(strings.Replace(ok, "= 1", "= -1", 1)+"priority = 10\nimages = 1\n"), "default")
	if err == nil || !strings.Contains(err.Error(), "unknown key workload.images") {
		t.Error(err)
	}
	_, err = Parse("w.toml", []byte(strings.Replace(ok, "= 1", "= -1", 1)+"priority = 10\n"), "default")
	if err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("both mistakes are to be told: %v", err)
	}
}

func TestSizesAreReadAndWritten(t *testing.T) {
	for text, want := range map[string]int64{"512M": 512 << 20, "512MiB": 512 << 20, "512mb": 512 << 20, "1.5G": 3 << 29, "4096": 4096, "64k": 64 << 10, "7b": 7} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("%s: %d %v", text, got, err)
		}
	}
	for _, text := range []string{"", "M", "-1", "1e9", "inf", "1.2.3", "9999999T", "0x10", "1 M"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q is taken for %d", text, got)
		}
	}
	for n, want := range map[int64]string{256 << 20: "256M", 3 << 29: "1536M", 1 << 40: "1T", 5000: "5000", 12345678: "11.8M"} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
}

// FuzzParse: no file makes Parse panic, and what it takes is valid, travels and
// has an order.
func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("[[workload]]\nname=\"a\"\n\"im\\u0061ge\"='i'\nshards=1\nenv={ \"a b\"=\"c\" }\n[[workload.volumes]]\n"))
	f.Add([]byte("workload=[{name=\"a\",image=\"i\",shards=0,size={cpus={request=nan}}}]"))
	f.Add([]byte("[workload]\nname=1"))
	f.Add([]byte(wholeYAML))
	f.Add([]byte(wholeJSON))
	f.Add([]byte("a: &a [b]\n? [c]\n: *a"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, name := range []string{"f.toml", "f.yaml"} {
			fuzzParse(t, name, raw)
		}
	})
}

func fuzzParse(t *testing.T, name string, raw []byte) {
	specs, err := Parse(name, raw, "default")
	if err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			if !strings.HasPrefix(line, name+":") {
				t.Errorf("a mistake without its place: %q", line)
			}
		}
		return
	}
	seen := map[string]bool{}
	for _, s := range specs {
		if err := s.Validate(); err != nil {
			t.Error(err)
		}
		back, err := Decode(s.Encode())
		if err != nil || string(back.Encode()) != string(s.Encode()) {
			t.Errorf("%v: %s", err, s.Encode())
		}
		for _, near := range s.Near {
			for _, later := range specs {
				if later.Name == near && !seen[near] {
					t.Errorf("%s comes before %s, which it is near", s.Name, near)
				}
			}
		}
		seen[s.Name] = true
	}
}
