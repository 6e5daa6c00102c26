package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// DescribeImage is the record of an image of this host, without a container;
// ErrNotFound when it has none of that name.
func (r *Runtime) DescribeImage(ctx context.Context, namespace, ref string) (*Record, error) {
	if err := CheckName("namespace", namespace); err != nil {
		return nil, err
	}
	nsctx := in(ctx, namespace)
	names := []string{ref}
	// What `docker` calls redis is docker.io/library/redis:latest in containerd.
	if named, err := reference.ParseDockerRef(ref); err == nil && named.String() != ref {
		names = append(names, named.String())
	}
	for _, name := range names {
		_, err := r.client.ImageService().Get(nsctx, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		img := r.describeImage(nsctx, containers.Container{Image: name}, "")
		if img.ChainID == "" && img.Problem != "" {
			return nil, errors.New(img.Problem)
		}
		img.Problem = "" // no snapshot to differ from
		return &Record{
			Version: RecordVersion, Node: r.cfg.Node, Namespace: namespace, Image: img,
			Snapshot: SnapshotRecord{Snapshotter: r.cfg.Snapshotter, Parent: string(img.ChainID)},
		}, nil
	}
	return nil, fmt.Errorf("image %s: %w", ref, ErrNotFound)
}

// FetchImage brings an image that another host described here, the way a
// migration would, and unpacks it; open reads a blob there. id names the
// transfer: nothing of one that fails is left.
func (r *Runtime) FetchImage(ctx context.Context, rec *Record, id string, open func(context.Context, digest.Digest) (io.ReadCloser, error)) (err error) {
	rec.Snapshot.Snapshotter = r.cfg.Snapshotter
	var bad error
	rec.validateImage(func(format string, args ...any) {
		bad = errors.Join(bad, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	})
	if err := errors.Join(bad, CheckName("namespace", rec.Namespace)); err != nil {
		return err
	}
	defer func() {
		undo, cancel := detached(in(ctx, rec.Namespace))
		defer cancel()
		if err != nil {
			err = errors.Join(err, r.dropIncomingImages(undo, id))
		}
		err = errors.Join(err, r.dropLease(undo, id))
	}()
	missing, err := r.EnsureContent(ctx, rec, id)
	if err != nil {
		return err
	}
	for _, d := range missing {
		body, err := open(ctx, d.Digest)
		if err != nil {
			return fmt.Errorf("image %s: %w", rec.Image.Name, err)
		}
		if err := errors.Join(r.WriteBlob(ctx, rec.Namespace, id, d, body), body.Close()); err != nil {
			return fmt.Errorf("image %s: %w", rec.Image.Name, err)
		}
	}
	name, err := r.PrepareImage(ctx, rec, id)
	if err != nil {
		return err
	}
	store := r.client.ImageService()
	img := images.Image{Name: name, Labels: map[string]string{LabelIncoming: ""}}
	if _, err := store.Update(in(ctx, rec.Namespace), img, "labels."+LabelIncoming); err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	return nil
}

func (r *Runtime) dropIncomingImages(ctx context.Context, id string) error {
	brought, err := r.client.ImageService().List(ctx, fmt.Sprintf("labels.%q==%s", LabelIncoming, id))
	for _, img := range brought {
		err = errors.Join(err, r.client.ImageService().Delete(ctx, img.Name, images.SynchronousDelete()))
	}
	return err
}
