package criu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// TestMain lets the test binary be the process that is dumped: a TCP echo
// server that answers with what it was sent.
func TestMain(m *testing.M) {
	if os.Getenv("CRIU_TEST_ECHO") == "1" {
		echo()
		return
	}
	os.Exit(m.Run())
}

func echo() {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	os.Stdout.Close()
	for {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		go func() { _, _ = io.Copy(c, c) }()
	}
}

// victim is a process in a freezer cgroup of its own with one connection to it.
type victim struct {
	pid    int
	cgroup string
	conn   net.Conn
}

func startVictim(t *testing.T) *victim {
	t.Helper()
	v := &victim{cgroup: freezerCgroup(t)}
	// By its path: /proc/self/exe may be of another mount namespace.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "CRIU_TEST_ECHO=1", "GODEBUG=multipathtcp=0")
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v.pid = cmd.Process.Pid
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = v.freeze(false)
		_, _ = cmd.Process.Wait()
	})
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.cgroup, "cgroup.procs"), []byte(strconv.Itoa(v.pid)), 0); err != nil {
		t.Fatal(err)
	}
	if v.conn, err = net.Dial("tcp4", strings.TrimSpace(addr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.conn.Close() })
	v.mustEcho(t, "before")
	return v
}

func (v *victim) mustEcho(t *testing.T, text string) {
	t.Helper()
	if err := v.conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(v.conn, text); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(v.conn, buf); err != nil || string(buf) != text {
		t.Fatalf("%s: got %q, %v", text, buf, err)
	}
}

func freezerCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(root, fmt.Sprintf("tranship-criu-test-%d", os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		// Runs after the victim's cleanup: cleanups run last in, first out.
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Errorf("cgroup is left behind: %v", err)
			}
		})
		return dir
	}
	t.Fatal("no cgroup hierarchy is mounted")
	return ""
}

// freeze changes the freezer and waits until it took effect.
func (v *victim) freeze(on bool) error {
	file, value, want := "freezer.state", "THAWED", "THAWED"
	if on {
		value, want = "FROZEN", "FROZEN"
	}
	if _, err := os.Stat(filepath.Join(v.cgroup, file)); errors.Is(err, os.ErrNotExist) {
		file, value, want = "cgroup.freeze", "0", "frozen 0"
		if on {
			value, want = "1", "frozen 1"
		}
	}
	if err := os.WriteFile(filepath.Join(v.cgroup, file), []byte(value), 0); err != nil {
		return err
	}
	status := file
	if file == "cgroup.freeze" {
		status = "cgroup.events"
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		b, err := os.ReadFile(filepath.Join(v.cgroup, status))
		if err != nil {
			return err
		}
		if strings.Contains(string(b), want) {
			return nil
		}
	}
	return fmt.Errorf("%s never said %q", status, want)
}

func needCRIU(t *testing.T) string {
	t.Helper()
	testenv.NeedRoot(t)
	path, err := Find("")
	if err != nil {
		testenv.Missing(t, err.Error())
	}
	return path
}

func (v *victim) config(t *testing.T) DumpConfig {
	t.Helper()
	return DumpConfig{
		InitPID: v.pid, ImageDir: t.TempDir(), WorkDir: t.TempDir(), Root: "/", FreezeCgroup: v.cgroup,
		TCPEstablished: true, LazyPages: true, IgnoreCgroups: true, LogLevel: 4,
	}
}

// startDump is a frozen victim, and a CRIU that stands ready to dump it.
func startDump(t *testing.T) (*victim, *Dumper) {
	t.Helper()
	path := needCRIU(t)
	v := startVictim(t)
	d, err := StartDumper(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Kill)
	if err := v.freeze(true); err != nil {
		t.Fatal(err)
	}
	return v, d
}

func TestAfterADumpTheTasksStayFrozenWithoutCRIU(t *testing.T) {
	v, d := startDump(t)
	cfg := v.config(t)
	if err := d.Dump(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := v.freeze(true); err != nil {
		t.Fatal(err)
	}
	d.Kill()

	// Nobody but the freezer holds the process now, and it holds it.
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(status), "TracerPid:\t0\n") {
		t.Fatalf("still traced:\n%s", status)
	}
	if _, err := io.WriteString(v.conn, "while frozen"); err != nil {
		t.Fatal(err)
	}
	if err := v.conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := v.conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a frozen process answered %d bytes, %v", n, err)
	}
	for _, name := range []string{"inventory.img", fmt.Sprintf("pagemap-%d.img", v.pid)} {
		if _, err := os.Stat(filepath.Join(cfg.ImageDir, name)); err != nil {
			t.Error(err)
		}
	}

	// Roll back: the connection goes on, with the bytes that came meanwhile.
	n, err := ReleaseSockets([]int{v.pid})
	if err != nil || n != 1 {
		t.Fatalf("released %d sockets, want the connection alone; %v", n, err)
	}
	if err := v.freeze(false); err != nil {
		t.Fatal(err)
	}
	if err := v.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, len("while frozen"))
	if _, err := io.ReadFull(v.conn, buf); err != nil || string(buf) != "while frozen" {
		t.Fatalf("after the rollback: %q, %v", buf, err)
	}
	v.mustEcho(t, "after")
}

// Until the cgroup is frozen again nobody but CRIU holds the tasks.
func TestTheDeathOfCRIUAfterADumpIsNoticed(t *testing.T) {
	v, d := startDump(t)
	if err := d.Dump(t.Context(), v.config(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.Lives(); err != nil {
		t.Fatalf("while it waits: %v", err)
	}
	if err := unix.Kill(d.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// The process runs again, if only until it is frozen.
	for deadline := time.Now().Add(20 * time.Second); ; {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(status), "TracerPid:\t0\n") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it is held by a CRIU that is dead:\n%s", status)
		}
	}
	if err := d.Lives(); err == nil {
		t.Error("before it is reaped, it counts as alive")
	}
	d.Kill() // reaps it
	if err := d.Lives(); err == nil {
		t.Error("once it was reaped, it counts as alive")
	}
	if _, err := ReleaseSockets([]int{v.pid}); err != nil {
		t.Fatal(err)
	}
	v.mustEcho(t, "after")
}

func TestARefusedDumpLeavesTheProcessAsItWas(t *testing.T) {
	v, d := startDump(t)
	cfg := v.config(t)
	cfg.TCPEstablished = false // CRIU refuses established connections
	err := d.Dump(t.Context(), cfg)
	var logged *LogError
	if !errors.As(err, &logged) || !strings.Contains(logged.Tail, "tcp") {
		t.Fatalf("want an error with CRIU's reason, got: %v", err)
	}
	d.Kill()
	if err := v.freeze(false); err != nil {
		t.Fatal(err)
	}
	v.mustEcho(t, "after")
}

func TestADumpObeysItsContext(t *testing.T) {
	v, d := startDump(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator said so")
	cancel(why)
	if err := d.Dump(ctx, v.config(t)); !errors.Is(err, why) {
		t.Fatalf("got %v", err)
	}
	d.Kill()
	if _, err := ReleaseSockets([]int{v.pid}); err != nil {
		t.Fatal(err)
	}
	if err := v.freeze(false); err != nil {
		t.Fatal(err)
	}
	v.mustEcho(t, "after")
}
