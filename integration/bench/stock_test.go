package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const shardSpec = `{"ociVersion":"1.2.0","process":{"args":["redis-server"]},"root":{"path":"rootfs"},
"annotations":{"org.criu.config":"/run/tranship/criu/default/bench-0.conf"},
"linux":{"cgroupsPath":"/tranship/default/bench-0","namespaces":[{"type":"pid"},{"type":"network","path":"/run/tranship/netns/default--bench-0"}]}}`

func TestTheRivalRunsTheShardsOwnSpec(t *testing.T) {
	raw, err := stockSpec(json.RawMessage(shardSpec), "/run/netns/bench", "/bench", "/run/bench/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"path":"/run/netns/bench"`, `"cgroupsPath":"/bench"`, `"path":"/run/bench/rootfs"`, `"args":["redis-server"]`, `"type":"pid"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%s is not in %s", want, raw)
		}
	}
	if strings.Contains(string(raw), "tranship/") {
		t.Errorf("something of the shard is left: %s", raw)
	}
	for _, wrong := range []string{`{`, `{"linux":{}}`, `{}`} {
		if _, err := stockSpec(json.RawMessage(wrong), "n", "c", "r"); err == nil {
			t.Errorf("%s is taken for a spec", wrong)
		}
	}
}

func TestCRIUsOwnTimeIsThatOfItsLastLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dump.log")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("(00.000123) Version: 4.2\npie: 1: inside\n(00.231500) Dumping finished successfully\n  a line of (00.9) something\n")
	if got, err := criuMs(path); err != nil || got != 231.5 {
		t.Errorf("%v, %v", got, err)
	}
	write("nothing\n")
	if got, err := criuMs(path); err == nil {
		t.Errorf("of a log without times: %v", got)
	}
}
