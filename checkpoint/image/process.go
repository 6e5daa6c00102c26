package image

import (
	"bufio"
	"fmt"
	"io"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tranship/tranship/checkpoint"
)

// Task is one process of pstree.img. All ids are of the shard's pid namespace.
type Task struct {
	PID, Parent checkpoint.PID
	Group       checkpoint.PID
	Session     checkpoint.PID
	Threads     []checkpoint.PID // the main one too
}

// ReadProcessTree reads pstree.img, parents before their children.
func ReadProcessTree(r io.Reader) ([]Task, error) {
	img, err := openImage(bufio.NewReader(r), pstreeMagic)
	if err != nil {
		return nil, fmt.Errorf("process tree: %w", err)
	}
	var tasks []Task
	seen := map[checkpoint.PID]bool{}
	err = img.each(func(raw []byte) error {
		var m pstree.PstreeEntry
		if err := unmarshal(raw, &m); err != nil {
			return err
		}
		t := Task{PID: checkpoint.PID(m.GetPid()), Parent: checkpoint.PID(m.GetPpid()), Group: checkpoint.PID(m.GetPgid()), Session: checkpoint.PID(m.GetSid())}
		if t.PID <= 0 || seen[t.PID] {
			return malformed("process %d, or it twice", t.PID)
		}
		seen[t.PID] = true
		for _, tid := range m.GetThreads() {
			t.Threads = append(t.Threads, checkpoint.PID(tid))
		}
		tasks = append(tasks, t)
		return nil
	})
	if err == nil && len(tasks) == 0 {
		err = fmt.Errorf("%w: it has no process", ErrTruncated)
	}
	if err != nil {
		return nil, fmt.Errorf("process tree: %w", err)
	}
	return tasks, nil
}

// WriteProcessTree writes pstree.img.
func WriteProcessTree(w io.Writer, tasks []Task) error {
	img, err := newImage(w, pstreeMagic)
	if err != nil {
		return fmt.Errorf("write process tree: %w", err)
	}
	for _, t := range tasks {
		m := &pstree.PstreeEntry{Pid: u32(t.PID), Ppid: u32(t.Parent), Pgid: u32(t.Group), Sid: u32(t.Session)}
		for _, tid := range t.Threads {
			m.Threads = append(m.Threads, uint32(tid))
		}
		if err := img.message(m); err != nil {
			return fmt.Errorf("write process tree: %w", err)
		}
	}
	return nil
}

func u32(pid checkpoint.PID) *uint32 { v := uint32(pid); return &v }

// Status says what CRIU took a mapping for (criu/include/image.h).
type Status uint32

// The bits of Status that decide how a mapping's pages travel.
const (
	Regular     Status = 1 << 0
	Stack       Status = 1 << 1
	Vsyscall    Status = 1 << 2
	VDSO        Status = 1 << 3
	Heap        Status = 1 << 5
	FilePrivate Status = 1 << 6
	FileShared  Status = 1 << 7
	AnonShared  Status = 1 << 8
	AnonPrivate Status = 1 << 9
	SysVIPC     Status = 1 << 10
	Socket      Status = 1 << 11
	VVAR        Status = 1 << 12
	AIORing     Status = 1 << 13
	Memfd       Status = 1 << 14
	ShadowStack Status = 1 << 15
	// Guard is no mapping but a range that MADV_GUARD_INSTALL covers; it lies
	// inside one and stands after all others.
	Guard Status = 1 << 16
)

// VMA is one mapping. Offset is in bytes, whatever the field is called.
type VMA struct {
	Start, End uint64
	Offset     uint64
	// ShmID is the segment of a shared mapping, the file of a mapped one.
	ShmID   uint64
	Prot    uint32 // PROT_…
	Flags   uint32 // MAP_…
	Status  Status
	FD      int64 // unused by CRIU, -1
	Madvise uint64
	FDFlags uint32
}

// Linux's MAP_… bits that decide where pages go; the same on all platforms that
// tranship runs on.
const (
	mapPrivate   = 0x02
	mapAnonymous = 0x20
	mapLocked    = 0x2000
	mapHugeTLB   = 0x40000
)

// Lazy says whether a dump with lazy pages leaves the mapping's pages out, and
// the restore has them placed (vma_entry_can_be_lazy in criu/include/vma.h).
func (v VMA) Lazy() bool {
	return v.Flags&mapAnonymous != 0 && v.Flags&mapPrivate != 0 && v.Flags&(mapLocked|mapHugeTLB) == 0 &&
		v.Status&(VDSO|VVAR|Vsyscall) == 0
}

