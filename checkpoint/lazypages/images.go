package lazypages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tranship/tranship/checkpoint"
)

// dumped is what CRIU's images say about one process's memory.
//
// The protocol names no ranges, and the store may hold more than the process
// had at the dump: pages that were unmapped or dropped between two rounds. So
// the images, which are also what CRIU registers by, decide what is filled. They
// are preferred to asking the kernel (VmFlags um in smaps), which could answer
// only after the registration and before the first instruction of the process,
// two moments that are not announced.
type dumped struct {
	// mappings are the ranges that CRIU registers, as vma_entry_can_be_lazy in
	// criu/include/vma.h has it.
	mappings []span
	// lazy are the pages that were left to us: PE_LAZY in lazy-PID.img or, without
	// it, in the pagemap. Where both are, the latter is joined over holes.
	lazy []span
	// wiped are mappings with MADV_WIPEONFORK: a child finds them zero.
	wiped []span
}

const (
	imgCommonMagic = 0x54564319
	mmMagic        = 0x57492820
	pagemapMagic   = 0x56084025

	// maxEntry bounds one image entry; an mm entry with 65,530 mappings, the
	// kernel's default limit, takes about 4 MB.
	maxEntry = 64 << 20

	peLazy = 1 << 1 // criu/include/pagemap.h

	madvWipeOnFork = 18

	vmaVsyscall = 1 << 2 // criu/include/image.h
	vmaVdso     = 1 << 3
	vmaVvar     = 1 << 12
)

// readDumped reads mm-PID.img and lazy-PID.img or pagemap-PID.img of dir.
func readDumped(dir string, pid checkpoint.PID) (dumped, error) {
	var d dumped
	pagemap := fmt.Sprintf("lazy-%d.img", pid)
	if _, err := os.Stat(filepath.Join(dir, pagemap)); errors.Is(err, os.ErrNotExist) {
		pagemap = fmt.Sprintf("pagemap-%d.img", pid)
	} else if err != nil {
		return dumped{}, fmt.Errorf("image of pid %d: %w", pid, err)
	}
	for _, img := range []struct {
		name  string
		parse func([]byte) error
	}{
		{fmt.Sprintf("mm-%d.img", pid), d.parseMM},
		{pagemap, d.parsePagemap},
	} {
		raw, err := os.ReadFile(filepath.Join(dir, img.name))
		if err != nil {
			return dumped{}, fmt.Errorf("image of pid %d: %w", pid, err)
		}
		if err := img.parse(raw); err != nil {
			return dumped{}, fmt.Errorf("image %s: %w", img.name, err)
		}
	}
	return d, nil
}

func (d *dumped) parseMM(raw []byte) error {
	return entries(raw, mmMagic, func(i int, entry []byte) error {
		if i > 0 {
			return errors.New("more than one entry")
		}
		err := fields(entry, func(num protowire.Number, _ uint64, sub []byte) error {
			if num != 14 || sub == nil {
				return nil
			}
			return d.parseVMA(sub)
		})
		if err != nil {
			return err
		}
		return disjoint(d.mappings)
	})
}

func (d *dumped) parseVMA(entry []byte) error {
	var s span
	var flags, status, madv uint64
	err := fields(entry, func(num protowire.Number, v uint64, _ []byte) error {
		switch num {
		case 1:
			s.start = v
		case 2:
			s.end = v
		case 6:
			flags = v
		case 7:
			status = v
		case 9:
			madv = v
		}
		return nil
	})
	if err != nil {
		return err
	}
	const lazyFlags = unix.MAP_ANONYMOUS | unix.MAP_PRIVATE
	if flags&lazyFlags != lazyFlags || flags&(unix.MAP_LOCKED|unix.MAP_HUGETLB) != 0 ||
		status&(vmaVdso|vmaVvar|vmaVsyscall) != 0 {
		return nil
	}
	if err := s.check(); err != nil {
		return err
	}
	d.mappings = append(d.mappings, s)
	if madv&(1<<madvWipeOnFork) != 0 {
		d.wiped = append(d.wiped, s)
	}
	return nil
}

