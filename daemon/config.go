package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/tranship/tranship/daemon/balance"
	"github.com/tranship/tranship/daemon/peers/gossip"
)

// DefaultConfigPath is where transhipd looks for its configuration.
const DefaultConfigPath = "/etc/tranship/config.toml"

// Config is transhipd's configuration file. Unknown keys are errors.
type Config struct {
	// Node is this host's name in the pool, unique, and the name in its certificate.
	Node string `toml:"node"`
	// StateDir survives reboots: journal, logs.
	StateDir string `toml:"state_dir"`
	// RunDir does not: sockets, network namespaces, page stores.
	RunDir string `toml:"run_dir"`
	// Autopilot is off, advise (the default: plan and tell) or on (do it), for
	// shards without the label tranship.io/autopilot. Off is off for all.
	Autopilot string `toml:"autopilot"`

	Host       HostConfig       `toml:"host"`
	API        APIConfig        `toml:"api"`
	Containerd ContainerdConfig `toml:"containerd"`
	Peer       PeerConfig       `toml:"peer"`
	Cluster    ClusterConfig    `toml:"cluster"`
	PKI        PKIConfig        `toml:"pki"`
	Network    NetworkConfig    `toml:"network"`
	Metrics    MetricsConfig    `toml:"metrics"`
	Profile    ProfileConfig    `toml:"profile"`
	Balance    BalanceConfig    `toml:"balance"`
	CRIU       CRIUConfig       `toml:"criu"`
	Store      StoreConfig      `toml:"store"`
	Log        LogConfig        `toml:"log"`
	Traces     TracesConfig     `toml:"traces"`
	Peers      []StaticPeer     `toml:"peers"`

	// Tenants by name: what the owner of a workload, this host, lets them use.
	Tenants map[string]TenantConfig `toml:"tenants"`
}

// TenantConfig bounds what all shards of a tenant may count on; 0 is no bound.
type TenantConfig struct {
	CPUs        float64 `toml:"cpus"`
	MemoryBytes int64   `toml:"memory_bytes"`
	Shards      int     `toml:"shards"`
	// Weight is the tenant's share against others: where two shards are equally
	// good to move, the one goes whose tenant has more of the host for its weight.
	// 0 counts as 1.
	Weight float64 `toml:"weight"`
}

// APIConfig is the local API on a unix socket.
type APIConfig struct {
	Socket string `toml:"socket"`
	// Group owns the socket (mode 0660) when it exists, else root does.
	Group string `toml:"group"`
}

// ContainerdConfig says how to reach containerd.
type ContainerdConfig struct {
	Address     string `toml:"address"`
	Snapshotter string `toml:"snapshotter"`
}

// PeerConfig is the listener for other hosts: HTTP/3 control and page streams.
type PeerConfig struct {
	// Listen is a UDP address; "" makes a host that can neither send nor receive
	// shards. Joining hosts reach the one with the CA's key at the same port of TCP.
	Listen string `toml:"listen"`
	// Advertise is the address that other hosts reach it at, when Listen is not.
	Advertise string `toml:"advertise"`
}

// ClusterConfig is membership, of hosts that were made or joined with `tranship
// cluster`. The others know each other by Peers alone.
type ClusterConfig struct {
	// Gossip is the address, UDP and TCP, of membership; "" is the next port after
	// peer.listen.
	Gossip string `toml:"gossip"`
}

// HostConfig is what the pool is told of this host.
type HostConfig struct {
	Zone   string            `toml:"zone"`
	Labels map[string]string `toml:"labels"`
	// CostPerHour is in whatever the pool counts; 0 is unknown.
	CostPerHour float64 `toml:"cost_per_hour"`
	// CPUs and MemoryBytes are what shards may have of the host; 0 is all but what
	// the host itself uses.
	CPUs        float64 `toml:"cpus"`
	MemoryBytes int64   `toml:"memory_bytes"`
}

// BalanceConfig is the planning of shards' limits and places.
type BalanceConfig struct {
	// EverySeconds is the time between two rounds.
	EverySeconds int `toml:"every_seconds"`
	// Consolidate lets hosts be emptied to spare them.
	Consolidate bool `toml:"consolidate"`
	// Policy is forecast, or reactive: a threshold on the last sample and best fit,
	// to compare with. All hosts of a pool should have the same.
	Policy string `toml:"policy"`
}

// The policies.
const (
	policyForecast = "forecast"
	policyReactive = "reactive"
)

// maxLabels is far beyond use.
const maxLabels = 32

// StaticPeer names another host of the pool.
type StaticPeer struct {
	Name    string `toml:"name"`
	Address string `toml:"address"`
}

