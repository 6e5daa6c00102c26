//go:build integration

package profile

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestAccountsAgree runs two shards side by side, one that computes with threads
// and children and one that serves TCP, and compares with the kernel's own
// accounts; then the daemon is killed and comes back, and they still agree.
func TestAccountsAgree(t *testing.T) {
	h := host(t, "host-1")
	start(t, h, "busy", "stress-ng", "--cpu", "2", "--cpu-load", "60", "--switch", "1", "--vm", "1", "--vm-bytes", "32m", "--timeout", "600")
	ip, pid := start(t, h, "serves", "iperf3", "-s")
	eventually(t, "both shards are profiled", func() bool {
		text := scrape(t, h)
		_, a := series(text, "tranship_shard_cpu_seconds_total", shardLabel("busy"))
		_, b := series(text, "tranship_shard_cpu_seconds_total", shardLabel("serves"))
		return a && b
	})
	traffic := theLab.Client().Command(t.Context(), "iperf3", "-c", ip, "-t", fmt.Sprint(int(observe.Seconds())), "-b", "200M")
	if err := traffic.Start(); err != nil {
		t.Fatal(err)
	}
	names := []string{"busy", "serves"}
	account := func() (text string, cpu, faults map[string]float64, wait float64) {
		text, v := besides(t, h, func() []float64 {
			return []float64{cpuOf(t, h, "busy"), cpuOf(t, h, "serves"), faultsOf(t, h, "busy"), faultsOf(t, h, "serves"), waitOf(t, h, "busy")}
		})
		return text, map[string]float64{"busy": v[0], "serves": v[1]}, map[string]float64{"busy": v[2], "serves": v[3]}, v[4]
	}
	text0, cpu0, faults0, wait0 := account()
	<-time.After(observe)
	text1, cpu1, faults1, wait1 := account()
	for _, n := range names {
		gained := func(metric string, labels ...string) float64 {
			labels = append(labels, shardLabel(n))
			return value(t, text1, metric, labels...) - value(t, text0, metric, labels...)
		}
		within(t, "CPU time of "+n, gained("tranship_shard_cpu_seconds_total"), cpu1[n]-cpu0[n], 0.01)
		if n == "busy" {
			f := gained("tranship_shard_page_faults_total", `kind="minor"`) + gained("tranship_shard_page_faults_total", `kind="major"`)
			within(t, "faults of "+n, f, faults1[n]-faults0[n], 0.01)
			within(t, "wait of "+n, gained("tranship_shard_run_queue_wait_seconds_sum"), wait1-wait0, 0.05)
		}
	}
	if err := traffic.Wait(); err != nil {
		t.Fatalf("iperf3: %v", err)
	}
	// Once nothing moves, the counts are equal, not similar.
	eventually(t, "the network's counts are the interface's", func() bool {
		text := scrape(t, h)
		rb, rp, tb, tp := deviceOf(t, h, pid)
		get := func(metric, direction string) float64 {
			return value(t, text, metric, shardLabel("serves"), fmt.Sprintf("direction=%q", direction))
		}
		return rb > 1e8 && rb == get("tranship_shard_network_bytes_total", "receive") && tb == get("tranship_shard_network_bytes_total", "transmit") &&
			rp == get("tranship_shard_network_packets_total", "receive") && tp == get("tranship_shard_network_packets_total", "transmit")
	})
	if v := value(t, scrape(t, h), "tranship_shard_network_bytes_total", shardLabel("busy"), `direction="receive"`); v > 1e6 {
		t.Errorf("the other shard received %v bytes", v)
	}

	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * time.Second) // nobody is there to read
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon is back and profiles", func() bool {
		out, err := h.Exec(t.Context(), "tranship", "top", "--local", "-o", "json")
		return err == nil && strings.Contains(string(out), `"busy"`)
	})
	text2, cpu2 := cpuBesides(t, h, "busy")
	within(t, "CPU time over a kill of the daemon",
		value(t, text2, "tranship_shard_cpu_seconds_total", shardLabel("busy"))-value(t, text1, "tranship_shard_cpu_seconds_total", shardLabel("busy")), cpu2-cpu1["busy"], 0.01)
}

