package migrate

import (
	"math"
	"strconv"
	"testing"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func TestAReservationThatCannotBeAddedUpIsRefused(t *testing.T) {
	h := NewPeerHandler(&Manager{}, Host{})
	for _, n := range []int64{-1, math.MinInt64, maxShardMemory + 1, math.MaxInt64} {
		_, err := h.Reserve(t.Context(), connect.NewRequest(&v1.ReserveRequest{
			Id: "m-1", Shard: &v1.Shard{Namespace: "default", Name: "a"}, MemoryBytes: n,
		}))
		if connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestAHostThatReservesAndDoesNotComeIsRefusedMore(t *testing.T) {
	m := &Manager{incoming: map[string]*incoming{}}
	m.cfg.Node = "host-1"
	h := NewPeerHandler(m, Host{})
	for i := range maxReceiving {
		id := "m-" + strconv.Itoa(i)
		m.incoming[id] = &incoming{m: m, entry: &Entry{ID: id, State: Receiving}} // of "", which asks below
		m.incoming["other "+id] = &incoming{m: m, entry: &Entry{ID: id, State: Receiving, Peer: "host-3"}}
		m.incoming["runs "+id] = &incoming{m: m, entry: &Entry{ID: id, State: Running}}
	}
	resp, err := h.Reserve(t.Context(), connect.NewRequest(&v1.ReserveRequest{Id: "m-x", Shard: &v1.Shard{Namespace: "default", Name: "a"}}))
	if err != nil || len(resp.Msg.GetFindings()) != 1 || resp.Msg.GetFindings()[0].GetCode() != "busy" {
		t.Errorf("%v, %v", resp, err)
	}
	if n := m.receivingFrom("host-3"); n != maxReceiving {
		t.Errorf("%d from host-3", n)
	}
	if n := m.receivingFrom("host-4"); n != 0 {
		t.Errorf("%d from host-4", n)
	}
}
