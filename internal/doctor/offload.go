package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// offload tries whether the kernel takes and gives UDP in large pieces
// (udp(7): UDP_SEGMENT since Linux 4.18, UDP_GRO since 5.0). quic-go sends a third
// as fast without the first, and reads a third slower without the second.
func (m Machine) offload(context.Context) Finding {
	const name = "UDP offload"
	out, in, err := tryOffload()
	switch {
	case err != nil:
		return Finding{Name: name, Level: Warn, Found: err.Error(), Do: "bring the loopback device up"}
	case out != nil:
		return Finding{Name: name, Level: Warn, Found: "no segmentation (GSO): " + out.Error(), Do: "memory moves a third as fast without it: boot a kernel that has it (a sandbox's network may not)"}
	case in != nil:
		return Finding{Name: name, Level: Warn, Found: "segmentation (GSO), no joining (GRO): " + in.Error(), Do: "memory arrives a third slower without it: boot a kernel that has it"}
	}
	return Finding{Name: name, Level: OK, Found: "segmentation (GSO) and joining (GRO)"}
}

// tryOffload sends two packets in one piece over loopback. out and in say why
// the kernel cannot send and receive so.
func tryOffload() (out, in, err error) {
	to, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, nil, err
	}
	defer to.Close()
	from, err := net.DialUDP("udp4", nil, to.LocalAddr().(*net.UDPAddr))
	if err != nil {
		return nil, nil, err
	}
	defer from.Close()
	const segment = 1000
	if in, err = setUDP(to, unix.UDP_GRO, 1); err != nil {
		return nil, nil, err
	}
	if out, err = setUDP(from, unix.UDP_SEGMENT, segment); out != nil || err != nil {
		return out, in, err
	}
	sent := bytes.Repeat([]byte("tranship"), segment/4) // two segments
	if _, out = from.Write(sent); out != nil {
		return out, in, nil
	}
	if err := to.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, nil, err
	}
	var got []byte
	for buf := make([]byte, 4*segment); len(got) < len(sent); {
		n, err := to.Read(buf)
		if err != nil {
			return fmt.Errorf("%d of %d bytes arrived: %w", len(got), len(sent), err), in, nil
		}
		got = append(got, buf[:n]...)
	}
	if !bytes.Equal(got, sent) {
		return errors.New("what arrived is not what was sent"), in, nil
	}
	return nil, in, nil
}

// setUDP sets a socket option; refused is the kernel's answer.
func setUDP(conn *net.UDPConn, option, value int) (refused, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	err = raw.Control(func(fd uintptr) { refused = unix.SetsockoptInt(int(fd), unix.SOL_UDP, option, value) })
	return refused, err
}
