package runtime

import (
	"encoding/json"
	"errors"
	"testing"
	"time"
)

func TestLabelsOfThePoolAreChecked(t *testing.T) {
	for _, c := range []struct {
		key, value string
		ok         bool
	}{
		{LabelWorkload, "web", true},
		{LabelPriority, "9", true},
		{LabelPriority, "10", false},
		{LabelPriority, "-1", false},
		{LabelAutopilot, "advise", true},
		{LabelAutopilot, "yes", false},
		{LabelRequestCPUs, "0.25", true},
		{LabelRequestCPUs, "NaN", false},
		{LabelLimitMemory, "268435456", true},
		{LabelLimitMemory, "256M", false},
		{LabelWindows, "02:00-05:00,22:30-01:00", true},
		{LabelWindows, "2-5", false},
		{LabelMaxBlackout, "300ms", true},
		{LabelMaxBlackout, "-1s", false},
		{LabelPinned, "true", true},
		{LabelIndex, "0", false},
		{LabelIncoming, "m1", false},
		{LabelIP, "10.89.0.1/16", false},
		{"tranship.io/unheard", "x", false},
	} {
		err := checkPolicy(c.key, c.value)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s=%s: %v", c.key, c.value, err)
		}
	}
}

func TestAWindowMayPassMidnight(t *testing.T) {
	windows, err := ParseWindows("22:30-01:00, 12:00-24:00")
	if err != nil || len(windows) != 2 {
		t.Fatal(windows, err)
	}
	at := func(hour, minute int) time.Time { return time.Date(2026, 5, 1, hour, minute, 0, 0, time.UTC) }
	for _, c := range []struct {
		now    time.Time
		holds0 bool
		holds1 bool
	}{
		{at(22, 29), false, true},
		{at(22, 30), true, true},
		{at(23, 59), true, true},
		{at(0, 0), true, false},
		{at(0, 59), true, false},
		{at(1, 0), false, false},
		{at(11, 59), false, false},
		{at(14, 0).In(time.FixedZone("far", 12*3600)), false, true},
	} {
		if got := windows[0].Holds(c.now); got != c.holds0 {
			t.Errorf("22:30-01:00 at %v: %v", c.now, got)
		}
		if got := windows[1].Holds(c.now); got != c.holds1 {
			t.Errorf("12:00-24:00 at %v: %v", c.now, got)
		}
	}
	for _, bad := range []string{"02:00", "02:00-02:00", "25:00-26:00", "a-b", "02:00-05:00,", "-"} {
		if w, err := ParseWindows(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, w)
		}
	}
}

func TestLimitsChangeAndNothingElseOfASpecificationDoes(t *testing.T) {
	const spec = `{"linux":{"resources":{"cpu":{"quota":50000,"period":100000,"shares":512},"memory":{"limit":268435456,"reservation":9007199254740993},"devices":[{"allow":false}]},"unheard":1},"process":{"args":["x"]}}`
	for _, c := range []struct {
		cpus   float64
		memory int64
		want   string
	}{
		{1.5, 512 << 20, `{"linux":{"resources":{"cpu":{"period":100000,"quota":150000,"shares":512},"devices":[{"allow":false}],"memory":{"limit":536870912,"reservation":9007199254740993}},"unheard":1},"process":{"args":["x"]}}`},
		{0, 0, `{"linux":{"resources":{"cpu":{"shares":512},"devices":[{"allow":false}],"memory":{"reservation":9007199254740993}},"unheard":1},"process":{"args":["x"]}}`},
	} {
		got, err := withLimits([]byte(spec), c.cpus, c.memory)
		if err != nil || string(got) != c.want {
			t.Errorf("%v CPUs, %d bytes: %s %v", c.cpus, c.memory, got, err)
		}
	}
	got, err := withLimits([]byte(`{}`), 2, 0)
	if err != nil || !json.Valid(got) {
		t.Errorf("%s %v", got, err)
	}
	if _, err := withLimits([]byte(`[]`), 2, 0); err == nil {
		t.Error("a list is taken for a specification")
	}
}
