package runtime

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// ImageRef is an image of a namespace as hosts compare it.
type ImageRef struct {
	// Key is NAMESPACE/DIGEST of what the name points to.
	Key string
	// Bytes of content that a host without it has to be sent; 0 unknown.
	Bytes int64
}

// Images lists the images of a namespace, by name. sizes remembers what images
// were measured before, by Key: content never changes under a digest.
func (r *Runtime) Images(ctx context.Context, namespace string, sizes map[string]int64) (map[string]ImageRef, error) {
	if err := CheckName("namespace", namespace); err != nil {
		return nil, err
	}
	ctx = in(ctx, namespace)
	list, err := r.client.ListImages(ctx)
	if err != nil {
		return nil, fmt.Errorf("images of namespace %s: %w", namespace, err)
	}
	out := make(map[string]ImageRef, len(list))
	for _, img := range list {
		ref := ImageRef{Key: namespace + "/" + img.Target().Digest.String()}
		size, known := sizes[ref.Key]
		if !known {
			size, err = img.Size(ctx)
			if err != nil {
				// Content of another platform, or removed meanwhile: no reason not to
				// know the others.
				if !errdefs.IsNotFound(err) {
					return nil, fmt.Errorf("image %s: %w", img.Name(), err)
				}
				size = 0
			}
			sizes[ref.Key] = size
		}
		ref.Bytes = size
		out[img.Name()] = ref
	}
	return out, nil
}
