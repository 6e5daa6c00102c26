package track

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// syscallInstruction is "svc #0".
var syscallInstruction = []byte{0x01, 0x00, 0x00, 0xd4}

// registers is struct user_pt_regs.
type registers struct{ unix.PtraceRegs }

const (
	pstateAArch32 = 1 << 4
	pstateStep    = 1 << 21
)

func (r *registers) foreignABI() bool { return r.Pstate&pstateAArch32 != 0 }

func (r *registers) pc() uint64      { return r.Pc }
func (r *registers) setPC(pc uint64) { r.Pc = pc }

// call returns the registers that make the thread execute the system call
// instruction at pc.
func (r registers) call(pc uint64, nr, a0, a1, a2 uint64) registers {
	r.Pc, r.Regs[8], r.Regs[0], r.Regs[1], r.Regs[2] = pc, nr, a0, a1, a2
	r.Pstate &^= pstateStep
	return r
}

func (r *registers) result() int64 { return int64(r.Regs[0]) }

// restartInterrupted does nothing here: by the time of the stop the kernel has
// moved the program counter back for every call that restarts
// (arch/arm64/kernel/signal.c, do_signal), and the first argument, which the
// result has overwritten, cannot be had back for those that return EINTR.
func (r *registers) restartInterrupted() bool { return false }

// instructionAt cuts a system call instruction's length from what ptrace read.
func instructionAt(word uint64) []byte {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], word)
	return b[:len(syscallInstruction)]
}
