package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// NameVariable is the environment variable that names the lab that commands and
// tests mean. Labs share nothing, so tests run in one of their own and leave
// alone what somebody tries out; "" is the lab without a name.
const NameVariable = "TRANSHIP_LAB"

// labName is ".NAME" or "", part of what the lab is called on the machine.
var labName = func() string {
	name := os.Getenv(NameVariable)
	if name == "" {
		return ""
	}
	return "." + name
}()

var (
	// rootDir holds everything that the lab writes; every host has a directory
	// in it. It must be on a disk file system: overlayfs takes no overlay and,
	// before Linux 6.6, no tmpfs with user xattrs as its upper directory.
	rootDir   = rootPrefix + labName
	statePath = rootDir + "/state.json"
	// cgroupName is the lab's cgroup in every hierarchy; what is in it is the
	// lab's, and that is how Down finds what no record mentions.
	cgroupName = "tranship-lab" + labName
)

const (
	rootPrefix = "/var/lib/tranship-lab"
	// lockPath is outside rootDir, because Down removes that, and the same for
	// all labs, because they share the mount points.
	lockPath = "/run/tranship-lab.lock"

	// PrivateCRIU is where `make setup` puts a CRIU newer than the distribution's.
	PrivateCRIU = "/usr/local/lib/tranship/criu"

	switchName   = "switch"
	clientName   = "client"
	switchBridge = "trs-lab"
	hostBridge   = "tranship0"
	hostUplink   = "eth0"

	// maxHosts keeps 10.88.0.10+N below the client's .100.
	maxHosts = 80
)

type role string

const (
	roleSwitch role = "switch"
	roleHost   role = "host"
	roleClient role = "client"
)

// plan is what a lab of so many hosts looks like; it is a pure function of the
// number, so that a second Up computes the same.
type plan struct {
	nodes []nodePlan
}

// nodePlan is one node: the switch, a host, or the client.
type nodePlan struct {
	Name string `json:"name"`
	Role role   `json:"role"`
	// Index is N of host-N, 0 for the others.
	Index int `json:"index"`
	// Host is the address among hosts, Shard the one among shards.
	Host  netip.Prefix `json:"host"`
	Shard netip.Prefix `json:"shard"`
}

var namePattern = regexp.MustCompile(`^(\.[a-z0-9-]{1,20})?$`)

// checkName keeps a name from leading out of the lab's directories.
func checkName() error {
	if !namePattern.MatchString(labName) {
		return fmt.Errorf("%s=%s: a lab's name is at most 20 letters, digits and dashes", NameVariable, labName[1:])
	}
	return nil
}

// newPlan never plans fewer hosts than are already there.
func newPlan(opts Options, have state) plan {
	count := opts.Hosts
	for _, rec := range have.Nodes {
		if n, err := strconv.Atoi(strings.TrimPrefix(rec.Name, "host-")); err == nil {
			count = max(count, n)
		}
	}
	p := plan{nodes: []nodePlan{{Name: switchName, Role: roleSwitch}}}
	for n := 1; n <= count; n++ {
		p.nodes = append(p.nodes, nodePlan{
			Name:  fmt.Sprintf("host-%d", n),
			Role:  roleHost,
			Index: n,
			Host:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 88, 0, byte(10 + n)}), 24),
			Shard: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 89, 0, byte(10 + n)}), 16),
		})
	}
	p.nodes = append(p.nodes, nodePlan{
		Name:  clientName,
		Role:  roleClient,
		Host:  netip.MustParsePrefix("10.88.0.100/24"),
		Shard: netip.MustParsePrefix("10.89.0.100/16"),
	})
	return p
}

// pool is the part of the shards' subnet that a host hands out.
func (n nodePlan) pool() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 89, byte(n.Index), 0}), 24)
}

// dir is a node's directory on the machine.
func nodeDir(name string) string { return filepath.Join(rootDir, name) }

// BitRate is a link's speed in bits per second.
type BitRate uint64

// rateUnits are tc's: powers of ten, bits.
var rateUnits = []struct {
	suffix string
	scale  float64
}{{"gbit", 1e9}, {"mbit", 1e6}, {"kbit", 1e3}, {"bit", 1}}

// ParseBitRate reads a rate as tc writes it: 1gbit, 500mbit, 64kbit.
func ParseBitRate(s string) (BitRate, error) {
	for _, unit := range rateUnits {
		number, ok := strings.CutSuffix(strings.ToLower(s), unit.suffix)
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(number, 64)
		if err != nil {
			break
		}
		// tc counts bytes, and below a kilobyte a second nothing would come up.
		if rate := v * unit.scale; rate >= 8e3 && rate <= 1e12 {
			return BitRate(rate), nil
		}
		return 0, fmt.Errorf("bandwidth %q is not between 8kbit and 1000gbit", s)
	}
	return 0, fmt.Errorf("bandwidth %q: write it like 1gbit or 500mbit", s)
}

func (r BitRate) String() string {
	for _, unit := range rateUnits {
		if v := float64(r) / unit.scale; v >= 1 {
			return strconv.FormatFloat(v, 'f', -1, 64) + unit.suffix
		}
	}
	return "0bit"
}
