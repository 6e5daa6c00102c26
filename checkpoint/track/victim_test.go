package track

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The victim is the test binary started again: a process with a Go heap, many
// threads and, under the race detector, terabytes of reserved memory, which
// changes its memory as it is told on its standard input. Each command is one
// line, and so is each answer: a number, or "error: …".

const victimVariable = "TRANSHIP_TRACK_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimVariable) != "" {
		runVictim()
		os.Exit(0)
	}
	go keepStarting()
	code := m.Run()
	if builtBlocked {
		if path, err := buildBlocked(); err == nil {
			_ = os.RemoveAll(filepath.Dir(path))
		}
	}
	os.Exit(code)
}

// starts are the processes that tests start. They die with the thread that
// started them, even if they are stopped, so that nothing outlives a test that
// breaks off; so that thread has to last as long as the tests.
var starts = make(chan func())

func keepStarting() {
	runtime.LockOSThread()
	for start := range starts {
		start()
	}
}

// start starts a process that ends with the tests.
func start(cmd *exec.Cmd) error {
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	done := make(chan error, 1)
	starts <- func() { done <- cmd.Start() }
	return <-done
}

type victim struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startVictim(t *testing.T, attr *syscall.SysProcAttr) *victim {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{cmd: exec.Command(exe)}
	v.cmd.Env = append(os.Environ(), victimVariable+"=1")
	v.cmd.Stderr = os.Stderr
	v.cmd.SysProcAttr = attr
	if v.cmd.SysProcAttr == nil {
		v.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A session of its own, so that no terminal stops it.
	v.cmd.SysProcAttr.Setsid = true
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = bufio.NewReader(out)
	if err := start(v.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
	})
	v.do(t, "hello")
	return v
}

func (v *victim) pid() int { return v.cmd.Process.Pid }

