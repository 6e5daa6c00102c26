package migrate

import (
	"errors"
	"os/exec"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/track"
)

// While the shard runs, a process may end after it was looked at. While it stands
// still none does, and a restored one would go on without what was not sent.
func TestPagesOfAFrozenProcessThatWasKilledAreNotLeftOut(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	o := &outgoing{m: &Manager{turns: newTurns()}}
	e := checkpoint.Extent{PID: 1, Addr: 0x10000, Pages: 3}
	send := func() error { // no page is there, so nothing is given to a round
		return o.sendExtent(t.Context(), nil, cmd.Process.Pid, e, make([]byte, readChunk))
	}
	if err := send(); err != nil {
		t.Errorf("while it runs: %v", err)
	}
	o.frozenAt = time.Now()
	if err := send(); !errors.Is(err, track.ErrDied) {
		t.Errorf("while it stands still: %v", err)
	}
}

func TestAProcessThatTheLastRoundDidNotSeeEndsTheMigration(t *testing.T) {
	o := &outgoing{stood: []checkpoint.Process{{PID: 1, HostPID: 100}, {PID: 7, HostPID: 107}}}
	pages := []checkpoint.Extent{{PID: 7, Addr: 0x10000, Pages: 1}}
	if err := o.allStood(map[checkpoint.PID][]checkpoint.Extent{1: nil, 7: pages, 8: nil}); err != nil {
		t.Errorf("all with pages were seen: %v", err)
	}
	if err := o.allStood(map[checkpoint.PID][]checkpoint.Extent{1: nil, 9: pages}); !errors.Is(err, track.ErrDied) {
		t.Errorf("one was not: %v", err)
	}
}
