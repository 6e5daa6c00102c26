package lazypages

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

const (
	taskEnv    = "TRANSHIP_TEST_TASK"
	serverEnv  = "TRANSHIP_TEST_PAGE_SERVER"
	connectEnv = "TRANSHIP_TEST_CONNECT"
	page       = checkpoint.PageSize
)

// TestMain is also the restored process and the page server, when a test starts
// the test binary again as such.
func TestMain(m *testing.M) {
	if spec := os.Getenv(taskEnv); spec != "" {
		if err := taskMain(spec); err != nil {
			fmt.Println("bad:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if path := os.Getenv(connectEnv); path != "" {
		if err := connectMain(path); err != nil {
			fmt.Println("bad:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if every := os.Getenv(serverEnv); every != "" {
		os.Exit(serverMain(every))
	}
	os.Exit(m.Run())
}

// serverMain is a page server that fills one in so many pieces.
func serverMain(every string) int {
	cfg, takeOver, err := parseArgs(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var n, asked int64
	if _, err := fmt.Sscan(every, &n); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if n > 1 {
		cfg.mayFill = func() bool { return atomic.AddInt64(&asked, 1)%n == 0 }
	}
	return runServer(cfg, takeOver)
}

// connectMain is a CRIU that connects and hangs.
func connectMain(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	fmt.Println(fd)
	for {
		if err := unix.Pause(); err != unix.EINTR {
			return err
		}
	}
}

// taskSpec describes a restored process: its mappings, all of one pattern.
type taskSpec struct {
	Seed    uint64
	Base    uint64
	Pages   uint64
	Threads int
	Ops     int
	// Scenario is read, chaos, exit, hold or parent.
	Scenario string
	// ForkOften makes chaos fork every few operations.
	ForkOften bool
	// Wipe pages at the end are MADV_WIPEONFORK.
	Wipe uint64
	// Dense memory has neither holes nor stale pages.
	Dense bool
}

// kinds of pages, by seed and number.
type kind uint8

const (
	zeroKind    kind = iota // a hole, or stale: stored but dropped before the dump
	dataKind                // as dumped
	writtenKind             // as written after the restore
)

//go:nosplit
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// dumpedKind says what page i is when it is restored; stale says that the store
// has content for it nevertheless.
func (s taskSpec) dumpedKind(i uint64) (k kind, stale bool) {
	if s.Dense {
		return dataKind, false
	}
	if mix(s.Seed^(i/64))%6 == 0 {
		return zeroKind, false // a run of holes
	}
	switch mix(s.Seed+i) % 10 {
	case 0:
		return zeroKind, false
	case 1:
		return zeroKind, true
	}
	return dataKind, false
}

func (s taskSpec) content(i uint64) uint64 { return mix(s.Seed ^ i*0x10001) }

// fillPage writes the content that begins with v.
func fillPage(dst []byte, v uint64) {
	words := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(dst))), page/8)
	for i := range words {
		words[i] = v + uint64(i)*0x9e3779b1
	}
}

// pageState is what a page must hold.
type pageState struct {
	value uint64
	patch uint64 // one word written without reading the page, 0 for none
	at    uint16
	kind  kind
	// wipe: its mapping is MADV_WIPEONFORK, which it stays wherever it moves.
	wipe bool
}

// area is a piece of the process's memory that one thread owns.
type area struct {
	addr  uint64
	pages []pageState
}

// pointer points to memory that Go does not manage.
//
//go:nosplit
//go:norace
func pointer(addr uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&addr)) }

// verify returns the first wrong word, or 0. It runs in forked children of a
// multi-threaded Go process: no allocation, no stack growth, no race detector.
//
//go:nosplit
//go:norace
//go:nocheckptr
func verify(addr uint64, p *pageState) uint64 {
	for i := uint64(0); i < page/8; i++ {
		want := uint64(0)
		if p.kind != zeroKind {
			want = p.value + i*0x9e3779b1
		}
		if p.patch != 0 && uint64(p.at) == i {
			want = p.patch
		}
		if *(*uint64)(pointer(addr + 8*i)) != want {
			return addr + 8*i
		}
	}
	return 0
}

