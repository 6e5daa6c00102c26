package lazypages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// eventLog is what a family has read and done, on the tmpfs of its store, for a
// server that takes over. An event is gone from the kernel when it is read, and
// its process goes on; therefore the kernel is made to write it into the log
// itself: the log is mapped shared, and read(2) gets a place in it as its
// buffer. A server that is killed in the middle of that call still ends the
// call, so there is no moment in which an event is neither in the kernel nor in
// the log. The pages of the mapping are locked, so that the copy cannot fail.
//
// The file is a snapshot (snapshot.go), then slots of 32 bytes, zero from the
// last one on:
//
//	read     space       the messages behind it are of this space
//	         uffd_msg…   as the kernel writes them
//	shift    space       a child's mapping was found elsewhere (recent.go)
//	applied              what was read was applied, with these shifts
//	settle   space       no event of this space was outstanding
//	gaveUp   space span  pages that were placed, or that nobody needs
//	drop     space       its userfaultfd is being closed
//
// Faults are not kept, as they can be made to come again: they are left out when
// they are read last in a batch, and skipped elsewhere.
type eventLog struct {
	path string
	mem  []byte // the slots, mapped
	tail int    // the next slot
}

const (
	slotSize = msgSize

	slotRead    = 0x01
	slotShift   = 0x02
	slotApplied = 0x03
	slotSettle  = 0x04
	slotGaveUp  = 0x05
	slotDrop    = 0x06

	logMagic = "tranship events 1\n"
	// minSlots take 64 KiB, made while the shard stands still; a log that was full
	// is twice as large when it begins anew, up to maxSlots.
	minSlots = 2 << 10
	maxSlots = 128 << 10
	// maxSnapshot bounds what is read back: a process of a terabyte, alternating.
	maxSnapshot = 1 << 30
)

// errLog says that a log is not what a server writes.
var errLog = errors.New("malformed event log")

// record is a decoded slot: a message if kind is 0.
type record struct {
	kind  byte
	space int
	args  [3]uint64
	message
}

// createLog makes a log with room for n slots, in place of the one at path, if
// any: whole or not at all.
func createLog(path string, snapshot []byte, n int) (_ *eventLog, err error) {
	fail := func(err error) (*eventLog, error) { return nil, fmt.Errorf("event log %s: %w", path, err) }
	part := path + ".part"
	file, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, file.Close()) }() // the mapping stays
	head := appendHead(nil, snapshot)
	// Reserved now: a page that the tmpfs has no room for later is a SIGBUS.
	if err := unix.Fallocate(int(file.Fd()), 0, 0, int64(len(head)+n*slotSize)); err != nil {
		return fail(err)
	}
	if _, err := file.Write(head); err != nil {
		return fail(err)
	}
	mem, err := unix.Mmap(int(file.Fd()), int64(len(head)), n*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fail(err)
	}
	// Without the right to lock, they stay unless memory is short.
	_ = unix.Mlock(mem)
	if err := os.Rename(part, path); err != nil {
		return fail(errors.Join(err, unix.Munmap(mem)))
	}
	return &eventLog{path: path, mem: mem}, nil
}

// appendHead encodes what comes before the slots, filled up to whole pages.
func appendHead(b, snapshot []byte) []byte {
	b = append(b, logMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(snapshot)))
	b = append(b, snapshot...)
	b = binary.LittleEndian.AppendUint64(b, xxh3.Hash(snapshot))
	page := os.Getpagesize()
	return append(b, make([]byte, (page-len(b)%page)%page)...)
}

// parseLog returns a log's snapshot and its slots.
func parseLog(raw []byte) (snapshot []byte, slots []record, err error) {
	head := len(logMagic) + 8
	if len(raw) < head || string(raw[:len(logMagic)]) != logMagic {
		return nil, nil, fmt.Errorf("%w: magic", errLog)
	}
	size := binary.LittleEndian.Uint64(raw[len(logMagic):])
	if size > maxSnapshot || uint64(len(raw)) < uint64(head)+size+8 {
		return nil, nil, fmt.Errorf("%w: a snapshot of %d bytes in %d", errLog, size, len(raw))
	}
	snapshot = raw[head:][:size]
	if binary.LittleEndian.Uint64(raw[head+int(size):]) != xxh3.Hash(snapshot) {
		return nil, nil, fmt.Errorf("%w: damaged", errLog)
	}
	page := os.Getpagesize()
	at := (head + int(size) + 8 + page - 1) / page * page
	slots, err = parseSlots(raw[min(at, len(raw)):])
	return snapshot, slots, err
}

// parseSlots decodes slots up to the first that was not written. A slot that is
// cut short was not written.
func parseSlots(raw []byte) ([]record, error) {
	var out []record
	for ; len(raw) >= slotSize && raw[0] != 0; raw = raw[slotSize:] {
		r := record{kind: raw[0], space: int(binary.NativeEndian.Uint32(raw[4:]))}
		switch r.kind {
		case eventPagefault:
			continue
		case eventFork, eventRemap, eventRemove, eventUnmap:
			m, err := decodeMessage(raw)
			if err != nil {
				return nil, err
			}
			r = record{message: m}
		case slotRead, slotShift, slotApplied, slotSettle, slotGaveUp, slotDrop:
			for i := range r.args {
				r.args[i] = binary.NativeEndian.Uint64(raw[8+8*i:])
			}
		default:
			return nil, fmt.Errorf("%w: slot %#x", errLog, r.kind)
		}
		out = append(out, r)
	}
	return out, nil
}

func (l *eventLog) slots() int { return len(l.mem) / slotSize }

// room is how many slots are left.
func (l *eventLog) room() int { return l.slots() - l.tail }

// append writes a slot; false if there is no room. The word with its kind comes
// last, so that a slot is there as a whole or not at all.
func (l *eventLog) append(kind byte, space int, args ...uint64) bool {
	if l.room() == 0 {
		return false
	}
	l.write(l.tail, kind, space, args...)
	l.tail++
	return true
}

func (l *eventLog) write(slot int, kind byte, space int, args ...uint64) {
	raw := l.mem[slot*slotSize:][:slotSize]
	for i, a := range args {
		binary.NativeEndian.PutUint64(raw[8+8*i:], a)
	}
	var first [8]byte
	first[0] = kind
	binary.NativeEndian.PutUint32(first[4:], uint32(space))
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&raw[0])), binary.NativeEndian.Uint64(first[:]))
}

// read takes what the kernel has to say of a space, as long as there is room for
// a batch, and one slot for whoever applies it. There must be at first. Faults are
// given to fault.
func (l *eventLog) read(fd, space int, fault func(addr uint64)) ([]message, error) {
	var events []message
	l.write(l.tail, slotRead, space)
	at, end := l.tail+1, l.tail // behind the last slot that must stay
	defer func() { l.tail = end }()
	for l.slots()-at > eventBatch {
		n, err := unix.Read(fd, l.mem[at*slotSize:][:eventBatch*slotSize])
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return events, nil
		default:
			return events, err
		}
		if n == 0 {
			return events, nil
		}
		for ; n > 0; n -= msgSize {
			m, err := decodeMessage(l.mem[at*slotSize:][:min(n, msgSize)])
			if err != nil {
				return events, err
			}
			at++
			if m.event == eventPagefault {
				fault(m.addr)
				continue
			}
			events, end = append(events, m), at
		}
	}
	return events, nil
}

func (l *eventLog) close() error {
	if l == nil || l.mem == nil {
		return nil
	}
	mem := l.mem
	l.mem = nil
	return unix.Munmap(mem)
}
