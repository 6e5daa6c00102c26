package workloads

import (
	"reflect"
	"strings"
	"testing"
)

const wholeYAML = `
# the same as whole
workload:
  - name: cache
    image: redis:demo
    shards: 1
  - name: web
    tenant: shop
    priority: 5
    image: redis:demo
    command: [redis-server, --save, ""]
    network: shard
    shards: 6
    pinned: false
    windows: ["02:00-05:00"]
    max_blackout: 300ms
    autopilot: advise
    env:
      LOG: info
      SELF: web-{index} of {count}
    size:
      cpus: {request: 0.25, limit: 1}
      memory:
        request: 64M
        limit: 256M
    spread: {per_host: 2}
    affinity:
      near: [cache]
      avoid:
        - batch
      zones: [a, b]
      labels: {disk: ssd}
    volumes:
      - kind: shared
        source: /srv/web/{index}
        destination: /data
        read_only: true
`

const wholeJSON = `{"workload": [{"name": "web", "image": "i", "shards": 2, "size": {"cpus": {"limit": 0.5}}}]}`

func TestAFileInYAMLSaysTheSame(t *testing.T) {
	want, err := Parse("w.toml", []byte(whole), "default")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"w.yaml", "w.YML", "-", "workloads"} {
		got, err := Parse(name, []byte(wholeYAML), "default")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n%+v", name, err, got)
		}
	}
	for _, name := range []string{"-", "workloads"} {
		if got, err := Parse(name, []byte(whole), "default"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s in TOML: %v", name, err)
		}
	}
	for _, name := range []string{"w.json", "-"} {
		got, err := Parse(name, []byte(wholeJSON), "default")
		if err != nil || len(got) != 1 || got[0].Shards != 2 || got[0].Size.CPULimit != 0.5 {
			t.Errorf("%s: %v %+v", name, err, got)
		}
	}
}

func TestEveryMistakeInYAMLIsALineWithItsPlace(t *testing.T) {
	const ok = "workload:\n- name: web\n  image: i\n  shards: 1\n"
	for _, c := range []struct{ name, text, want string }{
		{"an unknown key", ok + "  shard: 2\n", "w.yaml:5: unknown key workload.shard; "},
		{"an unknown key in a mapping", ok + "  spread:\n    per_host: 1\n    per_rack: 1\n", "w.yaml:7: unknown key workload.spread.per_rack; "},
		{"an unknown key beside the list", "workloads: []\n", "w.yaml:1: unknown key workloads; "},
		{"no YAML", "workload: [\n", "w.yaml:"},
		{"a wrong type", ok + "  priority: high\n", "w.yaml:5: "},
		{"a wrong type of the second", ok + strings.Replace(strings.TrimPrefix(ok, "workload:\n"), "web", "db", 1) + "  priority: high\n", "w.yaml:8: "},
		{"a size in no unit", ok + "  size:\n    memory: {limit: many}\n", "w.yaml:6: "},
		{"a key twice", ok + "  shards: 2\n", "w.yaml:5: mapping key \"shards\" already defined"},
		{"nothing", "# nothing\n", "w.yaml: no workload in it; "},
		{"an empty list", "workload: []\n", "w.yaml: no workload in it; "},
		{"no shards", "workload:\n- name: web\n  image: i\n", "w.yaml:2: shards: the number of shards is missing; "},
		{"a list at the top", "- name: web\n", "w.yaml:1: "},
		{"no value", ok + "  tenant:\n", "w.yaml:5: workload.0.tenant has no value; "},
		{"an alias", "workload:\n- &a\n  name: web\n  image: i\n  shards: 1\n- *a\n", "w.yaml:6: workload.1 is an alias (*a); "},
		{"mappings that are merged", ok + "  <<: {pinned: true}\n", "w.yaml:5: << merges mappings; "},
		{"a second document", ok + "---\n" + ok, "w.yaml:5: a second document; "},
		{"a priority of ten", ok + "  priority: 10\n", "w.yaml:5: priority: 10 is not a priority; "},
		{"a volume without a place", ok + "  volumes:\n  - kind: copy\n    source: /a\n", "w.yaml:6: volumes.0.destination: "},
		{"a number for a text", ok + "  env: {PORT: 8080}\n", "w.yaml:5: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			specs, err := Parse("w.yaml", []byte(c.text), "default")
			if err == nil {
				t.Fatalf("taken for %+v", specs)
			}
			if !strings.HasPrefix(err.Error(), c.want) || !strings.Contains(err.Error(), "; ") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v\nwant %s…", err, c.want)
			}
		})
	}
}