// taskMain restores itself: it registers its mapping with a userfaultfd as
// CRIU's restorer does, hands it over, and runs its scenario when told to.
func taskMain(raw string) error {
	var spec taskSpec
	if err := json.Unmarshal([]byte(raw), &spec); err != nil {
		return err
	}
	conn, err := net.FileConn(os.NewFile(3, "criu"))
	if err != nil {
		return err
	}
	size := spec.Pages * page
	if err := mapAt(spec.Base, size, unix.MAP_FIXED_NOREPLACE); err != nil {
		return err
	}
	if spec.Wipe > 0 {
		if err := madvise(spec.Base+(spec.Pages-spec.Wipe)*page, spec.Wipe*page, unix.MADV_WIPEONFORK); err != nil {
			return err
		}
	}
	if err := handOver(conn.(*net.UnixConn), int32(os.Getpid()), func(uffd int) error {
		return register(uffd, spec.Base, size)
	}); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("registered")
	for in.Scan() && in.Text() != "go" {
	}
	switch spec.Scenario {
	case "read":
		err = spec.readAll()
	case "chaos":
		err = spec.chaos()
	case "exit":
		err = spec.touchAndExit()
	case "hold":
		err = spec.hold(in)
	case "parent":
		err = spec.parent(in)
	default:
		err = fmt.Errorf("no scenario %q", spec.Scenario)
	}
	if err == nil {
		fmt.Println("ok")
	}
	return err
}

// handOver speaks CRIU's side of the protocol, in CRIU's order: the descriptor
// is sent before anything is registered with it.
func handOver(conn *net.UnixConn, pid int32, registerAll func(uffd int) error) error {
	uffd, err := openUffd()
	if err != nil {
		return err
	}
	if _, err := conn.Write(unsafe.Slice((*byte)(unsafe.Pointer(&pid)), 4)); err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(uffd), nil); err != nil {
		return err
	}
	return errors.Join(registerAll(uffd), unix.Close(uffd))
}

func openUffd() (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return 0, fmt.Errorf("userfaultfd: %w", errno)
	}
	const fork, remap, remove, unmap = 1 << 1, 1 << 2, 1 << 3, 1 << 6
	api := struct{ api, features, ioctls uint64 }{0xaa, fork | remap | remove | unmap, 0}
	if errno := ioctl(int(fd), 0xc018aa3f, unsafe.Pointer(&api)); errno != 0 {
		return 0, fmt.Errorf("UFFDIO_API: %w", errno)
	}
	return int(fd), nil
}

func register(uffd int, addr, size uint64) error {
	reg := struct{ start, length, mode, ioctls uint64 }{addr, size, 1, 0}
	if errno := ioctl(uffd, 0xc020aa00, unsafe.Pointer(&reg)); errno != 0 {
		return fmt.Errorf("UFFDIO_REGISTER %#x: %w", addr, errno)
	}
	return nil
}

func mapAt(addr, size uint64, flags uintptr) error {
	_, err := mmap(addr, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	return err
}

func mmap(addr, size uint64, prot, flags uintptr) (uint64, error) {
	got, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(addr), uintptr(size), prot,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|flags, ^uintptr(0), 0)
	if errno != 0 {
		return 0, fmt.Errorf("mmap %#x+%#x: %w", addr, size, errno)
	}
	return uint64(got), nil
}

func madvise(addr, size uint64, advice uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(addr), uintptr(size), advice); errno != 0 {
		return fmt.Errorf("madvise %#x+%#x: %w", addr, size, errno)
	}
	return nil
}

func mremap(from, size, newSize uint64, flags uintptr, to uint64) (uint64, error) {
	got, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(from), uintptr(size), uintptr(newSize), flags, uintptr(to), 0)
	if errno != 0 {
		return 0, errno
	}
	return uint64(got), nil
}