func (d *dumped) parsePagemap(raw []byte) error {
	return entries(raw, pagemapMagic, func(i int, entry []byte) error {
		if i == 0 {
			return nil // the head: which pages-N.img
		}
		var addr, pages, compat, flags uint64
		err := fields(entry, func(num protowire.Number, v uint64, _ []byte) error {
			switch num {
			case 1:
				addr = v
			case 2:
				compat = v // the count before CRIU 4.2, 32 bits
			case 4:
				flags = v
			case 5:
				pages = v
			}
			return nil
		})
		if err != nil {
			return err
		}
		if pages == 0 {
			pages = compat
		}
		if flags&peLazy == 0 {
			return nil
		}
		if pages > 1<<45 {
			return fmt.Errorf("entry of %d pages", pages)
		}
		s := span{addr, addr + pages*checkpoint.PageSize}
		if err := s.check(); err != nil {
			return err
		}
		if n := len(d.lazy); n > 0 && d.lazy[n-1].end > s.start {
			return fmt.Errorf("entry at %#x is out of order", s.start)
		}
		d.lazy = append(d.lazy, s)
		return nil
	})
}

// check refuses spans that are empty, unaligned or outside of user space.
func (s span) check() error {
	if s.empty() || s.start%checkpoint.PageSize != 0 || s.end%checkpoint.PageSize != 0 || s.end > 1<<57 {
		return fmt.Errorf("impossible range %#x-%#x", s.start, s.end)
	}
	return nil
}

func disjoint(spans []span) error {
	sorted := slices.SortedFunc(slices.Values(spans), func(a, b span) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	for i := 1; i < len(sorted); i++ {
		if sorted[i].start < sorted[i-1].end {
			return fmt.Errorf("mappings overlap at %#x", sorted[i].start)
		}
	}
	return nil
}

// entries walks an image: one or two magic numbers, then entries after their
// 32-bit lengths (criu/protobuf.c). An image must have an entry.
func entries(raw []byte, magic uint32, visit func(i int, entry []byte) error) error {
	word := func() (uint32, error) {
		if len(raw) < 4 {
			return 0, fmt.Errorf("ends after %d of 4 bytes", len(raw))
		}
		v := binary.LittleEndian.Uint32(raw)
		raw = raw[4:]
		return v, nil
	}
	got, err := word()
	if err == nil && got == imgCommonMagic {
		got, err = word()
	}
	if err != nil {
		return fmt.Errorf("magic: %w", err)
	}
	if got != magic {
		return fmt.Errorf("magic %#x, want %#x", got, magic)
	}
	n := 0
	for ; len(raw) > 0; n++ {
		size, err := word()
		if err != nil {
			return fmt.Errorf("length of entry %d: %w", n, err)
		}
		if size > maxEntry || int(size) > len(raw) {
			return fmt.Errorf("entry %d of %d bytes, %d are left", n, size, len(raw))
		}
		if err := visit(n, raw[:size]); err != nil {
			return fmt.Errorf("entry %d: %w", n, err)
		}
		raw = raw[size:]
	}
	if n == 0 {
		return errors.New("no entry")
	}
	return nil
}

// fields walks a protobuf message; v has numbers, sub the length-delimited.
func fields(msg []byte, visit func(num protowire.Number, v uint64, sub []byte) error) error {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return protowire.ParseError(n)
		}
		msg = msg[n:]
		var v uint64
		var sub []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(msg)
		case protowire.BytesType:
			sub, n = protowire.ConsumeBytes(msg)
		default:
			n = protowire.ConsumeFieldValue(num, typ, msg)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := visit(num, v, sub); err != nil {
			return err
		}
		msg = msg[n:]
	}
	return nil
}