// do sends one command and returns the answer.
func (v *victim) do(t *testing.T, format string, args ...any) uint64 {
	t.Helper()
	n, err := v.try(format, args...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (v *victim) try(format string, args ...any) (uint64, error) {
	command := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(v.in, command); err != nil {
		return 0, fmt.Errorf("victim %q: %w", command, err)
	}
	answer, err := v.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("victim %q: %w", command, err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(answer), 0, 64)
	if err != nil {
		return 0, fmt.Errorf("victim %q: %s", command, strings.TrimSpace(answer))
	}
	return n, nil
}

// --- what follows runs in the victim ---

type victimState struct {
	rng    *rand.Rand
	stress *stress
	stamp  atomic.Uint64
	// place is the lowest address that a mapping was given.
	place uint64
}

// firstPlace is where neither the kernel, which begins below the stack, nor Go's
// heap nor the race detector (runtime/race) puts a mapping by itself. What is
// unmapped there stays so until a test maps it again: elsewhere the next mapping of
// the victim's runtime would land in the hole, and be written over.
const firstPlace = 0x5000_0000_0000

func runVictim() {
	s := &victimState{rng: rand.New(rand.NewPCG(uint64(os.Getpid()), 1)), place: firstPlace}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		n, err := s.command(strings.Fields(in.Text()))
		if err != nil {
			fmt.Printf("error: %v\n", err)
			continue
		}
		fmt.Printf("%d\n", n)
	}
}

func (s *victimState) command(words []string) (uint64, error) {
	arg := make([]uint64, 8)
	for i, w := range words[1:] {
		n, err := strconv.ParseUint(w, 0, 64)
		if err != nil {
			return 0, err
		}
		arg[i] = n
	}
	sys := func(nr uintptr, args ...uint64) (uint64, error) {
		var a [6]uintptr
		for i, v := range args {
			a[i] = uintptr(v)
		}
		r, _, errno := syscall.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno != 0 {
			return 0, fmt.Errorf("%s: %w", words[0], errno)
		}
		return uint64(r), nil
	}
	switch words[0] {
	case "hello":
		return uint64(os.Getpid()), nil
	case "mmap": // addr length prot flags
		if arg[0] == 0 { // beside the last one, as the kernel does
			s.place -= (arg[1] + page - 1) &^ (page - 1)
			arg[0], arg[3] = s.place, arg[3]|unix.MAP_FIXED_NOREPLACE
		}
		return sys(unix.SYS_MMAP, arg[0], arg[1], arg[2], arg[3]|unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uint64(0), 0)
	case "mapzero": // length: a private mapping of the zero device
		f, err := os.OpenFile("/dev/zero", os.O_RDWR, 0)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		return sys(unix.SYS_MMAP, 0, arg[0], unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE, uint64(f.Fd()), 0)
	case "munmap":
		return sys(unix.SYS_MUNMAP, arg[0], arg[1])
	case "mremap": // old oldLength newLength flags new
		return sys(unix.SYS_MREMAP, arg[0], arg[1], arg[2], arg[3], arg[4])
	case "mprotect":
		return sys(unix.SYS_MPROTECT, arg[0], arg[1], arg[2])
	case "madvise":
		return sys(unix.SYS_MADVISE, arg[0], arg[1], arg[2])
	case "mlock":
		return sys(unix.SYS_MLOCK, arg[0], arg[1])
	case "munlock":
		return sys(unix.SYS_MUNLOCK, arg[0], arg[1])
	case "name": // addr length
		name := append([]byte("tranship"), 0)
		defer runtime.KeepAlive(name)
		return sys(unix.SYS_PRCTL, unix.PR_SET_VMA, unix.PR_SET_VMA_ANON_NAME, arg[0], arg[1], uint64(uintptr(unsafe.Pointer(&name[0]))))
	case "brk": // growth
		now, _, _ := syscall.Syscall(unix.SYS_BRK, 0, 0, 0)
		got, _, _ := syscall.Syscall(unix.SYS_BRK, now+uintptr(int64(arg[0])), 0, 0)
		if got != now+uintptr(int64(arg[0])) {
			return 0, errors.New("brk: refused")
		}
		return uint64(now), nil
	case "write": // addr length: every page, never twice the same
		writePages(arg[0], arg[1], s.stamp.Add(1))
		return 0, nil
	case "read": // addr length: one byte of every page
		return readPages(arg[0], arg[1]), nil
	case "uffd": // addr length: handle its own page faults
		fd, err := sys(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|uffdUserModeOnly)
		if err != nil {
			return 0, err
		}
		u := &userfault{fd: int(fd)}
		if err := u.handshake(); err != nil {
			return 0, err
		}
		return fd, u.register(arg[0], arg[0]+arg[1])
	case "seccomp": // nr: a filter for all threads that kills for one system call
		return 0, seccompKill(uint32(arg[0]))
	case "fork": // addr length: a child that writes one page after the other
		return forkWriter(arg[0], arg[1])
	case "reap":
		if err := syscall.Kill(int(arg[0]), syscall.SIGKILL); err != nil {
			return 0, err
		}
		_, err := syscall.Wait4(int(arg[0]), nil, 0, nil)
		return 0, err
	case "spawn": // n: vfork and exec
		for range arg[0] {
			if err := exec.Command("/bin/true").Run(); err != nil {
				return 0, err
			}
		}
		return 0, nil
	case "exec":
		exe, err := os.Executable()
		if err != nil {
			return 0, err
		}
		// The image that follows answers.
		fmt.Println("0")
		return 0, syscall.Exec(exe, os.Args, os.Environ())
	case "stress": // seed
		s.stress = startStress(arg[0])
		return 0, nil
	case "unstress":
		s.stress.stop()
		return s.stress.operations.Load(), nil
	case "children": // a process of the pid namespace besides this one
		cmd := exec.Command("/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return uint64(cmd.Process.Pid), nil
	}
	return 0, fmt.Errorf("unknown command %q", words)
}

// foreign is a pointer into memory that the Go runtime does not know.
//
//go:norace
func foreign(addr uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&addr)) }

//go:norace
func writePages(addr, length, stamp uint64) {
	for at := addr; at < addr+length; at += 4096 {
		p := (*[512]uint64)(foreign(at))
		p[0], p[1], p[511] = stamp, at, stamp*0x9e3779b97f4a7c15+at
		p[2+stamp%500] ^= stamp
	}
}

//go:norace
func readPages(addr, length uint64) uint64 {
	var sum uint64
	for at := addr; at < addr+length; at += 4096 {
		sum += *(*uint64)(foreign(at))
	}
	return sum
}

