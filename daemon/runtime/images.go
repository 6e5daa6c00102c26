package runtime

import (
	"context"
	"fmt"
)

// Layer is of an image, as hosts compare it.
type Layer struct {
	Key   string // NAMESPACE/DIGEST
	Bytes int64  // that a host without it has to be sent
}

// Layers lists those of the images of a namespace, by the image's name. known
// remembers them by NAMESPACE/DIGEST of the image: content never changes under
// a digest. Images that cannot be unpacked here are left out.
func (r *Runtime) Layers(ctx context.Context, namespace string, known map[string][]Layer) (map[string][]Layer, error) {
	if err := CheckName("namespace", namespace); err != nil {
		return nil, err
	}
	ctx = in(ctx, namespace)
	list, err := r.client.ListImages(ctx)
	if err != nil {
		return nil, fmt.Errorf("images of namespace %s: %w", namespace, err)
	}
	out := make(map[string][]Layer, len(list))
	for _, img := range list {
		key := namespace + "/" + img.Target().Digest.String()
		layers, ok := known[key]
		if !ok {
			manifest, _, err := manifestOf(ctx, r.client.ContentStore(), img.Target(), img.Platform())
			if err != nil {
				continue // removed meanwhile, or of another platform: no reason not to know the others
			}
			for _, l := range manifest.Layers {
				layers = append(layers, Layer{Key: namespace + "/" + l.Digest.String(), Bytes: l.Size})
			}
			known[key] = layers
		}
		out[img.Name()] = layers
	}
	return out, nil
}
