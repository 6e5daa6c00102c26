package image

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// ErrTornStream means that the two ends of a connection within the shard do not
// fit together: one of them has let go of bytes that the other does not have.
// Restored like that, the connection would wait for them for ever.
var ErrTornStream = errors.New("the ends of a connection within the shard were not dumped at one moment")

const (
	tcpStreamMagic magic = 0x51465506

	inetType       = 4 // fd_types of images/fdinfo.proto
	fileEntryInet  = 4 // images/fdinfo.proto
	tcpEstablished = 1 // include/net/tcp_states.h
)

// Fields of a tcp_stream_entry, images/tcp-stream.proto. Sequence numbers are
// those of the queues' ends: rcv_nxt and write_seq of the kernel.
const (
	streamInLength      protowire.Number = 1
	streamInEnd         protowire.Number = 2
	streamOutLength     protowire.Number = 3
	streamOutEnd        protowire.Number = 4
	streamUnsent        protowire.Number = 12
	streamSendWindow    protowire.Number = 14
	streamReceiveWindow protowire.Number = 16
	streamWindowAt      protowire.Number = 17
)

// SettleLoopback changes a dump so that of connections whose two ends are in it
// nothing is on its way: what one end had sent, or was still to send, lies in
// the other's receive queue. It returns how many bytes it delivered.
//
// Left to itself, CRIU restores what was sent in repair mode, where the kernel
// has no measure of the round trip and waits up to three seconds before it
// sends again. What was not sent yet it restores with the socket out of repair
// mode for a moment (soccr/soccr.c, libsoccr_restore_queue), and if the other
// end is not restored yet, the answer is a reset and the restore fails. CRIU
// counts on a firewall between the two, which a network namespace of somebody
// else's does not get. A receive queue takes any amount: CRIU restores it
// before the limits of the socket (criu/sockets.c, restore_prepare_socket).
//
// Where an end is missing, or one is being closed, everything in the send queue
// is declared as sent.
func SettleLoopback(dir string) (int, error) {
	ends, err := loopbackEnds(dir)
	if err != nil {
		return 0, err
	}
	delivered := 0
	for _, e := range ends {
		n, err := e.flush(ends[e.peer()])
		if err != nil {
			return 0, err
		}
		delivered += n
	}
	for _, e := range ends {
		if !e.changed {
			continue
		}
		if err := replaceFile(e.file, e.write); err != nil {
			return 0, fmt.Errorf("TCP stream %s: %w", e.file, err)
		}
	}
	return delivered, nil
}

// between names an end of a connection, in one network namespace.
type between struct {
	ns       uint32
	src, dst netip.AddrPort
}

// tcpEnd is one end of a connection, from files.img and its tcp-stream image.
type tcpEnd struct {
	between
	established bool
	file        string
	changed     bool

	raw     []byte // the entry
	values  map[protowire.Number]uint64
	in, out []byte
}

func (e *tcpEnd) peer() between { return between{e.ns, e.dst, e.src} }

func (e *tcpEnd) seq(num protowire.Number) uint32 { return uint32(e.values[num]) }

func (e *tcpEnd) set(num protowire.Number, v uint32) {
	if _, ok := e.values[num]; ok {
		e.values[num] = uint64(v)
	}
}

// flush empties the send queue into the peer's receive queue, and returns how
// much of it the peer did not have.
func (e *tcpEnd) flush(peer *tcpEnd) (int, error) {
	if peer == nil || !e.established || !peer.established {
		e.changed = e.changed || e.values[streamUnsent] > 0
		e.set(streamUnsent, 0)
		return 0, nil
	}
	end := e.seq(streamOutEnd)
	missing := end - peer.seq(streamInEnd)
	if uint64(missing) > uint64(len(e.out)) {
		return 0, fmt.Errorf("%s to %s: %w: %d bytes are missing, %d were kept", e.src, e.dst, ErrTornStream, missing, len(e.out))
	}
	if len(e.out) == 0 {
		return 0, nil
	}
	peer.in = append(peer.in, e.out[len(e.out)-int(missing):]...)
	peer.values[streamInLength] = uint64(len(peer.in))
	peer.values[streamInEnd] = uint64(end)
	// The windows' edges stay where they were; what lies beyond them is taken.
	peer.set(streamReceiveWindow, left(peer.seq(streamWindowAt)+peer.seq(streamReceiveWindow), end))
	peer.set(streamWindowAt, end)
	e.set(streamSendWindow, left(end-uint32(len(e.out))+e.seq(streamSendWindow), end))
	e.out = nil
	e.values[streamOutLength] = 0
	e.set(streamUnsent, 0)
	e.changed, peer.changed = true, true
	return int(missing), nil
}

