package gossip

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"regexp"

	"github.com/hashicorp/memberlist"

	"github.com/tranship/tranship/daemon/peers/pki"
)

// Brief is what a host tells everybody of itself; what does not fit into
// memberlist's 512 bytes is asked of the host. It is a claim, not more.
type Brief struct {
	ID string `json:"i"`
	// Address is the UDP address of the host's peer API.
	Address string `json:"a"`
	Zone    string `json:"z,omitempty"`
	Version string `json:"v,omitempty"`
	CPUs    int    `json:"c,omitempty"`
	// MemoryMiB is all of the host's, in MiB.
	MemoryMiB   int64   `json:"m,omitempty"`
	CostPerHour float64 `json:"h,omitempty"`
	// CPULoad and MemoryLoad are in tenths, 0 to 10, so that they change seldom.
	CPULoad    int  `json:"l,omitempty"`
	MemoryLoad int  `json:"u,omitempty"`
	Cordoned   bool `json:"x,omitempty"`
	// Authority: the host has the CA's key.
	Authority bool `json:"k,omitempty"`
}

// Bounds of a brief.
const (
	maxCPUs      = 1 << 16
	maxMemoryMiB = 1 << 30
	maxCost      = 1e9
	maxVersion   = 64
)

var word = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$`)

// CheckWord says why s cannot be a zone or a label, or nil.
func CheckWord(s string) error {
	if !word.MatchString(s) {
		return fmt.Errorf("%.80q: want up to 63 letters, digits, dots, dashes and slashes", s)
	}
	return nil
}

func (b Brief) withLoadOf(o Brief) Brief {
	b.CPULoad, b.MemoryLoad = o.CPULoad, o.MemoryLoad
	return b
}

func (b Brief) check() error {
	if err := pki.CheckID(b.ID); err != nil {
		return err
	}
	if at, err := netip.ParseAddrPort(b.Address); err != nil || at.Port() == 0 || at.Addr().IsUnspecified() || at.Addr().IsMulticast() {
		return fmt.Errorf("brief: address %.80q", b.Address)
	}
	if b.Zone != "" {
		if err := CheckWord(b.Zone); err != nil {
			return fmt.Errorf("brief: zone %w", err)
		}
	}
	if len(b.Version) > maxVersion {
		return fmt.Errorf("brief: a version of %d characters", len(b.Version))
	}
	switch {
	case b.CPUs < 0 || b.CPUs > maxCPUs:
		return fmt.Errorf("brief: %d CPUs", b.CPUs)
	case b.MemoryMiB < 0 || b.MemoryMiB > maxMemoryMiB:
		return fmt.Errorf("brief: %d MiB of memory", b.MemoryMiB)
	case !(b.CostPerHour >= 0 && b.CostPerHour <= maxCost):
		return fmt.Errorf("brief: a cost of %v", b.CostPerHour)
	case b.CPULoad < 0 || b.CPULoad > 10 || b.MemoryLoad < 0 || b.MemoryLoad > 10:
		return fmt.Errorf("brief: a load of %d and %d tenths", b.CPULoad, b.MemoryLoad)
	}
	return nil
}

func (b Brief) encode() ([]byte, error) {
	if len(b.Version) > maxVersion {
		b.Version = b.Version[:maxVersion]
	}
	if err := b.check(); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	if len(raw) > memberlist.MetaMaxSize {
		return nil, fmt.Errorf("brief of %d bytes, and %d are the most", len(raw), memberlist.MetaMaxSize)
	}
	return raw, nil
}

// decodeBrief reads a brief; keys of later versions are ignored.
func decodeBrief(raw []byte) (Brief, error) {
	if len(raw) > memberlist.MetaMaxSize {
		return Brief{}, fmt.Errorf("brief of %d bytes", len(raw))
	}
	var b Brief
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&b); err != nil {
		return Brief{}, fmt.Errorf("brief: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF { //nolint:errorlint // Token does not wrap it
		return Brief{}, fmt.Errorf("brief: more after its end")
	}
	return b, b.check()
}