// states are the pages [from, to) as they are restored.
func (s taskSpec) states(from, to uint64) []pageState {
	out := make([]pageState, 0, to-from)
	for i := from; i < to; i++ {
		k, _ := s.dumpedKind(i)
		p := pageState{kind: k}
		if k == dataKind {
			p.value = s.content(i)
		}
		out = append(out, p)
	}
	return out
}

// split deals the process's pages out to its threads.
func (s taskSpec) split() []area {
	var out []area
	n := uint64(s.Threads)
	for t := range n {
		from, to := s.Pages*t/n, s.Pages*(t+1)/n
		out = append(out, area{s.Base + from*page, s.states(from, to)})
	}
	return out
}

func each(areas []area, run func(thread int, a area) error) error {
	errs := make([]error, len(areas))
	var wg sync.WaitGroup
	for i, a := range areas {
		wg.Add(1)
		go func() {
			defer wg.Done()
			runtime.LockOSThread()
			errs[i] = run(i, a)
		}()
	}
	wg.Wait()
	return errors.Join(errs...)
}

// readAll reads every page in a random order, every thread the whole memory,
// and tells how long the reads took that had to wait.
func (s taskSpec) readAll() error {
	var mu sync.Mutex
	var waits []time.Duration // of first touches that took longer than one in memory
	whole := area{s.Base, s.states(0, s.Pages)}
	areas := make([]area, s.Threads)
	for i := range areas {
		areas[i] = whole
	}
	err := each(areas, func(thread int, a area) error {
		rng := rand.New(rand.NewPCG(s.Seed, uint64(thread)))
		for _, i := range rng.Perm(len(a.pages)) {
			start := time.Now()
			_ = *(*byte)(pointer(a.addr + uint64(i)*page))
			if d := time.Since(start); d > 5*time.Microsecond {
				mu.Lock()
				waits = append(waits, d)
				mu.Unlock()
			}
			if bad := verify(a.addr+uint64(i)*page, &a.pages[i]); bad != 0 {
				return fmt.Errorf("page %d is wrong at %#x: seed %d", i, bad, s.Seed)
			}
		}
		return nil
	})
	if slices.Sort(waits); len(waits) > 0 {
		at := func(percent int) time.Duration { return waits[(len(waits)-1)*percent/100] }
		fmt.Println(len(waits), "reads waited: half", at(50), "99 %", at(99), "longest", at(100))
	}
	return err
}

// touchAndExit dies in the middle of being filled.
func (s taskSpec) touchAndExit() error {
	return each(s.split(), func(_ int, a area) error {
		for i := range a.pages[:len(a.pages)/8] {
			if bad := verify(a.addr+uint64(i)*page, &a.pages[i]); bad != 0 {
				return fmt.Errorf("page %d is wrong at %#x: seed %d", i, bad, s.Seed)
			}
		}
		return nil
	})
}

// hold waits to be told to verify, or for the end of its input.
func (s taskSpec) hold(in *bufio.Scanner) error {
	fmt.Println("holding")
	for in.Scan() {
		if in.Text() == "verify" {
			return s.readAll()
		}
	}
	return nil
}

// parent makes a child that never ends by itself, and holds.
func (s taskSpec) parent(in *bufio.Scanner) error {
	a := area{s.Base, s.states(0, 1)}
	pid := rawFork([]area{a}, waiting, nil, nil)
	if pid < 0 {
		return fmt.Errorf("fork: errno %d", -pid)
	}
	fmt.Println("child", pid)
	return s.hold(in)
}

