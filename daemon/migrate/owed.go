package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/checkpoint/track"
)

// Which pages come later, in post-copy: the source's last round finds them
// (leaveOwed), the images say which of them are tranship's (sendOwed), and the
// destination makes what it has in their place unreadable (takeOwed, owe).

// sendOwed sends, instead of the last pages, which they are: those that were
// written since the last round, and any that no round covered, as far as CRIU
// left them to tranship.
func (o *outgoing) sendOwed(ctx context.Context, lazy map[checkpoint.PID][]checkpoint.Extent) error {
	owed := map[checkpoint.PID][]checkpoint.Extent{}
	for pid, extents := range lazy {
		set := extentSet{}
		for _, e := range extents {
			for _, part := range append(o.owed.common(e), o.told.missing(e)...) {
				set.add(part)
			}
		}
		for _, sp := range set[pid] {
			owed[pid] = append(owed[pid], checkpoint.Extent{PID: pid, Addr: sp.from, Pages: checkpoint.Pages(sp.to-sp.from) / checkpoint.PageSize})
		}
	}
	raw := pagestore.AppendOwed(nil, owed)
	if len(raw) > pagestore.MaxOwedList {
		return fmt.Errorf("the list of %d bytes of owed pages is longer than %d", len(raw), pagestore.MaxOwedList)
	}
	if err := os.WriteFile(filepath.Join(o.m.dir(o.entry.ID, Source), owedFile), raw, 0o600); err != nil {
		return err
	}
	o.owedDigest = xxh3.Hash(raw)
	return o.sendBytes(ctx, blobOwed, raw)
}

// leaveOwed is the last round of post-copy: holes are told, as they replace what
// the destination has, and pages with content are owed.
func (o *outgoing) leaveOwed(ctx context.Context, n int) (RoundResult, error) {
	began := time.Now()
	procs, err := o.processes()
	if err != nil {
		return RoundResult{}, err
	}
	o.stood = procs
	var holes []checkpoint.Extent
	_, err = o.tracker.Collect(ctx, procs, track.Options{Frozen: true}, func(e checkpoint.Extent) error {
		if e.Hole {
			holes = append(holes, e)
		} else {
			o.owed.add(e)
		}
		return nil
	})
	if err != nil {
		return RoundResult{}, err
	}
	res, err := o.send(ctx, n, procs, holes, o.sendShared, began)
	if err != nil {
		return RoundResult{}, err
	}
	for pid, spans := range o.owed {
		for _, sp := range spans {
			o.told.add(checkpoint.Extent{PID: pid, Addr: sp.from, Pages: checkpoint.Pages(sp.to-sp.from) / checkpoint.PageSize})
		}
	}
	return res, nil
}

func (o *outgoing) sendBytes(ctx context.Context, kind string, raw []byte) error {
	sent, err := o.session.Blob(ctx, kind, "", int64(len(raw)), bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("send %s: %w", kind, err)
	}
	o.report.count(sent)
	return nil
}

// owedList is which pages come later, as the source sent it.
type owedList struct {
	pages  map[checkpoint.PID][]checkpoint.Extent
	bytes  checkpoint.Bytes
	digest uint64
}

// stillOwed is how much memory will come after the restore, as far as this daemon
// knows, in bytes.
func (in *incoming) stillOwed() int64 {
	owed := in.owed.Load()
	if owed == nil || in.entry.State.Final() || in.pull.whole.Load() {
		return 0
	}
	return max(0, int64(owed.bytes)-in.arrived.Load())
}

func (in *incoming) takeOwed(r io.Reader) error {
	if in.entry.Mode != ModePostCopy {
		return fmt.Errorf("owed pages in mode %s", in.entry.Mode)
	}
	raw, err := io.ReadAll(io.LimitReader(r, pagestore.MaxOwedList+1))
	if err != nil {
		return err
	}
	pages, err := pagestore.ParseOwed(raw)
	if err != nil {
		return err
	}
	list := &owedList{pages: pages, digest: xxh3.Hash(raw)}
	for _, extents := range pages {
		for _, e := range extents {
			list.bytes += e.Bytes()
		}
	}
	in.owed.Store(list)
	return nil
}

// owe makes what earlier rounds left of owed pages unreadable, before the shard
// may be restored.
func (in *incoming) owe(sum uint64) error {
	if in.entry.Mode != ModePostCopy {
		return nil
	}
	owed := in.owed.Load()
	if owed == nil || owed.digest != sum {
		return errors.New("the list of owed pages has not arrived")
	}
	if err := in.store.Owe(owed.pages); err != nil {
		return err
	}
	in.owed.Store(&owedList{bytes: owed.bytes, digest: owed.digest})
	return nil
}