// forkWriter forks without exec. The child must not need the Go runtime, whose
// other threads it does not have.
//
//go:norace
//go:noinline
func forkWriter(addr, length uint64) (uint64, error) {
	pause := unix.Timespec{Nsec: 200_000}
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	if pid != 0 {
		return uint64(pid), nil
	}
	// It holds the victim's output open, so it must not outlive it.
	syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0)
	for stamp := uint64(1); ; stamp++ {
		at := addr + stamp*7%(length/4096)*4096
		p := (*[512]uint64)(foreign(at))
		p[stamp%512] = stamp
		syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
	}
}

func seccompKill(nr uint32) error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}

// stress changes memory in every way at once, from several threads.
type stress struct {
	operations atomic.Uint64
	ending     atomic.Bool
	threads    sync.WaitGroup
}

func startStress(seed uint64) *stress {
	s := &stress{}
	for i := range uint64(3) {
		s.threads.Go(func() { s.mutate(rand.New(rand.NewPCG(seed, i))) })
	}
	s.threads.Go(func() { // a heap under garbage collection
		var keep [16][]byte
		for i := 0; !s.ending.Load(); i++ {
			keep[i%16] = make([]byte, 64<<10)
			keep[i%16][i%1000] = byte(i)
			time.Sleep(200 * time.Microsecond) //nolint:forbidigo // a load's pace
		}
	})
	return s
}

func (s *stress) stop() {
	s.ending.Store(true)
	s.threads.Wait()
}

// mutate works in an arena of its own, whose mappings come and go.
func (s *stress) mutate(rng *rand.Rand) {
	const pages, page, rw = 2048, 4096, unix.PROT_READ | unix.PROT_WRITE
	const anonymous = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	sys := func(nr uintptr, args ...uintptr) bool {
		var a [6]uintptr
		copy(a[:], args)
		// Some of the random operations are refused.
		_, _, errno := syscall.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		return errno == 0
	}
	base, _, errno := syscall.Syscall6(unix.SYS_MMAP, 0, pages*page, rw, anonymous|unix.MAP_NORESERVE, ^uintptr(0), 0)
	if errno != 0 {
		panic(errno)
	}
	span := func(most int) (uintptr, uintptr) {
		n := 1 + rng.IntN(most)
		return base + uintptr(rng.IntN(pages-n))*page, uintptr(n) * page
	}
	for stamp := uint64(1); !s.ending.Load(); stamp++ {
		s.operations.Add(1)
		switch addr, length := span(64); rng.IntN(16) {
		case 0:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_DONTNEED)
		case 1:
			sys(unix.SYS_MMAP, addr, length, rw, anonymous|unix.MAP_FIXED, ^uintptr(0), 0)
		case 2, 3:
			// A move that leaves its mapping behind, and one back, over other memory,
			// that leaves none. Never is there a hole in the arena: the Go runtime's
			// next mapping would land in it, and be written over.
			away, _, errno := syscall.Syscall6(unix.SYS_MREMAP, addr, length, length, unix.MREMAP_MAYMOVE|unix.MREMAP_DONTUNMAP, 0, 0)
			if errno != 0 {
				break // it spans mappings that differ
			}
			if stamp%2 == 0 {
				writePages(uint64(away), uint64(length), stamp)
			}
			to := base + uintptr(rng.IntN(pages-64))*page
			if !sys(unix.SYS_MREMAP, away, length, length, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to) {
				sys(unix.SYS_MMAP, to, length, rw, anonymous|unix.MAP_FIXED, ^uintptr(0), 0)
				sys(unix.SYS_MUNMAP, away, length)
			}
		case 4:
			sys(unix.SYS_MPROTECT, addr, length, unix.PROT_NONE)
			sys(unix.SYS_MPROTECT, addr, length, rw)
		case 5:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_FREE)
		case 6:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_PAGEOUT)
		case 7:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_COLLAPSE)
		case 8:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_HUGEPAGE)
		case 9:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_POPULATE_READ)
		case 10:
			const install, remove = 102, 103 // MADV_GUARD_INSTALL, MADV_GUARD_REMOVE: Linux 6.13
			sys(unix.SYS_MADVISE, addr, length, install)
			sys(unix.SYS_MADVISE, addr, length, remove)
		case 11:
			sys(unix.SYS_MADVISE, addr, length, unix.MADV_COLD)
		default:
			writePages(uint64(addr), uint64(length), stamp)
		}
		if stamp%32 == 0 {
			time.Sleep(100 * time.Microsecond) //nolint:forbidigo // leave a processor to the tracker
		}
	}
}