// points asks a host for the minutes of a shard.
func points(t *testing.T, host, shard string) (starts []time.Time, cpu []float64) {
	t.Helper()
	h, err := theLab.Host(host)
	if err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"namespace":"default","shard":%q,"stepSeconds":60}`, shard)
	out := must(t, h, "curl", "-sf", "--unix-socket", "/run/tranship/tranship.sock", "-H", "Content-Type: application/json", "-d", body, "http://transhipd/tranship.v1.Profiles/Points")
	var doc struct {
		Points []struct {
			StartUnixMs json.Number
			Mean        map[string]float64
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	for _, p := range doc.Points {
		ms, err := p.StartUnixMs.Int64()
		if err != nil {
			t.Fatal(err)
		}
		starts, cpu = append(starts, time.UnixMilli(ms)), append(cpu, p.Mean["cpu"])
	}
	return starts, cpu
}

// samples is how many ten seconds of CPU of the shard moves its host's forecast
// rests on; 0 if it does not forecast it yet.
func samples(t *testing.T, host string) int {
	t.Helper()
	h, err := theLab.Host(host)
	if err != nil {
		t.Fatal(err)
	}
	out, err := h.Exec(t.Context(), "tranship", "forecast", "moves", "-o", "json")
	if err != nil {
		return 0
	}
	var doc struct{ Samples int }
	if err := json.Unmarshal(out, &doc); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return doc.Samples
}

// startMoves starts the shard of TestHistoryFollowsAShardThatMoves before any test:
// the minute that has to be over is spent by those that come first.
func startMoves(ctx context.Context) error {
	h, err := theLab.Host("host-1")
	if err != nil {
		return err
	}
	_, err = h.Exec(ctx, "tranship", "run", "--name", "moves", image, "stress-ng", "--cpu", "1", "--cpu-load", "20", "--timeout", "600")
	return err
}

func TestHistoryFollowsAShardThatMoves(t *testing.T) {
	h := host(t, "host-1")
	removeAtEnd(t, "moves")
	eventually(t, "a minute of it is on disk", func() bool {
		starts, _ := points(t, "host-1", "moves")
		return len(starts) > 0
	})
	before, _ := points(t, "host-1", "moves")
	learnt := 0
	eventually(t, "host-1 forecasts it", func() bool { // anew, if a test before killed the daemon
		learnt = samples(t, "host-1")
		return learnt > 0
	})
	// A measurement gives way to the migration.
	measured := make(chan error, 1)
	go func() {
		_, err := h.Exec(t.Context(), "tranship", "top", "--dirty", "moves", "--window", "10s")
		measured <- err
	}()
	begun := time.Now()
	must(t, h, "tranship", "migrate", "moves", "host-2")
	if took := time.Since(begun); took > 9*time.Second {
		t.Errorf("the migration took %v: it waited for a measurement", took)
	}
	if err := <-measured; err == nil {
		t.Error("a dirty rate was measured beside a migration")
	} else {
		t.Logf("the measurement: %v", err)
	}
	eventually(t, "host-2 knows what host-1 measured", func() bool {
		starts, cpu := points(t, "host-2", "moves")
		if len(starts) == 0 || starts[0].After(before[0]) {
			return false
		}
		for i, s := range starts {
			if s.Equal(before[0]) {
				return cpu[i] > 0
			}
		}
		return false
	})
	// So do its forecasts: more is known than can have been seen here.
	eventually(t, "host-2 goes on forecasting where host-1 stopped", func() bool {
		return samples(t, "host-2") >= learnt+int(time.Since(begun)/(10*time.Second))-2
	})
	// And they survive the daemon's death, but for the last minute.
	h2 := host(t, "host-2")
	learnt = samples(t, "host-2")
	if err := h2.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h2.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon forecasts again", func() bool { return samples(t, "host-2") > 0 })
	if n := samples(t, "host-2"); n < learnt-6 {
		t.Errorf("%d samples, %d before the daemon was killed", n, learnt)
	}
	out := must(t, host(t, "host-2"), "tranship", "top", "--dirty", "moves", "-o", "json")
	var dirty struct {
		Pages float64 `json:"pages_per_second"`
	}
	if err := json.Unmarshal([]byte(out), &dirty); err != nil || dirty.Pages <= 0 {
		t.Errorf("dirty rate %s %v", out, err)
	}
}

func TestPrometheusTakesIt(t *testing.T) {
	h := host(t, "host-1")
	start(t, h, "scraped", "stress-ng", "--cpu", "1", "--switch", "1", "--timeout", "600")
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(fresh(t, h))
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	rules, err := filepath.Abs("../../packaging/prometheus/tranship.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("promtool", "check", "rules", rules).CombinedOutput(); err != nil {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
	dir := t.TempDir()
	config := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%s]\nscrape_configs:\n- job_name: tranship\n  static_configs: [{targets: ['127.0.0.1:9464']}]\n", rules)
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	prometheus := h.Command(t.Context(), "prometheus", "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address=127.0.0.1:9099", "--enable-feature=native-histograms", "--log.level=warn")
	prometheus.Stderr = os.Stderr
	if err := prometheus.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- prometheus.Wait() }()
	defer func() {
		_ = prometheus.Process.Signal(os.Interrupt)
		<-ended
	}()
	for _, query := range []string{
		`rate(tranship_shard_cpu_seconds_total{shard="scraped"}[10s]) > 0.1`,
		`histogram_quantile(0.9, rate(tranship_shard_run_queue_wait_seconds{shard="scraped"}[10s])) > 0`,
		`tranship:host_cpu:ratio > 0`,
		`tranship:shard_cpu:rate1m{shard="scraped"} > 0`,
	} {
		eventually(t, query, func() bool {
			out, err := h.Exec(t.Context(), "curl", "-sfG", "--data-urlencode", "query="+query, "http://127.0.0.1:9099/api/v1/query")
			if err != nil {
				return false // it is starting
			}
			var doc struct {
				Data struct{ Result []json.RawMessage }
			}
			return json.Unmarshal(out, &doc) == nil && len(doc.Data.Result) == 1
		})
	}
}

// TestShardsThatComeAndGo runs short-lived containers as containerd's other
// clients do: each is seen, none is left.
func TestShardsThatComeAndGo(t *testing.T) {
	h := host(t, "host-1")
	before := value(t, fresh(t, h), "tranship_profile_shards")
	unseen := value(t, scrape(t, h), "tranship_profile_unseen_shards_total")
	const count, abreast = 40, 4
	begun := time.Now()
	var wg sync.WaitGroup
	for worker := range abreast {
		wg.Go(func() {
			for i := range count / abreast {
				name := fmt.Sprintf("brief-%d-%d", worker, i)
				if out, err := h.Exec(t.Context(), "ctr", "run", "--rm", image, name, "sh", "-c", "sleep 0.05"); err != nil {
					t.Errorf("%v %s", err, out)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d shards in %v", count, time.Since(begun))
	eventually(t, "all are gone", func() bool {
		v, _ := series(scrape(t, h), "tranship_profile_shards")
		return v == before
	})
	if v := value(t, scrape(t, h), "tranship_profile_unseen_shards_total"); v != unseen {
		t.Errorf("%v shards were not seen", v-unseen)
	}
	for worker := range abreast {
		for i := range count / abreast {
			name := fmt.Sprintf("brief-%d-%d", worker, i)
			eventually(t, name+" has left what it used", func() bool {
				_, cpu := points(t, "host-1", name)
				return len(cpu) > 0 && cpu[0] > 0
			})
		}
	}
}

// TestWithoutProgramsTheDaemonRunsOn gives the daemon types of another kernel:
// what the cgroups' files know is still there, and what is lost is said.
func TestWithoutProgramsTheDaemonRunsOn(t *testing.T) {
	h := host(t, "host-2")
	config := h.Root() + "/etc/tranship/config.toml"
	good := read(t, config)
	restart := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.KillDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := h.StartDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	defer restart(good)
	restart(good + "\n[profile]\nbtf = \"/etc/hostname\"\n")
	start(t, h, "fallback", "stress-ng", "--cpu", "1", "--cpu-load", "50", "--timeout", "600")
	eventually(t, "it is profiled", func() bool {
		_, ok := series(scrape(t, h), "tranship_shard_cpu_seconds_total", shardLabel("fallback"))
		return ok
	})
	text0, cpu0 := cpuBesides(t, h, "fallback")
	<-time.After(observe / 3)
	text1, cpu1 := cpuBesides(t, h, "fallback")
	within(t, "CPU time from files", value(t, text1, "tranship_shard_cpu_seconds_total", shardLabel("fallback"))-value(t, text0, "tranship_shard_cpu_seconds_total", shardLabel("fallback")), cpu1-cpu0, 0.01)
	if _, ok := series(text1, "tranship_shard_run_queue_wait_seconds_sum", shardLabel("fallback")); ok {
		t.Error("a wait that nobody measures is shown")
	}
	if v, ok := series(text1, "tranship_profile_source_info", `signal="wait"`, `source="absent"`); !ok || math.Abs(v-1) > 0 {
		t.Error("the metric does not say that the wait is absent")
	}
}
