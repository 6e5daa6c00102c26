package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestAMessageSurvivesTheSocket(t *testing.T) {
	want := request{Op: opExec, Args: []string{"sh", "-c", "echo ünïcode \x00"}, Env: []string{"A=b"}, Dir: "/tmp"}
	var buf bytes.Buffer
	if err := writeMessage(&buf, want); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(buf.Bytes())
	var got request
	if err := readMessage(&buf, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, %v", got, err)
	}
	for cut := range whole {
		if err := readMessage(bytes.NewReader(whole[:cut]), &got); err == nil {
			t.Errorf("a message cut at byte %d of %d was taken for whole", cut, len(whole))
		}
	}
}

func TestAMessageThatClaimsTooMuchIsRefused(t *testing.T) {
	head := binary.BigEndian.AppendUint32(nil, maxMessage+1)
	if err := readMessage(bytes.NewReader(head), &request{}); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("got %v, want a refusal before reading", err)
	}
	if _, err := encodeMessage(request{Dir: strings.Repeat("x", maxMessage)}); err == nil {
		t.Error("a message was written that nobody would read")
	}
}

func FuzzReadMessage(f *testing.F) {
	raw, _ := encodeMessage(request{Op: opStatus})
	f.Add(raw)
	f.Add([]byte{0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		var got request
		if err := readMessage(bytes.NewReader(raw), &got); err != nil {
			return
		}
		again, err := encodeMessage(got)
		if err != nil {
			t.Fatal(err)
		}
		var back request
		if err := readMessage(bytes.NewReader(again), &back); err != nil || !reflect.DeepEqual(back, got) {
			t.Fatalf("%+v became %+v, %v", got, back, err)
		}
	})
}

func TestDescriptorsTravelWithTheirMessage(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	sent := make(chan error, 1)
	go func() {
		conn, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			sent <- err
			return
		}
		defer conn.Close()
		sent <- writeWithFiles(conn.(*net.UnixConn), request{Op: opExec, Args: make([]string, 10000)}, int(in.Fd()))
		in.Close()
	}()
	conn, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var req request
	fds, err := readWithFiles(conn, &req)
	if err != nil || len(fds) != 1 || req.Op != opExec || len(req.Args) != 10000 {
		t.Fatalf("got %d descriptors, %d arguments, %v", len(fds), len(req.Args), err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	w := os.NewFile(uintptr(fds[0]), "pipe")
	if _, err := w.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got, err := io.ReadAll(out); err != nil || string(got) != "through" {
		t.Errorf("the other end read %q, %v", got, err)
	}
}

func TestLookPathUsesTheGivenPathOnly(t *testing.T) {
	dir := t.TempDir()
	tool := filepath.Join(dir, "bin", "tool")
	if err := os.MkdirAll(filepath.Dir(tool), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tool, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin", "data"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, arg, dir, path, want string
	}{
		{"on the path", "tool", "/", "/nowhere:" + dir + "/bin", tool},
		{"not on the path", "tool", "/", "/nowhere", ""},
		{"not executable", "data", "/", dir + "/bin", ""},
		{"relative to the directory", "bin/tool", dir, "", tool},
		{"absolute", tool, "/", "", tool},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := lookPath(tt.arg, tt.dir, []string{"PATH=" + tt.path})
			if got != tt.want || (err != nil) != (tt.want == "") {
				t.Errorf("got %q, %v", got, err)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v is not a missing file", err)
			}
		})
	}
}

func TestPollGivesTheReasonWhenItsTimeIsOver(t *testing.T) {
	over, reason := errors.New("over"), errors.New("still busy")
	ctx, cancel := context.WithCancelCause(t.Context())
	asked := 0
	err := poll(ctx, func() (bool, error) {
		if asked++; asked == 2 {
			cancel(over)
		}
		return false, reason
	})
	if !errors.Is(err, over) || !errors.Is(err, reason) {
		t.Errorf("got %v", err)
	}
}
