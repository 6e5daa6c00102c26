package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	tcpStreamMagic magic = 0x51465506

	inetType      = 4  // fd_types of images/fdinfo.proto
	fileEntryInet = 4  // images/fdinfo.proto
	unsentLength  = 12 // images/tcp-stream.proto
)

// LoopbackStreams lists, from a files.img, the TCP sockets whose other end has
// an address of the same namespace: 127.0.0.0/8, ::1, or their own. The numbers
// name their images: tcp-stream-<number in hex>.img, where they have a
// connection.
func LoopbackStreams(r io.Reader) ([]uint32, error) {
	img, err := openImage(bufio.NewReader(r), filesMagic)
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	var found []uint32
	err = img.each(func(raw []byte) error {
		var kind uint64
		var inet []byte
		err := fields(raw, func(f field) error {
			switch f.num {
			case 1:
				kind = f.value
			case fileEntryInet:
				inet = f.bytes
			}
			return nil
		}, 1, 2)
		if err != nil || kind != inetType || inet == nil {
			return err
		}
		var m sk_inet.InetSkEntry
		if err := unmarshal(inet, &m); err != nil {
			return err
		}
		if m.GetProto() == unix.IPPROTO_TCP && loopback(m.GetSrcAddr(), m.GetDstAddr()) {
			found = append(found, m.GetIno())
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	return found, nil
}

// loopback judges addresses as CRIU keeps them: words as they are in memory.
func loopback(src, dst []uint32) bool {
	var b []byte
	for _, word := range dst {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	switch {
	case slices.Max(append(dst, 0)) == 0:
		return false // a listener
	case slices.Equal(src, dst):
		return true
	case len(b) == 4:
		return b[0] == 127
	case len(b) != 16:
		return false
	case slices.Equal(b[:12], []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff}): // IPv4 within IPv6
		return b[12] == 127
	}
	return slices.Equal(b, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
}

// MarkSent copies a tcp-stream image from r to w and declares everything in the
// send queue as sent. It returns whether that changed anything.
//
// CRIU restores what was not sent yet with the socket out of repair mode for a
// moment (soccr/soccr.c, libsoccr_restore_queue). The kernel sends then, and if
// the other end is in the same namespace and not restored yet, the answer is a
// reset, and the restore fails with a broken pipe. CRIU counts on a firewall
// between the two, which a network namespace of somebody else's does not get.
// What counts as sent is restored in repair mode, and sent again when it is not
// acknowledged.
func MarkSent(w io.Writer, r io.Reader) (bool, error) {
	in := bufio.NewReader(r)
	img, err := openImage(in, tcpStreamMagic)
	if err != nil {
		return false, fmt.Errorf("TCP stream: %w", err)
	}
	raw, err := img.next()
	if err != nil {
		return false, fmt.Errorf("TCP stream: %w", ended(err, "its only entry"))
	}
	unsent := uint64(0)
	err = fields(raw, func(f field) error {
		if f.num == unsentLength {
			unsent = f.value
		}
		return nil
	}, 1, 2, 3, 4)
	if err != nil {
		return false, fmt.Errorf("TCP stream: %w", err)
	}
	if unsent > 0 {
		if raw, err = replace(raw, map[protowire.Number]uint64{unsentLength: 0}); err != nil {
			return false, fmt.Errorf("TCP stream: %w", err)
		}
	}
	out, err := newImage(w, tcpStreamMagic)
	if err == nil {
		err = out.entry(raw)
	}
	if err == nil {
		_, err = io.Copy(w, in) // the queues themselves
	}
	if err != nil {
		return false, fmt.Errorf("write TCP stream: %w", err)
	}
	return unsent > 0, nil
}
