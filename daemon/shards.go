package daemon

import (
	"context"
	"net/http"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func (h *host) mountShards(*http.ServeMux) {}

func (h *host) localShards(context.Context) []*v1.Shard { return nil }