// chaos changes memory at random in every thread, and checks every page against
// a model all along.
func (s taskSpec) chaos() error {
	return each(s.split(), func(thread int, a area) error {
		c := chaos{
			spec: s, rng: rand.New(rand.NewPCG(s.Seed, uint64(thread))), areas: []area{a},
		}
		for i := range a.pages {
			a.pages[i].wipe = a.addr+uint64(i)*page >= s.Base+(s.Pages-s.Wipe)*page
		}
		for op := range s.Ops {
			if err := c.step(); err != nil {
				return fmt.Errorf("seed %d thread %d operation %d: %s: %w", s.Seed, thread, op, c.doing, err)
			}
		}
		for i := range c.areas {
			if err := c.check(&c.areas[i], 0, len(c.areas[i].pages)); err != nil {
				return fmt.Errorf("seed %d thread %d at the end: %w", s.Seed, thread, err)
			}
		}
		return nil
	})
}

type chaos struct {
	spec  taskSpec
	rng   *rand.Rand
	areas []area
	doing string
}

func (c *chaos) check(a *area, from, n int) error {
	for i := from; i < from+n; i++ {
		if bad := verify(a.addr+uint64(i)*page, &a.pages[i]); bad != 0 {
			return fmt.Errorf("page %#x (%d of area %#x, kind %d) is wrong at %#x: %#x",
				a.addr+uint64(i)*page, i, a.addr, a.pages[i].kind, bad, *(*uint64)(pointer(bad)))
		}
	}
	return nil
}

// step does one random thing to a random run of a random area.
func (c *chaos) step() error {
	k := c.rng.IntN(len(c.areas))
	a := &c.areas[k]
	n := 1 + c.rng.IntN(min(48, len(a.pages)))
	from := c.rng.IntN(len(a.pages) - n + 1)
	addr, size := a.addr+uint64(from)*page, uint64(n)*page
	run := a.pages[from : from+n]
	what := c.rng.IntN(100)
	if c.spec.ForkOften && c.rng.IntN(4) == 0 {
		what = 96
	}
	c.doing = fmt.Sprintf("op %d on %#x+%d pages", what, addr, n)
	zero := func(ps []pageState) {
		for i := range ps {
			ps[i] = pageState{wipe: ps[i].wipe}
		}
	}
	if what >= 66 && what < 88 || what == 95 {
		if ok, err := whole(addr, size); !ok || err != nil {
			return err
		}
	}
	switch {
	case what < 30:
		return c.check(a, from, n)
	case what < 45: // write without having read
		for i := range run {
			p := &run[i]
			if p.patch == 0 { // a page remembers one patched word
				p.at = uint16(c.rng.IntN(page / 8))
			}
			p.patch = c.rng.Uint64() | 1
			*(*uint64)(pointer(addr + uint64(i)*page + 8*uint64(p.at))) = p.patch
			if p.kind == zeroKind || c.rng.IntN(2) == 0 {
				continue
			}
			*p = pageState{kind: writtenKind, value: c.rng.Uint64(), wipe: p.wipe}
			fillPage(unsafe.Slice((*byte)(pointer(addr+uint64(i)*page)), page), p.value)
		}
		return c.check(a, from, n)
	case what < 58:
		zero(run)
		return madvise(addr, size, unix.MADV_DONTNEED)
	case what < 66:
		if len(c.areas) == 1 && n == len(a.pages) {
			return nil
		}
		c.remove(k, from, n)
		if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(addr), uintptr(size), 0); errno != 0 {
			return errno
		}
	case what < 76: // move to a reserved place
		to, err := mmap(0, size, unix.PROT_NONE, 0)
		if err != nil {
			return err
		}
		if _, err := mremap(addr, size, size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to); err != nil {
			return err
		}
		moved := append([]pageState{}, run...)
		c.remove(k, from, n)
		c.areas = append(c.areas, area{to, moved})
	case what < 84: // grow: moves where the kernel likes, unless there is room
		to, err := mremap(addr, size, size+page, unix.MREMAP_MAYMOVE, 0)
		if err != nil {
			return err
		}
		moved := append(append([]pageState{}, run...), pageState{wipe: run[0].wipe})
		c.remove(k, from, n)
		c.areas = append(c.areas, area{to, moved})
	case what < 88: // move, and leave an empty mapping behind
		const dontUnmap = 4
		to, err := mremap(addr, size, size, unix.MREMAP_MAYMOVE|dontUnmap, 0)
		if err != nil {
			return err
		}
		c.areas = append(c.areas, area{to, append([]pageState{}, run...)})
		zero(c.areas[k].pages[from : from+n])
	case what < 92: // map anew over it
		clear(run)
		return mapAt(addr, size, unix.MAP_FIXED)
	case what < 95: // split the mapping for a while
		for _, prot := range []uintptr{unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE} {
			if _, _, errno := unix.Syscall(unix.SYS_MPROTECT, uintptr(addr), uintptr(size), prot); errno != 0 {
				return errno
			}
			if err := c.check(a, from, min(n, 4)); err != nil {
				return err
			}
		}
	case what < 96: // shrink
		if n > 1 {
			if _, err := mremap(addr, size, page, unix.MREMAP_MAYMOVE, 0); err != nil {
				return err
			}
			c.remove(k, from+1, n-1)
		}
	default:
		return c.fork(what == 99)
	}
	return nil
}

