package pgcheck

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/internal/testenv"
)

// The test binary is also the server: Serve replaces its process.
const serveEnv = "PGCHECK_TEST_SERVE" // DATA:PORT:ASROOT

func TestMain(m *testing.M) {
	if at := os.Getenv(serveEnv); at != "" {
		f := append(strings.Split(at, ":"), "", "")
		n, err := strconv.Atoi(f[1])
		if err == nil {
			err = Serve(context.Background(), ServeOptions{Data: f[0], Port: n, AsRoot: f[2], Listen: "127.0.0.1", SharedBuffers: "16MB", Stderr: os.Stderr})
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// start runs a PostgreSQL for the test and returns how to reach it and its pid.
func start(t *testing.T, asRoot string) (Options, int) {
	t.Helper()
	if _, err := findBin(""); err != nil {
		testenv.Missing(t, fmt.Sprintf("PostgreSQL: %v", err))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	// Not t.TempDir: the user postgres could not enter what belongs to root.
	dir, err := os.MkdirTemp("", "pgcheck-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s/data:%d:%s", serveEnv, dir, port, asRoot))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGINT) // fast shutdown
		<-exited
		if t.Failed() {
			t.Logf("log of the server:\n%s", log.String())
		}
	})
	o := Options{URL: fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", port), Timeout: 20 * time.Second}
	for deadline := time.Now().Add(60 * time.Second); ; {
		c, err := o.connect(t.Context())
		if err == nil {
			c.Close(t.Context())
			return o, cmd.Process.Pid
		}
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("the server ended: %v\n%s", err, log.String())
		case <-time.After(50 * time.Millisecond): // a poll
		}
		if time.Now().After(deadline) {
			t.Fatalf("no connection: %v", err)
		}
	}
}

func exec1(t *testing.T, o Options, sql string) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), o.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	if _, err := c.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func TestTransfersAndWhatIsFoundBehindThem(t *testing.T) {
	o, _ := start(t, "")
	rec := check.NewRecorder("init")
	if err := Init(t.Context(), o, 500_000, rec); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	rec = check.NewRecorder("run")
	if err := Run(ctx, o, 3, 0, rec); err != nil {
		t.Fatal(err)
	}
	rep := rec.Report(true)
	if !rep.OK || rep.Facts["committed"].(int64) < 10 || rep.Facts["verified_indexes"].(int) < 100 {
		t.Fatalf("%+v", rep)
	}

	for _, c := range []struct {
		name, damage, undo string
		want               string
	}{
		{"money out of nothing", `UPDATE accounts SET balance = balance + 1 WHERE id = 0`, `UPDATE accounts SET balance = balance - 1 WHERE id = 0`, "instead of"},
		{"a line that is lost", `UPDATE transfers SET seq = -seq WHERE id = (SELECT min(id) FROM transfers)`, `UPDATE transfers SET seq = -seq WHERE seq < 0`, "lines, the last is"},
		{
			"an index that misses a row", `
			UPDATE pg_index SET indisready = false, indislive = false WHERE indexrelid = 'transfers_src_idx'::regclass;
			INSERT INTO transfers (run, worker, seq, src, dst, amount) VALUES (1, 1, 1, 1, 2, 0);
			UPDATE pg_index SET indisready = true, indislive = true WHERE indexrelid = 'transfers_src_idx'::regclass`,
			`DELETE FROM transfers WHERE run = 1; REINDEX INDEX transfers_src_idx`, "transfers_src_idx",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			exec1(t, o, c.damage)
			rec := check.NewRecorder("verify")
			if err := Verify(t.Context(), o, rec); err != nil {
				t.Fatal(err)
			}
			rep := rec.Report(true)
			if rep.OK || !strings.Contains(strings.Join(rep.Errors, "\n"), c.want) {
				t.Errorf("errors %q, want %q", rep.Errors, c.want)
			}
			exec1(t, o, c.undo)
			rec = check.NewRecorder("verify")
			if err := Verify(t.Context(), o, rec); err != nil || rec.Failed() {
				t.Errorf("after the repair: %v, %+v", err, rec.Report(true))
			}
		})
	}
}

func TestWithTheLibraryPostgreSQLStaysRoot(t *testing.T) {
	testenv.NeedRoot(t)
	if _, err := exec.LookPath("cc"); err != nil {
		testenv.Missing(t, "a C compiler")
	}
	library := filepath.Join(t.TempDir(), "asroot.so")
	if err := BuildAsRoot(t.Context(), library); err != nil {
		t.Fatal(err)
	}
	o, pid := start(t, library)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
		t.Errorf("it is not root:\n%s", status)
	}
	rec := check.NewRecorder("init")
	if err := Init(t.Context(), o, 100_000, rec); err != nil || rec.Failed() {
		t.Errorf("%v, %+v", err, rec.Report(true))
	}
}

func TestAServerThatGoesAwayIsAnError(t *testing.T) {
	o, _ := start(t, "")
	if err := Init(t.Context(), o, 100_000, check.NewRecorder("init")); err != nil {
		t.Fatal(err)
	}
	rec := check.NewRecorder("run")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o, 2, 0, rec) }()
	for rec.Report(false).Requests < 5 && ctx.Err() == nil {
		<-time.After(5 * time.Millisecond)
	}
	exec1(t, o, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'`)
	if err := <-done; err == nil || ctx.Err() != nil {
		t.Errorf("terminated connections: %v", err)
	}
}
