package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// socket is one in a files.img.
type socket struct {
	ino, protocol, state uint32
	src, dst             string // with ports
}

// loop is an end of a connection within the shard.
func loop(ino uint32, src, dst string) socket {
	return socket{ino: ino, protocol: 6, state: tcpEstablished, src: src, dst: dst}
}

// words are an address as CRIU keeps it.
func words(addr netip.Addr) []uint32 {
	var w []uint32
	for raw := addr.AsSlice(); len(raw) > 0; raw = raw[4:] {
		w = append(w, binary.LittleEndian.Uint32(raw))
	}
	return w
}

// socketImage is a files.img with sockets.
func socketImage(t testing.TB, sockets ...socket) []byte {
	t.Helper()
	entries := [][]byte{fieldsOf(1, 9, 2, 3)}
	for _, s := range sockets {
		src, dst := netip.MustParseAddrPort(s.src), netip.MustParseAddrPort(s.dst)
		m := &sk_inet.InetSkEntry{
			Id: proto.Uint32(7), Ino: &s.ino, Proto: &s.protocol, State: &s.state,
			SrcAddr: words(src.Addr()), DstAddr: words(dst.Addr()),
			SrcPort: proto.Uint32(uint32(src.Port())), DstPort: proto.Uint32(uint32(dst.Port())),
		}
		raw, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		// What nobody reads here must be there all the same.
		raw = append(raw, fieldsOf(3, 2, 4, 1, 9, 2, 10, 0)...)
		for _, num := range []protowire.Number{13, 14} {
			raw = protowire.AppendBytes(protowire.AppendTag(raw, num, protowire.BytesType), requiredOf(num))
		}
		entry := fieldsOf(1, inetType, 2, 7)
		entries = append(entries, protowire.AppendBytes(protowire.AppendTag(entry, fileEntryInet, protowire.BytesType), raw))
	}
	return image(filesMagic, entries...)
}

// requiredOf are the required numbers of fown_entry and sk_opts_entry.
func requiredOf(num protowire.Number) []byte {
	if num == 13 {
		return fieldsOf(1, 0, 2, 0, 3, 0, 4, 0, 5, 0)
	}
	return fieldsOf(1, 1, 2, 1, 3, 0, 4, 0, 5, 0, 6, 0)
}

// stream is a tcp-stream image: the queues, where they end, how much of out was
// not sent yet, and the windows.
type stream struct {
	in, out              string
	inEnd, outEnd        uint32
	unsent               uint32
	sendWnd, recvWnd, at uint32
}

func (s stream) image() []byte {
	entry := fieldsOf(1, uint64(len(s.in)), 2, uint64(s.inEnd), 3, uint64(len(s.out)), 4, uint64(s.outEnd), 5, 0, 6, 7, 7, 1460,
		12, uint64(s.unsent), 13, 9, 14, uint64(s.sendWnd), 15, 70000, 16, uint64(s.recvWnd), 17, uint64(s.at), 40, 12345)
	return append(append(image(tcpStreamMagic, entry), s.in...), s.out...)
}