// ReadStackPointer reads the stack pointer of the thread of a core-<tid>.img.
func ReadStackPointer(r io.Reader) (uint64, error) {
	var m criucore.CoreEntry
	img, err := openImage(bufio.NewReader(r), coreMagic)
	if err == nil {
		err = img.only(&m)
	}
	switch {
	case err != nil:
	case m.GetThreadInfo() != nil:
		return m.GetThreadInfo().GetGpregs().GetSp(), nil
	case m.GetTiAarch64() != nil:
		return m.GetTiAarch64().GetGpregs().GetSp(), nil
	default:
		err = malformed("no registers of a platform that is known")
	}
	return 0, fmt.Errorf("thread: %w", err)
}

// MM is mm-<pid>.img.
type MM struct {
	StartBrk, Brk uint64
	ExeFileID     uint32
	// VMAs in ascending order, then the guards.
	VMAs []VMA
}

// ReadMM reads mm-<pid>.img.
func ReadMM(r io.Reader) (MM, error) {
	var m mm.MmEntry
	img, err := openImage(bufio.NewReader(r), mmMagic)
	if err == nil {
		err = img.only(&m)
	}
	if err != nil {
		return MM{}, fmt.Errorf("memory map: %w", err)
	}
	out := MM{StartBrk: m.GetMmStartBrk(), Brk: m.GetMmBrk(), ExeFileID: m.GetExeFileId()}
	var last uint64
	for _, v := range m.GetVmas() {
		vma := VMA{
			Start: v.GetStart(), End: v.GetEnd(), Offset: v.GetPgoff(), ShmID: v.GetShmid(),
			Prot: v.GetProt(), Flags: v.GetFlags(), Status: Status(v.GetStatus()), FD: v.GetFd(),
			Madvise: v.GetMadv(), FDFlags: v.GetFdflags(),
		}
		guard := vma.Status&Guard != 0
		if vma.Start >= vma.End || vma.Start%checkpoint.PageSize != 0 || vma.End%checkpoint.PageSize != 0 || !guard && vma.Start < last {
			return MM{}, fmt.Errorf("memory map: %w", malformed("mapping %#x-%#x after %#x", vma.Start, vma.End, last))
		}
		if !guard {
			last = vma.End
		}
		out.VMAs = append(out.VMAs, vma)
	}
	return out, nil
}

// IDs says what a task shares with others: equal numbers, shared thing.
// A namespace of 0 was not recorded.
type IDs struct {
	VM, Files, FS, Sighand                                      uint32
	PIDNS, NetNS, IPCNS, UTSNS, MntNS, UserNS, CgroupNS, TimeNS uint32
}

// ReadIDs reads ids-<pid>.img.
func ReadIDs(r io.Reader) (IDs, error) {
	var m criucore.TaskKobjIdsEntry
	img, err := openImage(bufio.NewReader(r), idsMagic)
	if err == nil {
		err = img.only(&m)
	}
	if err != nil {
		return IDs{}, fmt.Errorf("ids: %w", err)
	}
	return ids(&m), nil
}

func ids(m *criucore.TaskKobjIdsEntry) IDs {
	return IDs{
		VM: m.GetVmId(), Files: m.GetFilesId(), FS: m.GetFsId(), Sighand: m.GetSighandId(),
		PIDNS: m.GetPidNsId(), NetNS: m.GetNetNsId(), IPCNS: m.GetIpcNsId(), UTSNS: m.GetUtsNsId(),
		MntNS: m.GetMntNsId(), UserNS: m.GetUserNsId(), CgroupNS: m.GetCgroupNsId(), TimeNS: m.GetTimeNsId(),
	}
}

// Inventory is inventory.img.
type Inventory struct {
	Version     uint32
	Root        IDs // of CRIU itself
	UptimeUsec  uint64
	TCPClose    bool
	NetworkLock uint32
	// RunID names CRIU's nftables table; empty in older images.
	RunID string
}

// ReadInventory reads inventory.img.
func ReadInventory(r io.Reader) (Inventory, error) {
	var m inventory.InventoryEntry
	img, err := openImage(bufio.NewReader(r), inventoryMagic)
	if err == nil {
		err = img.only(&m)
	}
	if err != nil {
		return Inventory{}, fmt.Errorf("inventory: %w", err)
	}
	if v := m.GetImgVersion(); v != 1 && v != 2 {
		return Inventory{}, fmt.Errorf("inventory: %w", malformed("version %d", v))
	}
	out := Inventory{
		Version: m.GetImgVersion(), UptimeUsec: m.GetDumpUptime(),
		TCPClose: m.GetTcpClose(), NetworkLock: m.GetNetworkLockMethod(),
	}
	if m.RootIds != nil {
		out.Root = ids(m.RootIds)
	}
	// Newer than go-criu's type.
	err = fields(m.ProtoReflect().GetUnknown(), func(f field) error {
		if f.num == runIDField {
			out.RunID = string(f.bytes)
		}
		return nil
	})
	if err != nil {
		return Inventory{}, fmt.Errorf("inventory: %w", err)
	}
	return out, nil
}

const runIDField protowire.Number = 13
