package daemon

import (
	"strings"
	"testing"
)

func TestParseConfig(t *testing.T) {
	cfg, err := ParseConfig([]byte(`
node = "host-1"
[peer]
listen = "10.88.0.11:7443"
[network]
pool = "10.89.7.0/24"
[[peers]]
name = "host-2"
address = "10.88.0.12:7443"
`))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Network.Pool.String() != "10.89.7.0/24" || cfg.Network.Bridge != "tranship0" || len(cfg.Peers) != 1 {
		t.Errorf("%+v", cfg)
	}
}

func TestABadConfigurationIsNamed(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"no node", ``, "node"},
		{"an unknown key", "node='a'\nnoed='b'", "noed"},
		{"an unknown key in a table", "node='a'\n[network]\nbrigde='x'", "brigde"},
		{"a wrong type", "node=3", "node"},
		{"a syntax error", "node=", ""},
		{"a pool outside the subnet", "node='a'\n[network]\npool='192.0.2.0/24'", "network.pool"},
		{"a pool larger than the subnet", "node='a'\n[network]\npool='10.0.0.0/8'", "network.pool"},
		{"a gateway outside the subnet", "node='a'\n[network]\ngateway='192.0.2.1'", "network.gateway"},
		{"no address", "node='a'\n[network]\npool='all'", ""},
		{"a relative path", "node='a'\nrun_dir='run'", "run_dir"},
		{"itself as a peer", "node='a'\n[[peers]]\nname='a'\naddress='b:1'", "peers[0]"},
		{"a peer twice", "node='a'\n[[peers]]\nname='b'\naddress='b:1'\n[[peers]]\nname='b'\naddress='b:1'", "peers[1]"},
		{"a peer without an address", "node='a'\n[[peers]]\nname='b'", "peers[0]"},
		{"a CRIU log level that there is not", "node='a'\n[criu]\nlog_level=9", "criu.log_level"},
		{"a zone of several words", "node='a'\n[host]\nzone='rack 3'", "host.zone"},
		{"a label without a name", "node='a'\n[host.labels]\n'' = 'x'", "host.labels"},
		{"a label that is a sentence", "node='a'\n[host.labels]\nssd = 'so they say'", "host.labels.ssd"},
		{"a negative cost", "node='a'\n[host]\ncost_per_hour=-1.0", "host.cost_per_hour"},
		{"a cost that is no number", "node='a'\n[host]\ncost_per_hour=nan", "host.cost_per_hour"},
		{"an address without a port", "node='a'\n[peer]\nadvertise='192.0.2.1'", "peer.advertise"},
		{"membership at a name", "node='a'\n[cluster]\ngossip='host:7444'", "cluster.gossip"},
		{"an autopilot that flies elsewhere", "node='a'\nautopilot='yes'", "autopilot"},
		{"a policy that nobody knows", "node='a'\n[balance]\npolicy='drs'", "balance.policy"},
		{"hosts spared without forecasts", "node='a'\n[balance]\npolicy='reactive'\nconsolidate=true", "balance.consolidate"},
		{"rounds without a pause", "node='a'\n[balance]\nevery_seconds=0", "balance.every_seconds"},
		{"no processor", "node='a'\n[host]\ncpus=-1.0", "host.cpus"},
		{"processors that are no number", "node='a'\n[host]\ncpus=nan", "host.cpus"},
		{"memory of another world", "node='a'\n[host]\nmemory_bytes=9007199254740993", "host.memory_bytes"},
		{"a negative store", "node='a'\n[store]\nsize_bytes=-1", "store.size_bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseConfig([]byte(tt.text))
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%q does not name %q", err, tt.want)
			}
		})
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("node = 'a'\n[network]\npool = '10.89.1.0/24'\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if cfg, err := ParseConfig(b); err == nil {
			if err := cfg.validate(); err != nil {
				t.Errorf("accepted, and invalid: %v", err)
			}
		}
	})
}
