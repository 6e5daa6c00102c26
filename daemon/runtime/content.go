package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Road of an image to the destination: EnsureContent says which blobs are
// missing, the source opens them (OpenBlob), the destination writes and
// verifies them under the migration's lease (WriteBlob), PrepareImage makes
// them an image and unpacks it.

// leaseLife bounds how long content of a migration that nobody remembers stays:
// longer than any deadline, shorter than an operator's patience with a full disk.
const leaseLife = 24 * time.Hour

// withLease scopes ctx to the migration's containerd lease, which keeps the
// garbage collector away from what no image or container refers to yet.
func (r *Runtime) withLease(ctx context.Context, migration string) (context.Context, error) {
	id := leaseID(migration)
	_, err := r.client.LeasesService().Create(ctx, leases.WithID(id), leases.WithExpiration(leaseLife))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return ctx, fmt.Errorf("containerd lease %s: %w", id, err)
	}
	return leases.WithLease(ctx, id), nil
}

func leaseID(migration string) string { return "tranship-" + migration }

func (r *Runtime) dropLease(ctx context.Context, migration string) error {
	err := r.client.LeasesService().Delete(ctx, leases.Lease{ID: leaseID(migration)}, leases.SynchronousDelete)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("containerd lease %s: %w", leaseID(migration), err)
	}
	return nil
}

// EnsureContent says which blobs this host lacks to unpack the record's image;
// layers that are unpacked already are not missed. It leases what is there, so
// that it is still there when the rest has come.
func (r *Runtime) EnsureContent(ctx context.Context, rec *Record, migration string) ([]ocispec.Descriptor, error) {
	ctx, err := r.withLease(in(ctx, rec.Namespace), migration)
	if err != nil {
		return nil, err
	}
	wanted := []ocispec.Descriptor{rec.Image.Target}
	if rec.Image.Manifest.Digest != rec.Image.Target.Digest {
		wanted = append(wanted, rec.Image.Manifest)
	}
	wanted = append(wanted, rec.Image.Config)
	unpacked, err := r.unpacked(ctx, rec)
	if err != nil {
		return nil, err
	}
	if !unpacked {
		wanted = append(wanted, rec.Image.Layers...)
	}
	store := r.client.ContentStore()
	lease := leases.Lease{ID: leaseID(migration)}
	var missing []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	for _, d := range wanted {
		if seen[d.Digest] {
			continue // an empty layer may occur twice
		}
		seen[d.Digest] = true
		info, err := store.Info(ctx, d.Digest)
		switch {
		case errdefs.IsNotFound(err):
			missing = append(missing, d)
		case err != nil:
			return nil, fmt.Errorf("content %s: %w", d.Digest, err)
		case info.Size != d.Size:
			return nil, fmt.Errorf("content %s has %d bytes here and %d at %s", d.Digest, info.Size, d.Size, rec.Node)
		default:
			res := leases.Resource{ID: d.Digest.String(), Type: "content"}
			if err := r.client.LeasesService().AddResource(ctx, lease, res); err != nil {
				return nil, fmt.Errorf("lease content %s: %w", d.Digest, err)
			}
		}
	}
	return missing, nil
}

func (r *Runtime) unpacked(ctx context.Context, rec *Record) (bool, error) {
	if rec.Image.ChainID == "" {
		return true, nil // an image without layers
	}
	_, err := r.client.SnapshotService(rec.Snapshot.Snapshotter).Stat(ctx, rec.Image.ChainID.String())
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("snapshot %s: %w", rec.Image.ChainID, err)
	}
	return true, nil
}

// Blob is one piece of content at the source. Close it.
type Blob struct {
	content.ReaderAt
}

// Reader reads the blob from its start.
func (b Blob) Reader() io.Reader { return content.NewReader(b.ReaderAt) }

// OpenBlob opens content for a peer; ErrNotFound when it was collected.
func (r *Runtime) OpenBlob(ctx context.Context, namespace string, d digest.Digest) (Blob, error) {
	if err := d.Validate(); err != nil {
		return Blob{}, fmt.Errorf("%w: digest %q", ErrInvalid, d)
	}
	ra, err := r.client.ContentStore().ReaderAt(in(ctx, namespace), ocispec.Descriptor{Digest: d})
	if errdefs.IsNotFound(err) {
		return Blob{}, fmt.Errorf("content %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return Blob{}, fmt.Errorf("content %s: %w", d, err)
	}
	return Blob{ra}, nil
}

// WriteBlob stores size bytes from src as content d under the migration's
// lease. containerd verifies size and digest before the blob becomes visible;
// a blob that exists already is success. An interrupted write is begun anew.
func (r *Runtime) WriteBlob(ctx context.Context, namespace, migration string, d ocispec.Descriptor, src io.Reader) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q", ErrInvalid, d.Digest)
	}
	ctx, err := r.withLease(in(ctx, namespace), migration)
	if err != nil {
		return err
	}
	store := r.client.ContentStore()
	ref := leaseID(migration) + "-" + d.Digest.String()
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write content %s: %w", d.Digest, err)
	}
	defer w.Close()
	// What an earlier attempt left cannot be skipped in src: start over.
	if err := w.Truncate(0); err != nil {
		return fmt.Errorf("write content %s: %w", d.Digest, err)
	}
	// One byte more than promised is enough to notice a source that sends too much.
	n, err := io.Copy(w, io.LimitReader(src, d.Size+1))
	if err == nil && n != d.Size {
		err = fmt.Errorf("%d bytes came instead of %d", n, d.Size)
	}
	if err == nil {
		err = w.Commit(ctx, d.Size, d.Digest)
	}
	if err == nil || errdefs.IsAlreadyExists(err) {
		return nil
	}
	undo, cancel := detached(ctx)
	defer cancel()
	if abort := store.Abort(undo, ref); abort != nil && !errdefs.IsNotFound(abort) {
		err = errors.Join(err, abort)
	}
	return fmt.Errorf("write content %s: %w", d.Digest, err)
}

