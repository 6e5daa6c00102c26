package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// words are an address as CRIU keeps it.
func words(addr string) []uint32 {
	raw := netip.MustParseAddr(addr).AsSlice()
	var w []uint32
	for ; len(raw) > 0; raw = raw[4:] {
		w = append(w, binary.LittleEndian.Uint32(raw))
	}
	return w
}

// socketImage is a files.img with one socket.
func socketImage(t testing.TB, protocol, ino uint32, src, dst string) []byte {
	t.Helper()
	m := &sk_inet.InetSkEntry{Id: proto.Uint32(7), Ino: &ino, Proto: &protocol, SrcAddr: words(src), DstAddr: words(dst)}
	raw, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	// What MarkSent does not read must be there all the same.
	raw = append(raw, fieldsOf(3, 2, 4, 1, 6, 1, 7, 80, 8, 4000, 9, 2, 10, 0)...)
	for _, num := range []protowire.Number{13, 14} {
		raw = protowire.AppendBytes(protowire.AppendTag(raw, num, protowire.BytesType), requiredOf(num))
	}
	entry := fieldsOf(1, inetType, 2, 7)
	entry = protowire.AppendBytes(protowire.AppendTag(entry, fileEntryInet, protowire.BytesType), raw)
	return image(filesMagic, fieldsOf(1, 9, 2, 3), entry)
}

// requiredOf are the required numbers of fown_entry and sk_opts_entry.
func requiredOf(num protowire.Number) []byte {
	if num == 13 {
		return fieldsOf(1, 0, 2, 0, 3, 0, 4, 0, 5, 0)
	}
	return fieldsOf(1, 1, 2, 1, 3, 0, 4, 0, 5, 0, 6, 0)
}

func TestLoopbackStreams(t *testing.T) {
	for _, c := range []struct {
		name     string
		proto    uint32
		src, dst string
		want     bool
	}{
		{"a connection to 127.0.0.1", 6, "127.0.0.1", "127.0.0.1", true},
		{"a connection within 127.0.0.0/8", 6, "127.0.0.1", "127.9.9.9", true},
		{"a connection to the shard's own address", 6, "10.89.0.5", "10.89.0.5", true},
		{"a connection to ::1", 6, "::1", "::1", true},
		{"IPv4 within IPv6", 6, "::ffff:10.0.0.1", "::ffff:127.0.0.1", true},
		{"a connection to elsewhere", 6, "10.89.0.5", "10.89.0.6", false},
		{"one with 127 elsewhere in it", 6, "10.89.0.5", "10.0.0.127", false},
		{"IPv6 to elsewhere", 6, "fd00::1", "fd00::2", false},
		{"a listener", 6, "0.0.0.0", "0.0.0.0", false},
		{"an IPv6 listener", 6, "::", "::", false},
		{"UDP", 17, "127.0.0.1", "127.0.0.1", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := LoopbackStreams(bytes.NewReader(socketImage(t, c.proto, 0xabc, c.src, c.dst)))
			if err != nil || slices.Contains(got, 0xabc) != c.want {
				t.Errorf("%x, %v", got, err)
			}
		})
	}
	in := socketImage(t, 6, 1, "127.0.0.1", "127.0.0.1")
	for cut := range len(in) {
		if got, err := LoopbackStreams(bytes.NewReader(in[:cut])); len(got) > 0 || err != nil && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrMagic) {
			t.Errorf("cut at %d: %x, %v", cut, got, err)
		}
	}
}

// streamImage is a tcp-stream image with so many unsent bytes of five.
func streamImage(unsent uint64) []byte {
	return append(image(tcpStreamMagic, fieldsOf(1, 3, 2, 100, 3, 5, 4, 200, 5, 0, 6, 7, 7, 1460, unsentLength, unsent, 13, 9)), "abc12345"...)
}

func TestMarkSentLeavesEverythingButTheLength(t *testing.T) {
	for unsent := range uint64(6) {
		var out bytes.Buffer
		changed, err := MarkSent(&out, bytes.NewReader(streamImage(unsent)))
		if err != nil || changed != (unsent > 0) {
			t.Fatalf("%d unsent: %v, %v", unsent, changed, err)
		}
		if !bytes.Equal(out.Bytes(), streamImage(0)) {
			t.Errorf("%d unsent became\n%x, want\n%x", unsent, out.Bytes(), streamImage(0))
		}
	}
}

func TestMarkSentRefusesACutImage(t *testing.T) {
	in := streamImage(2)
	for cut := range len(in) - len("abc12345") {
		if _, err := MarkSent(&bytes.Buffer{}, bytes.NewReader(in[:cut])); !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrMagic) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
}

func FuzzMarkSent(f *testing.F) {
	f.Add(streamImage(2))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		if _, err := MarkSent(&out, bytes.NewReader(b)); err != nil {
			return
		}
		if changed, err := MarkSent(&bytes.Buffer{}, bytes.NewReader(out.Bytes())); err != nil || changed {
			t.Errorf("what was written changed again: %v, %v", changed, err)
		}
	})
}

func FuzzLoopbackStreams(f *testing.F) {
	f.Add(socketImage(f, 6, 1, "127.0.0.1", "127.0.0.1"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = LoopbackStreams(bytes.NewReader(b))
	})
}
