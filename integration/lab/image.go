package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// ImageSpec says what goes into an image: a root file system, or programs of
// this machine with everything that they need to run.
type ImageSpec struct {
	// Name is the reference under which containerd knows the image, as given.
	Name string
	// Rootfs is a directory that becomes the image's root, owners included.
	Rootfs string
	// Bins are programs, scripts or directories; each keeps its path. A bare
	// name is looked up on PATH.
	Bins []string
	// Cmd is what a container runs by default; empty is the first of Bins.
	Cmd []string
	// Env is added to PATH and LANG.
	Env []string
	// User is the OCI user, name or number; "" is root.
	User string
}

// imageNameAnnotation is containerd's own: taken as it stands, where the
// standard ref.name would get a prefix.
const imageNameAnnotation = "io.containerd.image.name"

// Image packs an image and imports it on every host of the pool, into a
// namespace of containerd.
func (l *Lab) Image(ctx context.Context, namespace string, spec ImageSpec) error {
	f, err := os.CreateTemp(rootDir, "image-*.tar")
	if err != nil {
		return fmt.Errorf("image %s: %w", spec.Name, err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := PackImage(ctx, spec, f); err != nil {
		return fmt.Errorf("image %s: %w", spec.Name, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("image %s: %w", spec.Name, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, h := range l.Hosts() {
		group.Go(func() error {
			// Hosts see this file under the same path: they share the disk.
			_, err := h.Exec(ctx, "ctr", "--namespace", namespace, "images", "import", f.Name())
			return err
		})
	}
	return group.Wait()
}

// PackImage writes an OCI layout as a tar archive. The same input gives the
// same bytes: entries are sorted and carry their files' times.
func PackImage(ctx context.Context, spec ImageSpec, w io.Writer) error {
	switch {
	case spec.Name == "":
		return errors.New("an image needs a name")
	case (spec.Rootfs == "") == (len(spec.Bins) == 0):
		return errors.New("give either a root file system or programs")
	}
	var files *tree
	var err error
	if spec.Rootfs != "" {
		files, err = rootfsTree(ctx, spec.Rootfs)
	} else {
		files, err = programTree(ctx, spec.Bins)
	}
	if err != nil {
		return err
	}
	layer, err := os.CreateTemp("", "tranship-layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	sum := sha256.New()
	if err := files.write(ctx, io.MultiWriter(layer, sum)); err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	size, err := layer.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return writeLayout(w, spec, files, layer, ocispec.Descriptor{
		// Not compressed: it goes from this disk to this disk.
		MediaType: ocispec.MediaTypeImageLayer, Digest: digest.NewDigest(digest.SHA256, sum), Size: size,
	})
}

// writeLayout wraps one layer in an image: configuration, manifest, index.
func writeLayout(w io.Writer, spec ImageSpec, files *tree, layer io.Reader, layerDesc ocispec.Descriptor) error {
	platform := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	cmd := spec.Cmd
	if len(cmd) == 0 && len(files.programs) > 0 {
		cmd = files.programs[:1]
	}
	config, configDesc, err := blob(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platform,
		Config:   ocispec.ImageConfig{Cmd: cmd, Env: append(files.env(), spec.Env...), User: spec.User, WorkingDir: "/"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layerDesc.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, manifestDesc, err := blob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: configDesc, Layers: []ocispec.Descriptor{layerDesc},
	})
	if err != nil {
		return err
	}
	manifestDesc.Platform = &platform
	manifestDesc.Annotations = map[string]string{imageNameAnnotation: spec.Name, ocispec.AnnotationRefName: spec.Name}
	index, _, err := blob(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{manifestDesc},
	})
	if err != nil {
		return err
	}
	layout, _, err := blob("", ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}

	tw := tar.NewWriter(w)
	put := func(name string, size int64, from io.Reader) error {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		_, err := io.Copy(tw, from)
		return err
	}
	for _, part := range []struct {
		name string
		data []byte
	}{
		{ocispec.ImageLayoutFile, layout},
		{ocispec.ImageIndexFile, index},
		{blobPath(manifestDesc), manifest},
		{blobPath(configDesc), config},
	} {
		if err := put(part.name, int64(len(part.data)), bytes.NewReader(part.data)); err != nil {
			return err
		}
	}
	if err := put(blobPath(layerDesc), layerDesc.Size, layer); err != nil {
		return err
	}
	return tw.Close()
}

func blob(mediaType string, v any) ([]byte, ocispec.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	return raw, ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, nil
}

func blobPath(d ocispec.Descriptor) string {
	return ocispec.ImageBlobsDir + "/" + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded()
}

// env has PATH with the directories of the packed programs in front.
func (t *tree) env() []string {
	path := []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	var own []string
	for _, p := range t.programs {
		dir := filepath.Dir(p)
		if !slices.Contains(path, dir) && !slices.Contains(own, dir) {
			own = append(own, dir)
		}
	}
	return []string{"PATH=" + strings.Join(append(own, path...), ":"), "LANG=C.UTF-8"}
}
