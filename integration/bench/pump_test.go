package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tranship/tranship/transfer"
)

// The test's own binary is the receiver, as the benchmark's is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == receiveVerb {
		os.Exit(receiveMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func TestEveryWayCarriesEveryByte(t *testing.T) {
	dir := t.TempDir()
	if err := issue(dir); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 2<<20/16+256) // no whole number of chunks, but of pages
	for _, way := range []string{wayTLS, wayQUIC, wayRoad, wayRaw} {
		var opt transfer.Options
		if way == wayRoad {
			// On a fast link a session may find nothing worth encoding, and what s2 costs
			// depends on what else runs here. At 80 ns a byte it is always worth it.
			opt.Bandwidth = 100_000_000
		}
		t.Run(way, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], receiveVerb, dir, "127.0.0.1:0", way)
			cmd.Stderr = os.Stderr
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			line, err := lines.ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			var at listening
			if err := document(line, &at); err != nil {
				t.Fatal(err)
			}
			p, err := send(t.Context(), dir, at.Addr, way, opt, data, 20*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			if p.Bytes == 0 || p.Bytes%int64(len(data)) != 0 || p.Seconds < 0.02 {
				t.Errorf("%+v of passes of %d bytes", p, len(data))
			}
			// Only the roads say what they send: the raw one all of it, the other what is
			// left of sixteen bytes said again and again.
			if way == wayRaw && p.OnWire < p.Bytes || way == wayRoad && (p.OnWire == 0 || p.OnWire > p.Bytes/2) {
				t.Errorf("%+v on the wire", p)
			}
			in.Close()
			last, err := lines.ReadBytes('\n')
			var r received
			if err != nil || document(last, &r) != nil || r.CPUSeconds <= 0 || p.CPUSeconds <= 0 {
				t.Errorf("processor time of the receiver: %q, %v, of the sender %v", last, err, p.CPUSeconds)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("the receiver: %v", err)
			}
		})
	}
}

func TestTheHeapIsPrivateWritableMemoryOfNoFile(t *testing.T) {
	for _, test := range []struct {
		line string
		ok   bool
	}{
		{"7f0000000000-7f0000200000 rw-p 00000000 00:00 0", true},
		{"55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]", true},
		{"7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]", false},
		{"7f0000000000-7f0000200000 r--p 00000000 00:00 0", false},
		{"7f0000000000-7f0000200000 rw-s 00000000 00:01 1024                       /dev/zero (deleted)", false},
		{"55d0b0000000-55d0b0021000 rw-p 00001000 fe:00 4711                       /usr/bin/redis-server", false},
		{"", false},
	} {
		from, to, ok := anonymous(test.line)
		if ok != test.ok || ok && to-from != 0x200000 && to-from != 0x21000 {
			t.Errorf("%q: %#x-%#x %v", test.line, from, to, ok)
		}
	}
}

func TestTheHeapOfAProcessHasWhatItWrote(t *testing.T) {
	mark := bytes.Repeat([]byte("tranship's benchmark marks its own memory "), 8<<10)
	path := filepath.Join(t.TempDir(), "heap")
	if err := copyHeap(os.Getpid(), path); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Go's heap is mapped anonymously; whole pages of it are in the file.
	if !bytes.Contains(got, mark[:4096]) || len(got)%4096 != 0 {
		t.Errorf("%d bytes without the mark", len(got))
	}
}