// PrepareImage turns the blobs into an image and unpacks it. An image of the
// same name with other content is left alone: then the moved one gets a name
// with its digest, which is returned. May run twice.
func (r *Runtime) PrepareImage(ctx context.Context, rec *Record, migration string) (string, error) {
	ctx, err := r.withLease(in(ctx, rec.Namespace), migration)
	if err != nil {
		return "", err
	}
	name, err := r.recordImage(ctx, rec, migration)
	if err != nil {
		return "", err
	}
	unpacked, err := r.unpacked(ctx, rec)
	if err != nil || unpacked {
		return name, err
	}
	// The manifest itself rather than the index: this host's idea of the best
	// platform in the index may be another one than the source's.
	img := containerd.NewImage(r.client, images.Image{Name: name, Target: rec.Image.Manifest})
	if err := img.Unpack(ctx, rec.Snapshot.Snapshotter); err != nil {
		return "", fmt.Errorf("unpack %s: %w", name, err)
	}
	if ok, err := r.unpacked(ctx, rec); err != nil || !ok {
		return "", errors.Join(err, fmt.Errorf("unpack %s: the layers do not make snapshot %s", name, rec.Image.ChainID))
	}
	return name, nil
}

func (r *Runtime) recordImage(ctx context.Context, rec *Record, migration string) (string, error) {
	if err := r.linkContent(ctx, rec); err != nil {
		return "", err
	}
	store := r.client.ImageService()
	pinned := rec.Image.Name + "@" + rec.Image.Target.Digest.String()
	for _, name := range []string{rec.Image.Name, pinned} {
		_, err := store.Create(ctx, images.Image{
			Name: name, Target: rec.Image.Target,
			Labels: map[string]string{LabelIncoming: migration},
		})
		if err == nil {
			return name, nil
		}
		if !errdefs.IsAlreadyExists(err) {
			return "", fmt.Errorf("image %s: %w", name, err)
		}
		have, err := store.Get(ctx, name)
		if err != nil {
			return "", fmt.Errorf("image %s: %w", name, err)
		}
		if have.Target.Digest == rec.Image.Target.Digest {
			return name, nil
		}
	}
	return "", fmt.Errorf("image %s: %w: other content", pinned, ErrExists)
}

// linkContent labels parents with their children, which is all that containerd's
// garbage collector follows.
func (r *Runtime) linkContent(ctx context.Context, rec *Record) error {
	link := func(parent digest.Digest, labels map[string]string) error {
		info := content.Info{Digest: parent, Labels: labels}
		var paths []string
		for key := range labels {
			paths = append(paths, "labels."+key)
		}
		if _, err := r.client.ContentStore().Update(ctx, info, paths...); err != nil {
			return fmt.Errorf("content %s: %w", parent, err)
		}
		return nil
	}
	img := rec.Image
	children := map[string]string{"containerd.io/gc.ref.content.config": img.Config.Digest.String()}
	for i, layer := range img.Layers {
		children[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = layer.Digest.String()
	}
	if err := link(img.Manifest.Digest, children); err != nil {
		return err
	}
	if img.ChainID != "" {
		snapshot := "containerd.io/gc.ref.snapshot." + rec.Snapshot.Snapshotter
		if err := link(img.Config.Digest, map[string]string{snapshot: img.ChainID.String()}); err != nil {
			return err
		}
	}
	if img.Target.Digest == img.Manifest.Digest {
		return nil
	}
	return link(img.Target.Digest, map[string]string{"containerd.io/gc.ref.content.tranship": img.Manifest.Digest.String()})
}

// indexDepth bounds indexes within indexes; real ones have one level.
const indexDepth = 4

// manifestOf finds the manifest for this platform, with its descriptor, by the
// rule by which containerd chose it when the image was unpacked.
func manifestOf(ctx context.Context, store content.Provider, target ocispec.Descriptor, platform platforms.MatchComparer) (ocispec.Manifest, ocispec.Descriptor, error) {
	var manifest ocispec.Manifest
	for range indexDepth {
		raw, err := content.ReadBlob(ctx, store, target)
		if err != nil {
			return manifest, target, err
		}
		if images.IsManifestType(target.MediaType) {
			err := json.Unmarshal(raw, &manifest)
			return manifest, target, err
		}
		if !images.IsIndexType(target.MediaType) {
			return manifest, target, fmt.Errorf("media type %s is neither a manifest nor an index", target.MediaType)
		}
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return manifest, target, err
		}
		best := -1
		for i, d := range index.Manifests {
			if d.Platform != nil && !platform.Match(*d.Platform) {
				continue
			}
			if best < 0 || d.Platform != nil && (index.Manifests[best].Platform == nil ||
				platform.Less(*d.Platform, *index.Manifests[best].Platform)) {
				best = i
			}
		}
		if best < 0 {
			return manifest, target, fmt.Errorf("index %s has no manifest for this platform", target.Digest)
		}
		target = index.Manifests[best]
	}
	return manifest, target, errors.New("indexes within indexes")
}

// undoTimeout bounds work that goes on after its caller was cancelled.
const undoTimeout = 30 * time.Second

func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// nativeError turns what a gRPC stub returned into errdefs' sentinels.
func nativeError(err error) error { return errgrpc.ToNative(err) }
