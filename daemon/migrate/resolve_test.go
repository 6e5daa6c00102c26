package migrate

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

// fakePeer answers Commit and Abort, and nothing else.
type fakePeer struct {
	transhipv1connect.PeerClient
	commit func() (*v1.CommitResponse, error)
}

func (p fakePeer) Commit(context.Context, *connect.Request[v1.CommitRequest]) (*connect.Response[v1.CommitResponse], error) {
	resp, err := p.commit()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

func (fakePeer) Abort(context.Context, *connect.Request[v1.AbortRequest]) (*connect.Response[v1.AbortResponse], error) {
	return connect.NewResponse(&v1.AbortResponse{}), nil
}

// fakePeers is a pool of one other host.
type fakePeers struct{ peer fakePeer }

var _ Peers = fakePeers{}

func (p fakePeers) Client(string) (transhipv1connect.PeerClient, error) { return p.peer, nil }

func (fakePeers) Dial(context.Context, string, string, transfer.Options) (*transfer.Session, error) {
	return nil, errors.New("pages are of no concern here")
}

// inDoubt is a source that has yielded a shard and does not know whether it runs.
func inDoubt(t *testing.T, peer fakePeer) (*Manager, *Entry) {
	t.Helper()
	journal, err := OpenJournal(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := journal.Close(); err != nil {
			t.Error(err)
		}
	})
	e := &Entry{ID: "m-1", Role: Source, State: Yielded, Shard: "redis", Peer: "there", Mode: ModePreCopy}
	if err := journal.Put(e); err != nil {
		t.Fatal(err)
	}
	m, err := New(Config{Node: "here", StoreDir: t.TempDir(), TmpfsDir: t.TempDir()}, journal, &runtime.Runtime{}, fakePeers{peer},
		NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m, e
}

// A destination that was asked once more would run a shard that goes on here.
func TestNobodyIsAskedAfterAnOperatorHasSpoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		m, e := inDoubt(t, fakePeer{commit: func() (*v1.CommitResponse, error) {
			asked.Add(1)
			return nil, connect.NewError(connect.CodeUnavailable, errors.New("the link is cut"))
		}})
		settled := make(chan struct{})
		go func() {
			defer close(settled)
			m.settle(t.Context(), e)
		}()
		time.Sleep(2*time.Second + commitRetry/2) //nolint:forbidigo // between two questions
		before := asked.Load()
		if before < 2 {
			t.Fatalf("it was asked %d times while it was in doubt", before)
		}
		kept, err := m.journal.Get(Source, e.ID)
		if err != nil {
			t.Fatal(err)
		}
		kept.State = Aborted // what an operator's word is written down as
		if err := m.journal.Put(kept); err != nil {
			t.Fatal(err)
		}
		<-settled
		if more := asked.Load() - before; more > 0 {
			t.Errorf("it was asked %d times more", more)
		}
		if now, err := m.journal.Get(Source, e.ID); err != nil || now.State != Aborted {
			t.Errorf("the journal says %+v, %v", now, err)
		}
	})
}

// The shard would run here and there, and then be removed here.
func TestAnOperatorsWordDoesNotOvertakeAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		answer := make(chan struct{})
		m, e := inDoubt(t, fakePeer{commit: func() (*v1.CommitResponse, error) {
			<-answer
			return &v1.CommitResponse{Running: true}, nil
		}})
		settled := make(chan struct{})
		go func() {
			defer close(settled)
			m.settle(ctx, e)
		}()
		synctest.Wait() // it is being asked
		resolved := make(chan error, 1)
		go func() {
			_, err := m.Resolve(ctx, connect.NewRequest(&v1.ResolveRequest{Id: e.ID, Keep: keepHere}))
			resolved <- err
		}()
		synctest.Wait()
		select {
		case err := <-resolved:
			t.Errorf("resolved before the answer came: %v", err)
			resolved <- err
		default:
		}
		// It runs there, and cannot be removed here yet: nobody can ask containerd.
		close(answer)
		if err := <-resolved; connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("resolved: %v", err)
		}
		if now, err := m.journal.Get(Source, e.ID); err != nil || now.State != Yielded || !now.RunsThere {
			t.Errorf("the journal says %+v, %v", now, err)
		}
		stop()
		<-settled
	})
}
