package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/peers/pki"
)

// cordon is a file that is there while this host takes no shards: it is the
// host's own, and survives whatever happens to the daemon.
type cordon struct {
	path string

	mu sync.Mutex
	is bool
}

func openCordon(stateDir string) (*cordon, error) {
	c := &cordon{path: filepath.Join(stateDir, "cordoned")}
	_, err := os.Lstat(c.path)
	switch {
	case err == nil:
		c.is = true
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("cordon: %w", err)
	}
	return c, nil
}

func (c *cordon) on() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.is
}

// set is on disk when it returns.
func (c *cordon) set(on bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if on == c.is {
		return nil
	}
	if on {
		if err := pki.Replace(c.path, nil, 0o600); err != nil {
			return fmt.Errorf("cordon: %w", err)
		}
		c.is = true
		return nil
	}
	if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("uncordon: %w", err)
	}
	dir, err := os.Open(filepath.Dir(c.path))
	if err != nil {
		return fmt.Errorf("uncordon: %w", err)
	}
	c.is = false
	return errors.Join(dir.Sync(), dir.Close())
}

// isHere says whether a request means this host.
func (h *host) isHere(node string) bool { return node == "" || node == h.cfg.Node }

var errNoPeers = connect.NewError(connect.CodeNotFound, errors.New("this host knows no other: tranship nodes lists the pool"))

// cordonNode cordons a node of the pool, through the node itself.
func (h *host) cordonNode(ctx context.Context, req *v1.CordonRequest) (*v1.CordonResponse, error) {
	if h.isHere(req.GetNode()) {
		return h.cordonHere(ctx, req)
	}
	if h.peers == nil {
		return nil, errNoPeers
	}
	client, err := h.peers.Pool(req.GetNode())
	if err != nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%w; tranship nodes lists the pool", err))
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	resp, err := client.Cordon(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", req.GetNode(), err)
	}
	return resp.Msg, nil
}

func (h *host) cordonHere(ctx context.Context, req *v1.CordonRequest) (*v1.CordonResponse, error) {
	if err := h.cordon.set(!req.GetOff()); err != nil {
		return nil, err
	}
	h.log.Info("cordon", "on", !req.GetOff())
	if h.cluster != nil && h.cluster.live.Load() != nil {
		h.cluster.tell(ctx)
	}
	return &v1.CordonResponse{Cordoned: !req.GetOff()}, nil
}
