package profiler

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tranship/tranship/ebpf/profile"
)

const retention = 14 * 24 * time.Hour

var origin = time.Date(2025, 6, 1, 10, 0, 0, 0, time.UTC)

func openStore(t *testing.T, path string) *Store {
	t.Helper()
	s, err := OpenStore(path, retention)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// minute is a point like those of a busy shard: everything changes.
func minute(at time.Time, r *rand.Rand) profile.Point {
	p := profile.Point{Start: at, Step: profile.Minute, Covered: profile.Minute}
	for s := range profile.Signals {
		if s == profile.Instructions || s == profile.CacheMisses || s == profile.DirtyPages {
			continue
		}
		p.Mean[s] = float32(1000 * r.ExpFloat64())
		p.Peak[s] = 2 * p.Mean[s]
		p.Has = p.Has.With(s)
	}
	return p
}

func put(t *testing.T, s *Store, subject string, from time.Time, n int) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	var points []profile.Point
	for i := range n {
		points = append(points, minute(from.Add(time.Duration(i)*time.Minute), r))
	}
	if err := s.Put(map[string][]profile.Point{subject: points}); err != nil {
		t.Fatal(err)
	}
}

func TestMinutesComeBackInOrderAcrossHours(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.db")
	s := openStore(t, path)
	put(t, s, "default/a", origin.Add(50*time.Minute), 30)
	put(t, s, "default/b", origin, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, path)
	points, err := s.Minutes("default/a", origin.Add(55*time.Minute))
	if err != nil || len(points) != 25 {
		t.Fatalf("%d points, %v", len(points), err)
	}
	for i, p := range points {
		if want := origin.Add(time.Duration(55+i) * time.Minute); !p.Start.Equal(want) {
			t.Errorf("point %d is of %v", i, p.Start)
		}
	}
	if none, err := s.Minutes("default/c", origin); err != nil || none != nil {
		t.Error(none, err)
	}
}

func TestAWeekOfAShardOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.db")
	s := openStore(t, path)
	const shards = 2
	for i := range shards {
		for h := range 7 * 24 {
			put(t, s, fmt.Sprint("default/", i), origin.Add(time.Duration(h)*time.Hour), 60)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	each := st.Size() / shards
	t.Logf("%d KiB a shard and week, in the worst case that every value is noise", each>>10)
	if each > 1<<20*5/4 {
		t.Errorf("%d bytes a shard and week", each)
	}
}

func TestWhatIsTooOldOrTooMuchGoes(t *testing.T) {
	s := openStore(t, filepath.Join(t.TempDir(), "p.db"))
	put(t, s, "default/old", origin, 10)
	put(t, s, "default/both", origin, 10)
	put(t, s, "default/both", origin.Add(retention), 10)
	if err := s.Prune(origin.Add(retention + time.Hour)); err != nil {
		t.Fatal(err)
	}
	if points, _ := s.Minutes("default/old", time.Time{}); points != nil {
		t.Error("an old subject stayed")
	}
	if points, _ := s.Minutes("default/both", time.Time{}); len(points) != 10 || points[0].Start.Before(origin.Add(retention)) {
		t.Errorf("%d points", len(points))
	}
	many := map[string][]profile.Point{}
	r := rand.New(rand.NewPCG(3, 4))
	for i := range maxSubjects + 5 {
		// The first five ended an hour before the others.
		at := origin.Add(retention + 2*time.Hour)
		if i < 5 {
			at = at.Add(-time.Hour)
		}
		many[fmt.Sprintf("many/%05d", i)] = []profile.Point{minute(at, r)}
	}
	if err := s.Put(many); err != nil {
		t.Fatal(err)
	}
	if err := s.Prune(origin.Add(retention + 3*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if points, _ := s.Minutes("many/00000", time.Time{}); points != nil {
		t.Error("the subject that ended first stayed")
	}
	if points, _ := s.Minutes(fmt.Sprintf("many/%05d", maxSubjects), time.Time{}); points == nil {
		t.Error("a subject of the last hour went")
	}
}

func TestAHistoryTravels(t *testing.T) {
	source, destination := openStore(t, filepath.Join(t.TempDir(), "a.db")), openStore(t, filepath.Join(t.TempDir(), "b.db"))
	put(t, source, "default/s", origin, 100)
	put(t, destination, "default/s", origin.Add(102*time.Minute), 5) // since it arrived
	blocks, err := source.Blocks("default/s")
	if err != nil {
		t.Fatal(err)
	}
	now := origin.Add(2 * time.Hour)
	if have, err := destination.Imported("m1"); have || err != nil {
		t.Error(have, err)
	}
	for range 2 { // twice is once
		if err := destination.Import("default/s", "m1", blocks, now); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := destination.Imported("m1"); !have || err != nil {
		t.Error(have, err)
	}
	points, err := destination.Minutes("default/s", time.Time{})
	if err != nil || len(points) != 105 {
		t.Fatalf("%d points, %v", len(points), err)
	}
	if !points[100].Start.Equal(origin.Add(102 * time.Minute)) {
		t.Errorf("what was not measured is filled: %v", points[100].Start)
	}
	if err := destination.Import("default/s", "m2", [][]byte{[]byte("garbage")}, now); err == nil {
		t.Error("garbage was imported")
	}
	if have, _ := destination.Imported("m2"); have {
		t.Error("a history that was refused counts as come")
	}
	future := &profile.Block{Hour: origin.Add(50 * time.Hour)}
	if err := destination.Import("default/s", "m3", [][]byte{future.Append(nil)}, now); err != nil {
		t.Error(err)
	}
	if err := destination.Import("default/s", "m4", make([][]byte, maxHistory+1), now); err == nil {
		t.Error("a history without end was imported")
	}
}

func TestAFileThatIsNoStoreIsPutAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.db")
	if err := os.WriteFile(path, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, path)
	put(t, s, "default/a", origin, 1)
	if _, err := os.Stat(path + ".broken"); err != nil {
		t.Error(err)
	}
}

// storeVariable makes this test binary write minutes until it is killed.
const storeVariable = "TRANSHIP_TEST_STORE"

func TestMain(m *testing.M) {
	if path := os.Getenv(storeVariable); path != "" {
		writeForEver(path)
	}
	os.Exit(m.Run())
}

func writeForEver(path string) {
	s, err := OpenStore(path, retention)
	if err != nil {
		panic(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	for i := 0; ; i++ {
		p := minute(origin.Add(time.Duration(i)*time.Minute), r)
		if err := s.Put(map[string][]profile.Point{"default/a": {p}, "default/b": {p}}); err != nil {
			panic(err)
		}
		fmt.Println(i)
	}
}

func TestAKillLosesNoMinuteThatHadEnded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.db")
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), storeVariable+"="+path)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		last := -1
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if last, err = strconv.Atoi(strings.TrimSpace(lines.Text())); err != nil {
				t.Fatal(err)
			}
			if last == 7+round*3 {
				_ = cmd.Process.Kill() // and goes on reading what it had said
			}
		}
		_ = cmd.Wait()
		s := openStore(t, path)
		for _, subject := range []string{"default/a", "default/b"} {
			points, err := s.Minutes(subject, time.Time{})
			if err != nil || len(points) < last+1 {
				t.Fatalf("round %d: %d of %d minutes are there, %v", round, len(points), last+1, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