// left is how far edge lies behind at, in sequence numbers; 0 if it does not.
func left(edge, at uint32) uint32 { return uint32(max(0, int32(edge-at))) }

// loopbackEnds reads the TCP connections whose other end is, or was, in the same
// namespace: it is in the dump as well, or it has an address of 127.0.0.0/8, ::1,
// or their own.
func loopbackEnds(dir string) (map[between]*tcpEnd, error) {
	file, err := os.Open(filepath.Join(dir, "files.img"))
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	defer file.Close()
	img, err := openImage(bufio.NewReader(file), filesMagic)
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	ends := map[between]*tcpEnd{}
	err = img.each(func(raw []byte) error {
		e, err := connectedEnd(raw, dir)
		if e != nil {
			ends[e.between] = e
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	for name, e := range ends {
		if ends[e.peer()] == nil && !e.dst.Addr().IsLoopback() && e.dst.Addr() != e.src.Addr() {
			delete(ends, name)
		}
	}
	for name, e := range ends {
		// A connection that was never made, or is over, has no image.
		if err := e.load(); errors.Is(err, os.ErrNotExist) {
			delete(ends, name)
		} else if err != nil {
			return nil, fmt.Errorf("TCP stream %s: %w", e.file, err)
		}
	}
	return ends, nil
}

// connectedEnd reads an entry of files.img, and returns nil for most.
func connectedEnd(raw []byte, dir string) (*tcpEnd, error) {
	inet, err := fileOf(raw, inetType, fileEntryInet)
	if inet == nil || err != nil {
		return nil, err
	}
	var m sk_inet.InetSkEntry
	if err := unmarshal(inet, &m); err != nil {
		return nil, err
	}
	src, dst := address(m.GetSrcAddr()), address(m.GetDstAddr())
	if m.GetProto() != unix.IPPROTO_TCP || !dst.IsValid() || dst.IsUnspecified() {
		return nil, nil
	}
	return &tcpEnd{
		between:     between{m.GetNsId(), netip.AddrPortFrom(src, uint16(m.GetSrcPort())), netip.AddrPortFrom(dst, uint16(m.GetDstPort()))},
		established: m.GetState() == tcpEstablished,
		file:        filepath.Join(dir, fmt.Sprintf("tcp-stream-%x.img", m.GetIno())),
	}, nil
}

// address reads addresses as CRIU keeps them: words as they are in memory. One
// end may be an IPv6 socket and say IPv4 within IPv6.
func address(words []uint32) netip.Addr {
	var b []byte
	for _, word := range words {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	a, _ := netip.AddrFromSlice(b)
	return a.Unmap()
}

func (e *tcpEnd) load() error {
	file, err := os.Open(e.file)
	if err != nil {
		return err
	}
	defer file.Close()
	return e.read(file)
}

// read takes a tcp-stream image: an entry, then the receive queue, then the
// send queue.
func (e *tcpEnd) read(r io.Reader) error {
	in := bufio.NewReader(r)
	img, err := openImage(in, tcpStreamMagic)
	if err != nil {
		return err
	}
	raw, err := img.next()
	if err != nil {
		return ended(err, "its only entry")
	}
	e.raw, e.values = append([]byte(nil), raw...), map[protowire.Number]uint64{}
	err = fields(raw, func(f field) error {
		switch f.num {
		case streamInLength, streamInEnd, streamOutLength, streamOutEnd, streamUnsent,
			streamSendWindow, streamReceiveWindow, streamWindowAt:
			e.values[f.num] = f.value
		}
		return nil
	}, streamInLength, streamInEnd, streamOutLength, streamOutEnd)
	if err != nil {
		return err
	}
	for _, q := range []struct {
		into   *[]byte
		length protowire.Number
	}{{&e.in, streamInLength}, {&e.out, streamOutLength}} {
		size := e.values[q.length]
		if size > maxQueue {
			return fmt.Errorf("%w: queue of %d bytes", ErrTooLarge, size)
		}
		if *q.into, err = io.ReadAll(io.LimitReader(in, int64(size))); err != nil {
			return err
		}
		if uint64(len(*q.into)) < size {
			return ended(io.ErrUnexpectedEOF, "a queue")
		}
	}
	return nil
}

// maxQueue is the kernel's own bound: the length of a queue is an int.
const maxQueue = 1<<31 - 1

func (e *tcpEnd) write(w io.Writer) error {
	raw, err := replace(e.raw, e.values)
	if err != nil {
		return err
	}
	out, err := newImage(w, tcpStreamMagic)
	if err != nil {
		return err
	}
	for _, put := range []func() error{
		func() error { return out.entry(raw) },
		func() error { _, err := w.Write(e.in); return err },
		func() error { _, err := w.Write(e.out); return err },
	} {
		if err := put(); err != nil {
			return err
		}
	}
	return nil
}
