package image

import (
	"bytes"
	"errors"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/stats"
	"google.golang.org/protobuf/proto"
)

func TestStatsOfADumpAndOfARestore(t *testing.T) {
	parts, err := ReadStats(bytes.NewReader(sample(t, "stats-dump")))
	if err != nil {
		t.Fatal(err)
	}
	took := map[string]int64{}
	for _, p := range parts {
		took[p.Name] = p.Took.Microseconds()
	}
	if took["frozen"] < took["memory"] || took["memory"] == 0 {
		t.Errorf("%v", parts)
	}
	var b bytes.Buffer
	w, err := newImage(&b, statsMagic)
	if err != nil {
		t.Fatal(err)
	}
	zero, forking, restore := uint64(0), uint32(1500), uint32(40000)
	if err := w.message(&stats.StatsEntry{Restore: &stats.RestoreStatsEntry{
		PagesCompared: &zero, PagesSkippedCow: &zero, ForkingTime: proto.Uint32(forking), RestoreTime: proto.Uint32(restore),
	}}); err != nil {
		t.Fatal(err)
	}
	parts, err = ReadStats(&b)
	if err != nil || len(parts) != 2 || parts[0].Took.Microseconds() != 1500 || parts[1].Took.Microseconds() != 40000 {
		t.Errorf("%v, %v", parts, err)
	}
	b.Reset()
	if w, err = newImage(&b, statsMagic); err != nil {
		t.Fatal(err)
	}
	if err := w.message(&stats.StatsEntry{}); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadStats(&b); !errors.Is(err, ErrMalformed) {
		t.Errorf("of nothing: %v", err)
	}
}
