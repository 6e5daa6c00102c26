package sim

import "slices"

// Report of one policy on one scenario. Minutes are simulated.
type Report struct {
	Scenario  string  `json:"scenario"`
	Policy    string  `json:"policy"`
	Seed      uint64  `json:"seed"`
	Hosts     int     `json:"hosts"`
	Shards    int     `json:"shards"`
	DurationS float64 `json:"duration_s"`

	OverloadHostMinutes float64            `json:"overload_host_minutes"`
	UnderServed         map[string]float64 `json:"under_served_shard_minutes"` // by priority, moves' blackout not in it
	DownShardMinutes    float64            `json:"down_shard_minutes"`         // after host failures

	Moves         int            `json:"moves"`
	MovesByReason map[string]int `json:"moves_by_reason"`
	MovesFailed   int            `json:"moves_failed"`
	BytesMoved    float64        `json:"bytes_moved"`
	BlackoutS     float64        `json:"blackout_s"`
	Thrash        int            `json:"thrash"` // shards moved again within 30 min
	ThrashShare   float64        `json:"thrash_share"`
	Resizes       int            `json:"resizes"`

	HostsUsedMean float64 `json:"hosts_used_mean"`
	HostsUsedMax  int     `json:"hosts_used_max"`
	HostHours     float64 `json:"host_hours"`
	Cost          float64 `json:"cost"`

	Asked      int            `json:"reservations_asked"`
	Vetoed     int            `json:"reservations_vetoed"`
	VetoedBy   map[string]int `json:"reservations_vetoed_by"`
	BeyondRoom int            `json:"reservations_beyond_room"` // most that one target had accepted beyond its room

	// As in Beloglazov & Buyya 2012.
	SLATAH    float64 `json:"slatah"` // mean over hosts of time at full load over time in use
	PDM       float64 `json:"pdm"`    // mean over shards of work lost to moves over work asked for
	SLAV      float64 `json:"slav"`
	EnergyKWh float64 `json:"energy_kwh,omitempty"`

	Timeline []Point   `json:"timeline"`
	Planning *Planning `json:"planning,omitempty"`
}

// Point is one step.
type Point struct {
	Minute     float64 `json:"minute"`
	Overloaded int     `json:"overloaded_hosts"` // at its end
	Used       int     `json:"hosts_used"`
	Moves      int     `json:"moves"`
}

// Planning is what planning took, per host and round. It is measured, and
// differs from run to run.
type Planning struct {
	Rounds int `json:"rounds"`
	Spread
	// CPU is what of it was work; the rest was waiting for a processor.
	CPU *Spread `json:"cpu,omitempty"`
}

// Spread of times.
type Spread struct {
	MeanMS float64 `json:"mean_ms"`
	P99MS  float64 `json:"p99_ms"`
	MaxMS  float64 `json:"max_ms"`
}

// spreadOf sorts ms, which are not none.
func spreadOf(ms []float32) Spread {
	slices.Sort(ms)
	sum := 0.0
	for _, v := range ms {
		sum += float64(v)
	}
	return Spread{MeanMS: sum / float64(len(ms)), P99MS: float64(ms[len(ms)*99/100]), MaxMS: float64(ms[len(ms)-1])}
}

// Comparison of tranship with the others on the same scenario and seed.
type Comparison struct {
	// AvoidedShare is the overload host-minutes that tranship avoids against
	// reactive over those that oracle avoids.
	AvoidedShare float64 `json:"avoided_share"`
	MovesRatio   float64 `json:"moves_ratio"`
	HoursRatio   float64 `json:"host_hours_ratio"`
}

// Compare needs reports of reactive, tranship and oracle.
func Compare(reports []Report) (c Comparison, ok bool) {
	of := func(name string) *Report {
		i := slices.IndexFunc(reports, func(r Report) bool { return r.Policy == name })
		if i < 0 {
			return nil
		}
		return &reports[i]
	}
	r, t, o := of(Reactive), of(Tranship), of(Oracle)
	if r == nil || t == nil || o == nil || r.OverloadHostMinutes <= o.OverloadHostMinutes {
		return c, false
	}
	c.AvoidedShare = (r.OverloadHostMinutes - t.OverloadHostMinutes) / (r.OverloadHostMinutes - o.OverloadHostMinutes)
	if r.Moves > 0 {
		c.MovesRatio = float64(t.Moves) / float64(r.Moves)
	}
	if r.HostHours > 0 {
		c.HoursRatio = t.HostHours / r.HostHours
	}
	return c, true
}

// watts at 0, 10, … 100 % load: SPECpower_ssj2008 results of the HP ProLiant
// ML110 G4 and G5, as used by Beloglazov & Buyya 2012.
var watts = map[string][11]float64{
	"g4": {86, 89.4, 92.6, 96, 99.5, 102, 106, 108, 112, 114, 117},
	"g5": {93.7, 97, 101, 105, 110, 116, 121, 125, 129, 133, 135},
}

// power at a share of load, W.
func power(curve *[11]float64, load float64) float64 {
	x := max(0, min(1, load)) * 10
	i := min(int(x), 9)
	return curve[i] + (curve[i+1]-curve[i])*(x-float64(i))
}
