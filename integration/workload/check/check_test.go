package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestARecorderKeepsWhatMatters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRecorder("test")
		if rep := r.Report(true); rep.OK {
			t.Error("a check without one request is ok")
		}
		time.Sleep(time.Second) //nolint:forbidigo // virtual: it is what is measured here
		r.Begin()
		began := time.Now()
		for range 20 {
			time.Sleep(time.Millisecond) //nolint:forbidigo // virtual time
			r.Done(100)
		}
		before := time.Now()
		time.Sleep(300 * time.Millisecond) //nolint:forbidigo // virtual time
		r.Done(100)
		for range 20 {
			time.Sleep(2 * time.Millisecond) //nolint:forbidigo // virtual time
			r.Done(100)
		}
		rep := r.Report(true)
		if !rep.OK || rep.Requests != 41 || rep.Bytes != 4100 {
			t.Errorf("report: %+v", rep)
		}
		if rep.LongestGapMS != 300 || rep.LongestGapAt != before.UTC().Format(time.RFC3339Nano) {
			t.Errorf("longest gap: %v ms at %s", rep.LongestGapMS, rep.LongestGapAt)
		}
		if rep.StartedAt != began.UTC().Format(time.RFC3339Nano) || rep.DurationMS != 360 {
			t.Errorf("from %s for %v ms", rep.StartedAt, rep.DurationMS)
		}

		time.Sleep(500 * time.Millisecond) //nolint:forbidigo // virtual time
		if rep := r.Report(true); rep.LongestGapMS != 500 {
			t.Errorf("a silence at the end is a gap: %v ms", rep.LongestGapMS)
		}
		r.Stop()
		time.Sleep(time.Hour) //nolint:forbidigo // virtual time
		r.Done(1)
		if rep := r.Report(true); rep.LongestGapMS != 500 || rep.Requests != 41 {
			t.Errorf("after the stop nothing is measured: %+v", rep)
		}
		r.Fail(errors.New("late"))
		if rep := r.Report(true); rep.OK || rep.ErrorCount != 1 {
			t.Errorf("but errors count: %+v", rep)
		}
	})
}

func TestErrorsAreCountedBeyondTheOnesKept(t *testing.T) {
	r := NewRecorder("test")
	r.Done(1)
	for range 25 {
		r.Fail(errors.New("broken"))
	}
	rep := r.Report(false)
	if rep.OK || rep.ErrorCount != 25 || len(rep.Errors) != maxErrors {
		t.Errorf("report: %+v", rep)
	}
}

func TestTheLongestGapsAreKeptInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRecorder("test")
		for i := range 100 {
			time.Sleep(time.Millisecond) //nolint:forbidigo // virtual time
			if i == 20 || i == 70 {
				time.Sleep(time.Duration(i) * time.Millisecond) //nolint:forbidigo // virtual time
			}
			r.Done(0)
		}
		var long []float64
		for _, g := range r.Report(true).Gaps {
			if g.MS > 1 {
				long = append(long, g.MS)
			}
		}
		if len(long) != 2 || long[0] != 21 || long[1] != 71 {
			t.Errorf("gaps: %v", long)
		}
	})
}

func TestContentFollowsFromItsKeyAlone(t *testing.T) {
	for _, n := range []int{0, 1, 7, 63, 64, 65, 5000} {
		a, b := bytes.Repeat([]byte{0xaa}, n), bytes.Repeat([]byte{0x55}, n)
		Fill(a, 1)
		Fill(b, 1)
		if !bytes.Equal(a, b) {
			t.Errorf("%d bytes: something of what was in the buffer before is left", n)
		}
		Fill(b, 2)
		if n > 64 && bytes.Equal(a, b) {
			t.Errorf("%d bytes: two keys, one content", n)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Bytes
		ok   bool
	}{
		{"256MiB", 256 << 20, true},
		{"50MB/s", 50e6, true},
		{"1.5KiB", 1536, true},
		{"4096", 4096, true},
		{"0", 0, true},
		{"7B", 7, true},
		{"", 0, false},
		{"much", 0, false},
		{"-1MiB", 0, false},
		{"NaNMiB", 0, false},
		{"9999999GiB", 0, false},
		{"5Mib", 0, false},
	} {
		got, err := ParseBytes(c.in)
		if (err == nil) != c.ok || got != c.want {
			t.Errorf("%q: %d, %v", c.in, got, err)
		}
	}
	for _, b := range []Bytes{0, 1, 1536, 256 << 20, 3 << 30} {
		if got, err := ParseBytes(b.String()); err != nil || got != b {
			t.Errorf("%d is written %s and read %d, %v", b, b, got, err)
		}
	}
}

func TestAPacerKeepsItsRateAndForgetsPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPacer(1000)
		began, n := time.Now(), 0
		for time.Since(began) < time.Second {
			if !p.Wait(t.Context()) {
				t.Fatal("the context ended")
			}
			n++
		}
		if n < 990 || n > 1010 {
			t.Errorf("%d events in a second", n)
		}
		time.Sleep(10 * time.Second) //nolint:forbidigo // virtual time
		for n = 0; p.Due(time.Now()); n++ {
		}
		if n > 51 {
			t.Errorf("%d events are caught up after a pause", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if p.Wait(ctx) {
			t.Error("waiting goes on after the end")
		}
	})
}

// lines collects what Run prints, from its goroutine.
type lines struct{ ch chan string }

func (l lines) Write(p []byte) (int, error) { l.ch <- string(p); return len(p), nil }

func TestRunEndsAfterTheDurationThatFollowsBegin(t *testing.T) {
	rec := NewRecorder("test")
	out := lines{make(chan string, 10)}
	err := Run(t.Context(), out, rec, 50*time.Millisecond, func(ctx context.Context) error {
		learn := time.NewTimer(150 * time.Millisecond) // longer than the duration
		select {
		case <-learn.C:
		case <-ctx.Done():
			return errors.New("the duration counted from before Begin")
		}
		rec.Begin()
		rec.Done(1)
		<-ctx.Done()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var rep Report
	if err := json.Unmarshal([]byte(<-out.ch), &rep); err != nil || !rep.OK || !rep.Final || rep.SchemaVersion != SchemaVersion {
		t.Errorf("report %+v, %v", rep, err)
	}
}

func TestASignalPrintsAReportInBetween(t *testing.T) {
	rec := NewRecorder("test")
	out := lines{make(chan string, 10)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	started := make(chan struct{})
	go func() {
		done <- Run(ctx, out, rec, 0, func(ctx context.Context) error {
			rec.Done(1)
			close(started)
			<-ctx.Done()
			return errors.New("wrong in the end")
		})
	}()
	<-started
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if first := <-out.ch; !strings.Contains(first, `"final":false`) || !strings.Contains(first, `"ok":true`) {
		t.Errorf("in between: %s", first)
	}
	cancel()
	if err := <-done; !errors.Is(err, ErrNotOK) {
		t.Errorf("an error of the work: %v", err)
	}
	if last := <-out.ch; !strings.Contains(last, `"final":true`) || !strings.Contains(last, "wrong in the end") {
		t.Errorf("at the end: %s", last)
	}
}