// PKIConfig names this host's certificate and the cluster's CA.
type PKIConfig struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// NetworkConfig is the network that shards' addresses live in. Every host of a
// pool must reach the same layer-2 segment through Bridge.
type NetworkConfig struct {
	Bridge string `toml:"bridge"`
	// Subnet holds the addresses of all shards of the pool.
	Subnet netip.Prefix `toml:"subnet"`
	// Pool is the part of Subnet that this host hands out.
	Pool    netip.Prefix `toml:"pool"`
	Gateway netip.Addr   `toml:"gateway"`
	MTU     int          `toml:"mtu"`
	// CNIBin are the directories with the CNI plugins bridge and static.
	CNIBin []string `toml:"cni_bin"`
}

// MetricsConfig is the Prometheus endpoint.
type MetricsConfig struct {
	// Listen is a TCP address, loopback by default; "" turns it off.
	Listen string `toml:"listen"`
}

// CRIUConfig says which CRIU dumps. Restore is done by runc, which looks for
// criu on containerd's PATH.
type CRIUConfig struct {
	// Path is the criu binary; "" looks in PrivateCRIU, then on PATH.
	Path string `toml:"path"`
	// LogLevel is CRIU's own, 0 to 4.
	LogLevel int `toml:"log_level"`
}

// StoreConfig bounds the memory for pages of shards that are arriving.
type StoreConfig struct {
	// SizeBytes is the size of the tmpfs for page stores and CRIU images; 0 is 90 % of memory.
	SizeBytes int64 `toml:"size_bytes"`
}

// LogConfig is the daemon's own log, on stderr.
type LogConfig struct {
	Level  string `toml:"level"`
	Format string `toml:"format"` // text | json
}

// DefaultConfig is what an empty file means, but for Node, which has no default.
func DefaultConfig() Config {
	return Config{
		StateDir:   "/var/lib/tranship",
		RunDir:     "/run/tranship",
		Autopilot:  string(balance.Advise),
		Balance:    BalanceConfig{EverySeconds: 5, Policy: policyForecast},
		API:        APIConfig{Socket: "/run/tranship/tranship.sock", Group: "tranship"},
		Containerd: ContainerdConfig{Address: "/run/containerd/containerd.sock", Snapshotter: "overlayfs"},
		PKI: PKIConfig{
			CA:   "/etc/tranship/pki/ca.crt",
			Cert: "/etc/tranship/pki/node.crt",
			Key:  "/etc/tranship/pki/node.key",
		},
		Network: NetworkConfig{
			Bridge: "tranship0",
			Subnet: netip.MustParsePrefix("10.89.0.0/16"),
			Pool:   netip.MustParsePrefix("10.89.1.0/24"),
			CNIBin: []string{"/usr/lib/cni", "/opt/cni/bin"},
		},
		Metrics: MetricsConfig{Listen: "127.0.0.1:9464"},
		Profile: defaultProfileConfig(),
		CRIU:    CRIUConfig{LogLevel: 2},
		Log:     LogConfig{Level: "info", Format: "text"},
	}
}

// LoadConfig reads and validates a configuration file.
func LoadConfig(path string) (Config, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	cfg, err := ParseConfig(raw)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return cfg, nil
}

