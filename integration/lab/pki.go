package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/daemon/peers/pki"
)

// gossipPort follows peerPort, as it does on any host.
const gossipPort = peerPort + 1

// writePKI makes the lab's own cluster, as `tranship cluster init` on the first
// host does, and every other host's certificate in place of its joining, as far
// as they are missing: a certificate that changes under a running transhipd
// would cut its connections.
func writePKI(p plan) error {
	var a *cluster.Authority
	var first cluster.Seed
	for _, node := range p.nodes {
		if node.Role != roleHost {
			continue
		}
		at := filepath.Join(nodeDir(node.Name), "etc-tranship", "pki")
		if a == nil {
			first = cluster.Seed{Name: node.Name, Address: peerAddress(node), Gossip: net.JoinHostPort(node.Host.Addr().String(), strconv.Itoa(gossipPort))}
			var err error
			if a, err = cluster.OpenAuthority(at); errors.Is(err, os.ErrNotExist) {
				a, err = cluster.Found(at, node.Name, first)
			}
			if err != nil {
				return fmt.Errorf("the lab's cluster: %w", err)
			}
			continue
		}
		if exists(filepath.Join(at, pki.CertFile)) {
			continue
		}
		if err := a.Equip(at, node.Name, first.Name, []cluster.Seed{first}); err != nil {
			return fmt.Errorf("the lab's cluster: %s: %w", node.Name, err)
		}
	}
	return nil
}
