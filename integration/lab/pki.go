package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tranship/tranship/daemon/peers/pki"
)

// certLifetime outlives any lab.
const certLifetime = 30 * 24 * time.Hour

// writePKI makes the lab's own cluster key and every host's certificate, as
// far as they are missing: a certificate that changes under a running
// transhipd would cut its connections.
func writePKI(p plan) error {
	dir := filepath.Join(rootDir, "ca")
	if err := os.MkdirAll(rootDir, 0o700); err != nil {
		return fmt.Errorf("the lab's files: %w", err)
	}
	ca, err := pki.Load(dir)
	if errors.Is(err, os.ErrNotExist) {
		ca, err = pki.Init(dir)
	}
	if err != nil {
		return err
	}
	for _, node := range p.nodes {
		if node.Role != roleHost {
			continue
		}
		at := filepath.Join(nodeDir(node.Name), "etc-tranship", "pki")
		if exists(filepath.Join(at, pki.CertFile)) {
			continue
		}
		cert, key, err := ca.Issue(node.Name, certLifetime)
		if err != nil {
			return err
		}
		if err := pki.Write(at, ca.CertPEM(), cert, key); err != nil {
			return err
		}
	}
	return nil
}
