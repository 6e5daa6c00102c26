package transfer

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// segmented is the control message that makes the kernel cut a write into
// packets of the given size.
func segmented(size int) []byte {
	oob := make([]byte, unix.CmsgSpace(2))
	binary.NativeEndian.PutUint64(oob, uint64(unix.CmsgLen(2)))
	binary.NativeEndian.PutUint32(oob[8:], unix.SOL_UDP)
	binary.NativeEndian.PutUint32(oob[12:], unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(oob[16:], uint16(size))
	return oob
}

func TestJoinedPacketsAreTakenApartAgain(t *testing.T) {
	tests := []struct {
		name  string
		size  int
		bytes int
	}{
		{"one packet", 1200, 1200},
		{"one small packet", 1200, 7},
		{"as many as a call takes", 100, 800},
		{"more than a call takes", 1400, 20 * 1400},
		{"with a shorter last one", 1400, 20*1400 + 9},
		{"as many as the kernel joins", 1000, 60_000},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			received, err := listenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer received.Close()
			gro, ok := received.(*groConn)
			if !ok {
				t.Skip("this kernel has no UDP_GRO (Linux 5.0 has)")
			}
			sender, err := net.DialUDP("udp4", nil, received.LocalAddr().(*net.UDPAddr))
			if err != nil {
				t.Fatal(err)
			}
			defer sender.Close()
			sent := make([]byte, test.bytes)
			fillNoise(sent, 1)
			var oob []byte
			if test.bytes > test.size {
				oob = segmented(test.size)
			}
			if _, _, err := sender.WriteMsgUDP(sent, oob, nil); err != nil {
				t.Fatal(err)
			}
			if err := gro.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			ms := make([]ipv4.Message, 8)
			var got []byte
			for len(got) < len(sent) {
				for i := range ms {
					ms[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 1452)}, OOB: make([]byte, 128)}
				}
				n, err := gro.ReadBatch(ms, 0)
				if err != nil {
					t.Fatalf("after %d of %d bytes: %v", len(got), len(sent), err)
				}
				for _, m := range ms[:n] {
					if want := min(test.size, len(sent)-len(got)); m.N != want {
						t.Fatalf("a packet of %d bytes, want %d", m.N, want)
					}
					if m.Addr.String() != sender.LocalAddr().String() {
						t.Fatalf("from %v, want %v", m.Addr, sender.LocalAddr())
					}
					got = append(got, m.Buffers[0][:m.N]...)
				}
			}
			if !bytes.Equal(got, sent) {
				t.Error("the bytes differ")
			}
		})
	}
}
