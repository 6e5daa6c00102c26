package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/cio"
	"golang.org/x/sys/unix"
)

// A shard that was made with a standard input has a pipe as fd 0. CRIU wants a
// pipe in its place at restore; a file of the new host would have no mount in
// the shard and keep it from moving again. So the new shim gets a fifo that
// nobody writes to.

// withStdin adds a fifo as standard input to what create makes.
func (r *Runtime) withStdin(namespace, name string, create cio.Creator) (cio.Creator, error) {
	path := r.stdinPath(namespace, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("standard input of %s: %w", name, err)
	}
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("standard input of %s: %w", name, err)
	}
	return func(id string) (cio.IO, error) {
		io, err := create(id)
		if err != nil {
			return nil, err
		}
		return &stdinIO{IO: io, path: path}, nil
	}, nil
}

type stdinIO struct {
	cio.IO
	path string
}

func (s *stdinIO) Config() cio.Config {
	cfg := s.IO.Config()
	cfg.Stdin = s.path
	return cfg
}

func (r *Runtime) stdinPath(namespace, name string) string {
	return filepath.Join(r.cfg.RunDir, "stdin", namespace+"--"+name)
}

// removeStdin removes the fifo once its task is gone.
func (r *Runtime) removeStdin(namespace, name string) error {
	return removeFile(r.stdinPath(namespace, name))
}

// restoreIO is what a restored task's streams are connected to.
func (r *Runtime) restoreIO(_ context.Context, namespace, name string, stdin bool) (cio.Creator, error) {
	create, err := r.logIO(namespace, name)
	if err != nil || !stdin {
		return create, err
	}
	return r.withStdin(namespace, name, create)
}
