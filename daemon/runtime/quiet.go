package runtime

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	loopbackIndex = 1 // LOOPBACK_IFINDEX of include/linux/netdevice.h
	// quietHandle marks a queue as tranship's ("tr"), so that nobody else's is
	// taken away.
	quietHandle = 0x7472_0000
)

// QuietLoopback has loopback drop everything in the network namespace of a
// process, by a queue that has no room. The kernel goes on sending for processes
// that are frozen, paced or because a window opens, and what passes between two
// sockets after one of them was dumped would be lost to both. Whoever sends
// keeps what does not fit, as with any full queue. May run twice.
//
// A kernel without packet scheduler, and a loopback with a queue of somebody's,
// are left alone: image.SettleLoopback notices if that did harm.
func QuietLoopback(pid uint32) error {
	err := changeQueue(pid, unix.RTM_NEWQDISC, unix.NLM_F_CREATE,
		nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("pfifo")),
		nl.NewRtAttr(nl.TCA_OPTIONS, make([]byte, 4))) // struct tc_fifo_qopt: limit 0
	if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("quiet loopback of process %d: %w", pid, err)
	}
	return nil
}

// FreeLoopback undoes QuietLoopback. May run twice, and without it.
func FreeLoopback(pid uint32) error {
	err := changeQueue(pid, unix.RTM_DELQDISC, 0)
	for _, fine := range []error{
		unix.ENOENT, unix.EINVAL, // no such queue, or another one
		unix.EOPNOTSUPP, // no packet scheduler
		unix.ESRCH,      // no such process: its namespace is gone, or somebody else's
	} {
		if errors.Is(err, fine) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("free loopback of process %d: %w", pid, err)
	}
	return nil
}

// changeQueue asks for loopback's root queue to be made or removed.
func changeQueue(pid uint32, what, flags int, attrs ...nl.NetlinkRequestData) error {
	ns, err := netns.GetFromPid(int(pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer socket.Close()
	req := nl.NewNetlinkRequest(what, flags|unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}
	req.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: loopbackIndex, Parent: netlink.HANDLE_ROOT, Handle: quietHandle})
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err = req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}