// ParseConfig decodes raw over DefaultConfig; unknown keys, wrong types and
// impossible values are errors that name the key.
func ParseConfig(raw []byte) (Config, error) {
	cfg := DefaultConfig()
	dec := toml.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&cfg); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			return Config{}, fmt.Errorf("unknown keys:\n%s", strict.String())
		}
		var syntax *toml.DecodeError
		if errors.As(err, &syntax) {
			return Config{}, errors.New(syntax.String())
		}
		return Config{}, err
	}
	return cfg, cfg.validate()
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Node == "" {
		bad("node: the host's name in the pool is missing")
	}
	for _, dir := range []struct{ key, value string }{{"state_dir", c.StateDir}, {"run_dir", c.RunDir}, {"api.socket", c.API.Socket}} {
		if !filepath.IsAbs(dir.value) {
			bad("%s: %q is not an absolute path", dir.key, dir.value)
		}
	}
	n := c.Network
	if !n.Subnet.IsValid() || !n.Pool.IsValid() || !n.Subnet.Overlaps(n.Pool) || n.Pool.Bits() < n.Subnet.Bits() {
		bad("network.pool: %v is not a part of network.subnet %v", n.Pool, n.Subnet)
	}
	if n.Gateway.IsValid() && !n.Subnet.Contains(n.Gateway) {
		bad("network.gateway: %v is outside network.subnet %v", n.Gateway, n.Subnet)
	}
	if c.CRIU.LogLevel < 0 || c.CRIU.LogLevel > 4 {
		bad("criu.log_level: %d is not between 0 and 4", c.CRIU.LogLevel)
	}
	if c.Store.SizeBytes < 0 {
		bad("store.size_bytes: %d is negative", c.Store.SizeBytes)
	}
	if p := c.Profile; p.PinDir != "" && !filepath.IsAbs(p.PinDir) {
		bad("profile.pin_dir: %q is not an absolute path", p.PinDir)
	}
	if d := c.Profile.HistoryDays; d < 1 || d > 31 {
		bad("profile.history_days: %d is not between 1 and 31", d)
	}
	if m := c.Profile.DirtyMinutes; m < 0 || m > 1440 {
		bad("profile.dirty_minutes: %d is not between 0 (only on demand) and 1440", m)
	}
	if err := c.Traces.validate(); err != nil {
		bad("%w", err)
	}
	c.validatePool(bad)
	c.validateBalance(bad)
	for name, t := range c.Tenants {
		if !(t.CPUs >= 0 && t.CPUs <= 1e6) || t.MemoryBytes < 0 || t.Shards < 0 || !(t.Weight >= 0 && t.Weight <= 1e6) { // NaN too
			bad("tenants.%s: cpus, memory_bytes, shards and weight are 0 (no bound) or more", name)
		}
	}
	seen := map[string]bool{c.Node: true}
	for i, p := range c.Peers {
		switch {
		case p.Name == "" || p.Address == "":
			bad("peers[%d]: name and address are both needed", i)
		case seen[p.Name]:
			bad("peers[%d]: %q is named twice, or is this host", i, p.Name)
		}
		seen[p.Name] = true
	}
	return errors.Join(errs...)
}

// shutdownGrace is how long an orderly stop waits for running migrations to
// abort before the journal is left to the next start.
const shutdownGrace = 20 * time.Second

func (c Config) validateBalance(bad func(format string, args ...any)) {
	if _, err := balance.ParseMode(c.Autopilot); err != nil {
		bad("autopilot: %v", err)
	}
	if every := time.Duration(c.Balance.EverySeconds) * time.Second; every < balance.MinEvery || every > balance.MaxEvery {
		bad("balance.every_seconds: %d is not between %v and %v", c.Balance.EverySeconds, balance.MinEvery.Seconds(), balance.MaxEvery.Seconds())
	}
	switch p := c.Balance.Policy; {
	case p != policyForecast && p != policyReactive:
		bad("balance.policy: %.40q is neither %s nor %s", p, policyForecast, policyReactive)
	case p == policyReactive && c.Balance.Consolidate:
		bad("balance.consolidate: hosts are spared by forecasts alone, and balance.policy is %s", p)
	}
	if v := c.Host.CPUs; !(v == 0 || v >= 0.01 && v <= 1<<16) { // NaN too
		bad("host.cpus: %v is not 0 (all there are) or between 0.01 and %d", v, 1<<16)
	}
	if v := c.Host.MemoryBytes; v < 0 || v > 1<<50 {
		bad("host.memory_bytes: %d is not between 0 (all there is) and 1 PiB", v)
	}
}

// validatePool checks what the other hosts are told of this one.
func (c Config) validatePool(bad func(format string, args ...any)) {
	if c.Host.Zone != "" {
		if err := gossip.CheckWord(c.Host.Zone); err != nil {
			bad("host.zone: %v", err)
		}
	}
	if len(c.Host.Labels) > maxLabels {
		bad("host.labels: %d labels, at most %d", len(c.Host.Labels), maxLabels)
	}
	for k, v := range c.Host.Labels {
		if err := gossip.CheckWord(k); err != nil {
			bad("host.labels: key %v", err)
		}
		if err := gossip.CheckWord(v); v != "" && err != nil {
			bad("host.labels.%s: %v", k, err)
		}
	}
	if v := c.Host.CostPerHour; !(v >= 0 && v <= 1e9) { // NaN too
		bad("host.cost_per_hour: %v is not between 0 and 1e9", v)
	}
	for _, a := range []struct{ key, value string }{{"peer.advertise", c.Peer.Advertise}, {"cluster.gossip", c.Cluster.Gossip}} {
		if a.value == "" {
			continue
		}
		if at, err := netip.ParseAddrPort(a.value); err != nil || at.Port() == 0 {
			bad("%s: %q is not ADDRESS:PORT", a.key, a.value)
		}
	}
}
