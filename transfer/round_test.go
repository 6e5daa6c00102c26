package transfer

import (
	"testing"
)

func TestMemoryArrivesAsItWas(t *testing.T) {
	tests := []struct {
		name string
		opt  Options
		run  int
	}{
		{"over one stream", Options{Streams: 1}, 64},
		{"over four streams", Options{Streams: 4}, 64},
		{"over three connections", Options{Streams: 6, Connections: 3}, 64},
		{"page by page", Options{}, 1},
		{"in runs that cross everything", Options{}, 777},
		{"uncompressed", Options{Compression: CompressOff}, 100},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept, plain: true})
			s := h.dial(t, test.opt)
			const pages = 500
			m := newMemory(1, 3, pages)
			first := m.round(t, s, 0, 0, pages, test.run)
			sink.equal(t, m)
			if first.Pages != 3*pages || first.Unchanged != 0 || first.Zeros == 0 || first.Sent+first.Zeros != first.Pages || first.BytesRaw != first.Pages.Bytes() || first.BytesSent == 0 {
				t.Errorf("round 0: %+v", first)
			}
			for n := 1; n <= 3; n++ {
				for pid := range m.procs {
					m.write(pid, 100*n, 100)
				}
				stats := m.round(t, s, n, 0, pages, test.run)
				sink.equal(t, m)
				if stats.Pages != 3*pages || stats.Unchanged < 3*(pages-100) || stats.Sent+stats.Zeros+stats.Unchanged != stats.Pages {
					t.Errorf("round %d: %+v", n, stats)
				}
			}
			if stats := s.Stats(); stats.Rounds != 4 || stats.Remembered != 3*pages || stats.RTT <= 0 || stats.BytesWire < stats.BytesSent {
				t.Errorf("session: %+v", stats)
			}
		})
	}
}