// whole reports whether the run lies in one mapping: the kernel refuses to move
// others, and from 6.17 on may have moved a part of them by then.
func whole(addr, size uint64) (bool, error) {
	raw, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(raw)) {
		from, rest, _ := strings.Cut(line, "-")
		to, _, _ := strings.Cut(rest, " ")
		start, err := strconv.ParseUint(from, 16, 64)
		if err != nil {
			return false, err
		}
		end, err := strconv.ParseUint(to, 16, 64)
		if err != nil {
			return false, err
		}
		if addr >= start && addr < end {
			return addr+size <= end, nil
		}
	}
	return false, fmt.Errorf("%#x is not mapped", addr)
}

// remove takes n pages out of area k.
func (c *chaos) remove(k, from, n int) {
	a := c.areas[k]
	c.areas = append(c.areas[:k], c.areas[k+1:]...)
	for _, piece := range []area{{a.addr, a.pages[:from]}, {a.addr + uint64(from+n)*page, a.pages[from+n:]}} {
		if len(piece.pages) > 0 {
			c.areas = append(c.areas, area{piece.addr, append([]pageState{}, piece.pages...)})
		}
	}
}

// fork makes a child that checks all that this thread owns, in its own order.
func (c *chaos) fork(program bool) error {
	c.doing = "fork"
	views := make([]area, len(c.areas))
	for i, a := range c.areas {
		views[i] = area{a.addr, append([]pageState{}, a.pages...)}
		for j, p := range a.pages {
			if p.wipe {
				views[i].pages[j] = pageState{}
			}
		}
	}
	path, argv := []byte("/bin/true\x00"), []*byte{nil, nil}
	argv[0] = &path[0]
	then := checking
	if program {
		then = executing
	}
	pid := rawFork(views, then, &path[0], &argv[0])
	if pid < 0 {
		return fmt.Errorf("fork: errno %d", -pid)
	}
	var ws syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != syscall.EINTR {
			if err != nil {
				return err
			}
			break
		}
	}
	if !ws.Exited() || ws.ExitStatus() != 0 {
		return fmt.Errorf("child %d: status %#x", pid, ws)
	}
	return nil
}

// what a forked child does.
const (
	checking = iota
	executing
	waiting
)

// rawFork forks without telling the Go runtime: the child does nothing that
// needs it.
//
//go:nosplit
//go:norace
//go:noinline
func rawFork(areas []area, then int, path *byte, argv **byte) int {
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return -int(errno)
	}
	if pid != 0 {
		return int(pid)
	}
	code := uintptr(0)
	for then == waiting {
		syscall.RawSyscall6(syscall.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
	}
	if then == executing {
		syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(argv)), 0)
		code = 3
	}
	for i := len(areas) - 1; i >= 0; i-- {
		for j := len(areas[i].pages) - 1; j >= 0; j-- {
			if verify(areas[i].addr+uint64(j)*page, &areas[i].pages[j]) != 0 {
				code = 2
			}
		}
	}
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, code, 0, 0)
	}
}
