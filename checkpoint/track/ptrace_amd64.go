package track

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// syscallInstruction is "syscall".
var syscallInstruction = []byte{0x0f, 0x05}

// registers is struct user_regs_struct.
type registers struct{ unix.PtraceRegs }

const (
	kernelCodeSegment64 = 0x33
	trapFlag            = 1 << 8
	// errRestartNoHand is ERESTARTNOHAND, include/linux/errno.h: restart the call
	// unless a handler runs, else EINTR.
	errRestartNoHand = 514
)

func (r *registers) foreignABI() bool { return r.Cs != kernelCodeSegment64 }

func (r *registers) pc() uint64      { return r.Rip }
func (r *registers) setPC(pc uint64) { r.Rip = pc }

// call returns the registers that make the thread execute the system call
// instruction at pc.
func (r registers) call(pc uint64, nr, a0, a1, a2 uint64) registers {
	r.Rip, r.Rax, r.Rdi, r.Rsi, r.Rdx = pc, nr, a0, a1, a2
	// Not inside a system call: nothing is to be restarted.
	r.Orig_rax = ^uint64(0)
	// A process that steps itself must not see these instructions.
	r.Eflags &^= trapFlag
	return r
}

func (r *registers) result() int64 { return int64(r.Rax) }

// restartInterrupted turns EINTR of a call that can be repeated as it is into a
// restart. A timeout starts anew then: such a wait may last up to twice as long,
// once.
func (r *registers) restartInterrupted() bool {
	if int64(r.Rax) != -int64(unix.EINTR) {
		return false
	}
	switch r.Orig_rax {
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2,
		unix.SYS_RT_SIGTIMEDWAIT, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP:
		negative := int64(-errRestartNoHand)
		r.Rax = uint64(negative)
		return true
	}
	return false
}

// instructionAt cuts a system call instruction's length from what ptrace read.
func instructionAt(word uint64) []byte {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], word)
	return b[:len(syscallInstruction)]
}
