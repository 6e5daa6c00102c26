// Package internal_test holds the house's rule about who may import whom.
package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/tranship/tranship/"

// forbidden edges: no package below from may import, directly or not, one below
// to. Paths are relative to the module; a leading "ext:" names another module.
var forbidden = []struct{ from, to, why string }{
	{"checkpoint", "transfer", "the pages tower is built from the nouns upward"},
	{"checkpoint", "daemon", "the daemon wires the towers, not the other way round"},
	{"checkpoint", "predict", "the towers meet only in the daemon"},
	{"transfer", "daemon", "the daemon wires the towers, not the other way round"},
	{"transfer", "predict", "the towers meet only in the daemon"},
	{"predict", "checkpoint", "the towers meet only in the daemon"},
	{"predict", "transfer", "the towers meet only in the daemon"},
	{"predict", "daemon", "forecasts are pure"},
	{"predict", "allocate", "plans are made of forecasts, not the other way round"},
	{"allocate", "daemon", "plans are pure"},
	{"allocate", "ebpf/probe", "plans are pure"},
	{"allocate", "checkpoint", "the towers meet only in the daemon"},
	{"allocate", "transfer", "the towers meet only in the daemon"},
	{"checkpoint/track", "checkpoint/criu", "one door does not import another"},
	{"checkpoint/criu", "checkpoint/track", "one door does not import another"},
	{"checkpoint/layer", "checkpoint/criu", "one door does not import another"},
	{"checkpoint/pagestore", "checkpoint/criu", "one door does not import another"},
	{"daemon/runtime", "transfer", "one door does not import another"},
	{"daemon/runtime", "checkpoint/criu", "one door does not import another"},
	{"daemon/runtime", "daemon/migrate", "containers do not know that they move"},
	{"daemon/control", "daemon/migrate", "the command line must not carry the daemon"},
	{"cmd/tranship", "daemon/migrate", "the command line speaks to the daemon through daemon/control"},
	{"cmd/tranship", "transfer", "the command line speaks to the daemon through daemon/control"},
	{"checkpoint", "ext:github.com/containerd/containerd/v2", "daemon/runtime is the only door to containerd"},
	{"transfer", "ext:github.com/containerd/containerd/v2", "daemon/runtime is the only door to containerd"},
	{"checkpoint", "ext:github.com/quic-go/quic-go", "transfer is the only door to QUIC"},
	{"daemon/runtime", "ext:github.com/quic-go/quic-go", "transfer is the only door to QUIC"},
	{"daemon/forecasts", "ebpf/probe", "forecasts come from profiles, whoever counts"},
	{"daemon/forecasts", "daemon/runtime", "forecasts come from profiles, whoever counts"},
	{"daemon/balance", "daemon/migrate", "plans do not know how a shard moves"},
	{"daemon/balance", "transfer", "plans do not know how hosts are reached"},
	{"daemon/balance", "ebpf/probe", "plans come from profiles, whoever counts"},
	{"ebpf", "daemon", "the daemon wires the towers, not the other way round"},
	{"ebpf", "checkpoint", "the towers meet only in the daemon"},
	{"ebpf", "transfer", "the towers meet only in the daemon"},
	{"checkpoint", "ebpf", "the towers meet only in the daemon"},
	{"transfer", "ebpf", "the towers meet only in the daemon"},
	{"predict", "ebpf/probe", "forecasts are pure"},
	{"ebpf/profile", "ebpf/probe", "profiles are pure"},
	{"ebpf/profile", "ext:github.com/cilium/ebpf", "ebpf/probe is the only door to cilium/ebpf"},
	{"checkpoint", "ext:github.com/cilium/ebpf", "ebpf/probe is the only door to cilium/ebpf"},
	{"transfer", "ext:github.com/cilium/ebpf", "ebpf/probe is the only door to cilium/ebpf"},
	{"transfer/wire", "ext:github.com/quic-go/quic-go", "frames are pure"},
	{"transfer/encoding", "ext:github.com/quic-go/quic-go", "encoding is pure"},
}

func TestImportsRunOneWay(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps=false", "-json=ImportPath,Deps", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Deps       []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		from := strings.TrimPrefix(p.ImportPath, module)
		for _, rule := range forbidden {
			if !within(from, rule.from) {
				continue
			}
			for _, dep := range p.Deps {
				to, external := strings.CutPrefix(rule.to, "ext:")
				target := dep
				if !external {
					var own bool
					if target, own = strings.CutPrefix(dep, module); !own {
						continue
					}
				}
				if within(target, to) && !within(target, rule.from) {
					t.Errorf("%s imports %s: %s", from, dep, rule.why)
				}
			}
		}
	}
	if seen < 20 {
		t.Errorf("only %d packages were looked at", seen)
	}
}

func within(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }
