package lab

import (
	"net/netip"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestParseBitRate(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     BitRate
		bad      bool
	}{
		{name: "a gigabit", in: "1gbit", want: 1e9},
		{name: "half a gigabit as tc writes it", in: "500mbit", want: 5e8},
		{name: "a fraction", in: "2.5gbit", want: 25e8},
		{name: "upper case", in: "10Mbit", want: 1e7},
		{name: "bits", in: "64000bit", want: 64000},
		{name: "no unit", in: "1000", bad: true},
		{name: "bytes are not bits", in: "1gbyte", bad: true},
		{name: "nothing", in: "", bad: true},
		{name: "a unit alone", in: "gbit", bad: true},
		{name: "negative", in: "-1gbit", bad: true},
		{name: "slower than anything that would come up", in: "1kbit", bad: true},
		{name: "not a number", in: "NaNgbit", bad: true},
		{name: "without end", in: "infgbit", bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseBitRate(tt.in)
			if (err != nil) != tt.bad || got != tt.want {
				t.Fatalf("ParseBitRate(%q) = %d, %v", tt.in, got, err)
			}
			if err != nil {
				return
			}
			again, err := ParseBitRate(got.String())
			if err != nil || again != got {
				t.Errorf("%v reads back as %d, %v", got, again, err)
			}
		})
	}
}

func TestAPlanKeepsHostsThatAreThere(t *testing.T) {
	p := newPlan(Options{Hosts: 2}, state{Nodes: []nodeRecord{{Name: "host-3"}, {Name: switchName}, {Name: clientName}}})
	var names []string
	seen := map[string]bool{}
	for _, n := range p.nodes {
		names = append(names, n.Name)
		for _, a := range []string{n.Host.Addr().String(), n.Shard.Addr().String()} {
			if n.Role != roleSwitch && seen[a] {
				t.Errorf("%s has an address that is taken: %s", n.Name, a)
			}
			seen[a] = true
		}
	}
	want := []string{"switch", "host-1", "host-2", "host-3", "client"}
	if len(names) != len(want) {
		t.Fatalf("planned %v, want %v", names, want)
	}
	for i := range want {
		if names[i] != want[i] {
			t.Fatalf("planned %v, want %v", names, want)
		}
	}
}

// That transhipd takes the configuration shows when it starts with it.
func TestEveryHostHasPeersAndAddressesOfItsOwn(t *testing.T) {
	p := newPlan(Options{Hosts: maxHosts}, state{})
	pools := map[string]string{}
	for _, n := range p.nodes {
		if n.Role != roleHost {
			continue
		}
		var cfg struct {
			Node    string
			Network struct{ Pool netip.Prefix }
			Peers   []struct{ Name, Address string }
		}
		if err := toml.Unmarshal([]byte(daemonConfig(p, n)), &cfg); err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
		if cfg.Node != n.Name || len(cfg.Peers) != maxHosts-1 {
			t.Errorf("%s: node %q with %d peers", n.Name, cfg.Node, len(cfg.Peers))
		}
		if other := pools[cfg.Network.Pool.String()]; other != "" {
			t.Errorf("%s and %s hand out the same addresses", n.Name, other)
		}
		pools[cfg.Network.Pool.String()] = n.Name
		if cfg.Network.Pool.Contains(p.nodes[len(p.nodes)-1].Shard.Addr()) {
			t.Errorf("%s hands out the client's address", n.Name)
		}
	}
}

func TestContainerdsConfigurationFollowsItsVersion(t *testing.T) {
	for _, tt := range []struct {
		said   string
		major  int
		format int64
	}{
		{"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", 1, 2},
		{"containerd github.com/containerd/containerd v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", 1, 2},
		{"containerd github.com/containerd/containerd/v2 2.1.4~ds2 2.1.4~ds2-6", 2, 3},
		{"containerd containerd.io v2.4.0 abcdef", 2, 3},
	} {
		major, err := parseContainerdMajor(tt.said)
		if err != nil || major != tt.major {
			t.Errorf("%q: major %d, %v", tt.said, major, err)
			continue
		}
		var config struct {
			Version  int64    `toml:"version"`
			Disabled []string `toml:"disabled_plugins"`
		}
		if err := toml.Unmarshal([]byte(containerdConfig(major)), &config); err != nil {
			t.Fatalf("%q: %v", tt.said, err)
		}
		if config.Version != tt.format || len(config.Disabled) == 0 {
			t.Errorf("%q: %+v", tt.said, config)
		}
	}
	if _, err := parseContainerdMajor("bash: containerd: command not found"); err == nil {
		t.Error("found a version where there is none")
	}
}

func TestParseCgroupMount(t *testing.T) {
	for _, tt := range []struct {
		name, line string
		want       cgroupMount
		ok         bool
	}{
		{"a v1 controller", "35 26 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory", cgroupMount{Target: "/sys/fs/cgroup/memory", Options: "memory"}, true},
		{"two controllers together", "36 26 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct", cgroupMount{Target: "/sys/fs/cgroup/cpu,cpuacct", Options: "cpu,cpuacct"}, true},
		{"a named hierarchy without controllers", "37 26 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/systemd/systemd-cgroups-agent,name=systemd", cgroupMount{Target: "/sys/fs/cgroup/systemd", Options: "xattr,name=systemd,none"}, true},
		{"the unified hierarchy beside v1", "38 26 0:33 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw", cgroupMount{Target: "/sys/fs/cgroup/unified", V2: true}, true},
		{"the unified hierarchy alone", "38 26 0:33 / /sys/fs/cgroup rw shared:9 master:2 - cgroup2 cgroup2 rw,nsdelegate", cgroupMount{Target: "/sys/fs/cgroup", V2: true}, true},
		{"the tmpfs that holds them", "26 25 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755", cgroupMount{}, false},
		{"somebody's copy elsewhere", "50 26 0:30 / /mnt/memory rw - cgroup cgroup rw,memory", cgroupMount{}, false},
		{"half a line", "50 26 0:30 /", cgroupMount{}, false},
		{"nothing", "", cgroupMount{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseCgroupMount(tt.line)
			if ok != tt.ok || got != tt.want {
				t.Errorf("got %+v, %v, want %+v, %v", got, ok, tt.want, tt.ok)
			}
		})
	}
}

func TestInCgroup(t *testing.T) {
	for _, tt := range []struct {
		name, text, cgroup string
		want               bool
	}{
		{"itself", "4:memory:/tranship-lab/host-1\n", "/tranship-lab/host-1", true},
		{"a container in it", "0::/tranship-lab/host-1/default/r0\n", "/tranship-lab/host-1", true},
		{"any of the lab's", "0::/\n4:memory:/tranship-lab/client\n", "/tranship-lab", true},
		{"another host whose name begins alike", "0::/tranship-lab/host-10\n", "/tranship-lab/host-1", false},
		{"another lab", "0::/tranship-lab.test/host-1\n", "/tranship-lab", false},
		{"a hierarchy of that name", "1:name=/tranship-lab:/\n", "/tranship-lab", false},
		{"nothing", "", "/tranship-lab", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := inCgroup(tt.text, tt.cgroup); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