// streamsIn writes a directory of images; those of streams are named by their inodes.
func streamsIn(t testing.TB, files []byte, streams map[string]stream) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "files.img"), files, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, s := range streams {
		if err := os.WriteFile(filepath.Join(dir, "tcp-stream-"+name+".img"), s.image(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestWhatIsOnItsWayWithinTheShardArrives(t *testing.T) {
	const a, b = "127.0.0.1:4000", "127.0.0.1:80"
	pair := []socket{loop(0xa, a, b), loop(0xb, b, a)}
	closing := []socket{pair[0], pair[1]}
	closing[0].state = 4 // FIN_WAIT1
	for _, c := range []struct {
		name      string
		sockets   []socket
		dumped    map[string]stream
		delivered int
		want      map[string]stream
	}{
		{
			"nothing on its way", pair,
			map[string]stream{"a": {inEnd: 50, outEnd: 100}, "b": {in: "xy", inEnd: 100, outEnd: 50}},
			0,
			map[string]stream{"a": {inEnd: 50, outEnd: 100}, "b": {in: "xy", inEnd: 100, outEnd: 50}},
		},
		{
			"sent, and not sent yet", pair,
			map[string]stream{
				"a": {out: "sentnot", outEnd: 107, unsent: 3, inEnd: 50, sendWnd: 1000},
				"b": {in: "had", inEnd: 100, outEnd: 50, recvWnd: 900, at: 98},
			},
			7,
			map[string]stream{
				"a": {outEnd: 107, inEnd: 50, sendWnd: 993},
				"b": {in: "hadsentnot", inEnd: 107, outEnd: 50, recvWnd: 891, at: 107},
			},
		},
		{
			"in both directions", pair,
			map[string]stream{"a": {in: "1", out: "up", outEnd: 102, inEnd: 50}, "b": {in: "2", out: "down", inEnd: 100, outEnd: 54}},
			6,
			map[string]stream{"a": {in: "1down", outEnd: 102, inEnd: 54, at: 54}, "b": {in: "2up", inEnd: 102, outEnd: 54, at: 102}},
		},
		{
			"received and not acknowledged", pair,
			map[string]stream{"a": {out: "gotlost", outEnd: 107, inEnd: 50}, "b": {in: "got", inEnd: 103, outEnd: 50}},
			4,
			map[string]stream{"a": {outEnd: 107, inEnd: 50}, "b": {in: "gotlost", inEnd: 107, outEnd: 50, at: 107}},
		},
		{
			"all of it received and none acknowledged", pair,
			map[string]stream{"a": {out: "got", outEnd: 103, inEnd: 50}, "b": {inEnd: 103, outEnd: 50}},
			0,
			map[string]stream{"a": {outEnd: 103, inEnd: 50}, "b": {inEnd: 103, outEnd: 50, at: 103}},
		},
		{
			"where sequence numbers begin anew, beyond the window", pair,
			map[string]stream{
				"a": {out: "0123456789", outEnd: 4, unsent: 2, inEnd: 1 << 31, sendWnd: 8},
				"b": {inEnd: 1<<32 - 6, outEnd: 1 << 31, recvWnd: 8, at: 1<<32 - 6},
			},
			10,
			map[string]stream{
				"a": {outEnd: 4, inEnd: 1 << 31},
				"b": {in: "0123456789", inEnd: 4, outEnd: 1 << 31, at: 4},
			},
		},
		{
			"IPv4 within IPv6 at one end",
			[]socket{loop(0xa, a, b), loop(0xb, "[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:4000")},
			map[string]stream{"a": {out: "up", outEnd: 102, inEnd: 50}, "b": {inEnd: 100, outEnd: 50}},
			2,
			map[string]stream{"a": {outEnd: 102, inEnd: 50}, "b": {in: "up", inEnd: 102, outEnd: 50, at: 102}},
		},
		{
			"by the shard's own address",
			[]socket{loop(0xa, "10.89.0.5:4000", "10.89.0.5:80"), loop(0xb, "10.89.0.5:80", "10.89.0.5:4000")},
			map[string]stream{"a": {out: "up", outEnd: 102, inEnd: 50}, "b": {inEnd: 100, outEnd: 50}},
			2,
			map[string]stream{"a": {outEnd: 102, inEnd: 50}, "b": {in: "up", inEnd: 102, outEnd: 50, at: 102}},
		},
		{
			"by two addresses of the shard",
			[]socket{loop(0xa, "10.89.0.5:4000", "10.89.0.6:80"), loop(0xb, "10.89.0.6:80", "10.89.0.5:4000")},
			map[string]stream{"a": {out: "up", outEnd: 102, inEnd: 50}, "b": {inEnd: 100, outEnd: 50}},
			2,
			map[string]stream{"a": {outEnd: 102, inEnd: 50}, "b": {in: "up", inEnd: 102, outEnd: 50, at: 102}},
		},
		{
			"a socket connected to itself",
			[]socket{loop(0xa, "[::1]:80", "[::1]:80")},
			map[string]stream{"a": {in: "1", out: "up", outEnd: 102, inEnd: 100}},
			2,
			map[string]stream{"a": {in: "1up", outEnd: 102, inEnd: 102, at: 102}},
		},
		{
			"the other end is gone: what was not sent counts as sent", pair[:1],
			map[string]stream{"a": {out: "sentnot", outEnd: 107, unsent: 3, inEnd: 50}},
			0,
			map[string]stream{"a": {out: "sentnot", outEnd: 107, inEnd: 50}},
		},
		{
			"an end is being closed", closing,
			map[string]stream{"a": {out: "up", outEnd: 103, unsent: 1, inEnd: 50}, "b": {inEnd: 100, outEnd: 50}},
			0,
			map[string]stream{"a": {out: "up", outEnd: 103, inEnd: 50}, "b": {inEnd: 100, outEnd: 50}},
		},
		{
			"a connection to elsewhere",
			[]socket{loop(0xa, "10.89.0.5:4000", "10.89.0.6:80"), loop(0xb, "10.89.0.5:1", "10.0.0.127:80")},
			map[string]stream{"a": {out: "up", outEnd: 102, unsent: 1}, "b": {out: "up", outEnd: 102, unsent: 1}},
			0,
			map[string]stream{"a": {out: "up", outEnd: 102, unsent: 1}, "b": {out: "up", outEnd: 102, unsent: 1}},
		},
		{
			"listeners, and UDP", []socket{
				{ino: 0xa, protocol: 6, state: 10, src: "0.0.0.0:80", dst: "0.0.0.0:0"},
				{ino: 0xb, protocol: 6, state: 10, src: "[::]:80", dst: "[::]:0"},
				{ino: 0xc, protocol: 17, state: tcpEstablished, src: a, dst: b},
			}, map[string]stream{"c": {out: "up", unsent: 1}}, 0, map[string]stream{"c": {out: "up", unsent: 1}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := streamsIn(t, socketImage(t, c.sockets...), c.dumped)
			n, err := SettleLoopback(dir)
			if err != nil || n != c.delivered {
				t.Fatalf("%d bytes delivered, %v; want %d", n, err, c.delivered)
			}
			for name, want := range c.want {
				got, err := os.ReadFile(filepath.Join(dir, "tcp-stream-"+name+".img"))
				if err != nil || !bytes.Equal(got, want.image()) {
					t.Errorf("%s is %v\n%q, want\n%q", name, err, got, want.image())
				}
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1+len(c.dumped) {
				t.Errorf("%v, %v", entries, err)
			}
		})
	}
}

// An end that has let go of what the other never got, or that has got what was
// never sent: nobody can make that whole.
func TestATornConnectionIsNotRestored(t *testing.T) {
	pair := socketImage(t, loop(0xa, "127.0.0.1:4000", "127.0.0.1:80"), loop(0xb, "127.0.0.1:80", "127.0.0.1:4000"))
	for name, b := range map[string]stream{
		"acknowledged after it was dumped": {inEnd: 99, outEnd: 50},
		"sent after it was dumped":         {inEnd: 103, outEnd: 50},
	} {
		dumped := map[string]stream{"a": {out: "up", outEnd: 102, inEnd: 50}, "b": b}
		dir := streamsIn(t, pair, dumped)
		if _, err := SettleLoopback(dir); !errors.Is(err, ErrTornStream) {
			t.Errorf("%s: %v", name, err)
		}
		for n, s := range dumped {
			if got, err := os.ReadFile(filepath.Join(dir, "tcp-stream-"+n+".img")); err != nil || !bytes.Equal(got, s.image()) {
				t.Errorf("%s: %s was changed", name, n)
			}
		}
	}
}

func TestCutImagesOfConnectionsAreRefused(t *testing.T) {
	files := socketImage(t, loop(0xa, "127.0.0.1:4000", "127.0.0.1:80"))
	whole := stream{in: "abc", out: "12345", inEnd: 100, outEnd: 200, unsent: 2}.image()
	refused := func(err error) bool { return errors.Is(err, ErrTruncated) || errors.Is(err, ErrMagic) }
	for cut := range len(whole) {
		dir := streamsIn(t, files, nil)
		name := filepath.Join(dir, "tcp-stream-a.img")
		if err := os.WriteFile(name, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := SettleLoopback(dir); !refused(err) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	for cut := range len(files) {
		dir := streamsIn(t, files[:cut], map[string]stream{"a": {out: "12345", outEnd: 200, unsent: 2}})
		_, err := SettleLoopback(dir)
		got, rerr := os.ReadFile(filepath.Join(dir, "tcp-stream-a.img"))
		if err != nil && !refused(err) || rerr != nil || !bytes.Equal(got, stream{out: "12345", outEnd: 200, unsent: 2}.image()) {
			t.Errorf("files cut at %d: %v, %v", cut, err, rerr)
		}
	}
}

func FuzzFlush(f *testing.F) {
	f.Add(stream{out: "up", outEnd: 102, inEnd: 50, unsent: 1}.image(), stream{inEnd: 100, outEnd: 50}.image())
	f.Fuzz(func(t *testing.T, a, b []byte) {
		settle := func(a, b []byte) (n int, outA, outB []byte, err error) {
			ends := [2]*tcpEnd{{established: true}, {established: true}}
			for i, raw := range [][]byte{a, b} {
				if err := ends[i].read(bytes.NewReader(raw)); err != nil {
					return 0, nil, nil, err
				}
			}
			var out [2]bytes.Buffer
			for i, e := range ends {
				m, err := e.flush(ends[1-i])
				if err != nil {
					return 0, nil, nil, err
				}
				n += m
			}
			for i, e := range ends {
				if err := e.write(&out[i]); err != nil {
					t.Errorf("write: %v", err)
				}
			}
			return n, out[0].Bytes(), out[1].Bytes(), nil
		}
		_, outA, outB, err := settle(a, b)
		if err != nil {
			return
		}
		if n, againA, againB, err := settle(outA, outB); n != 0 || err != nil || !bytes.Equal(againA, outA) || !bytes.Equal(againB, outB) {
			t.Errorf("once more: %d bytes, %v", n, err)
		}
	})
}

func FuzzConnectedEnd(f *testing.F) {
	img, err := openImage(bytes.NewReader(socketImage(f, loop(0xa, "127.0.0.1:4000", "127.0.0.1:80"))), filesMagic)
	if err == nil {
		err = img.each(func(raw []byte) error { f.Add(bytes.Clone(raw)); return nil })
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := connectedEnd(b, "dir"); err == nil && e != nil && filepath.Dir(e.file) != "dir" {
			t.Error(e.file)
		}
	})
}
