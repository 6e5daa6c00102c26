package track

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The ABI of userfaultfd, include/uapi/linux/userfaultfd.h.
const (
	ioctlUffdAPI          = 0xc018aa3f // _IOWR(0xAA, 0x3F, struct uffdio_api)
	ioctlUffdRegister     = 0xc020aa00 // _IOWR(0xAA, 0x00, struct uffdio_register)
	ioctlUffdWriteProtect = 0xc018aa06 // _IOWR(0xAA, 0x06, struct uffdio_writeprotect)

	uffdAPI            = 0xaa
	featureUnpopulated = 1 << 13 // UFFD_FEATURE_WP_UNPOPULATED: Linux 6.4
	featureAsync       = 1 << 15 // UFFD_FEATURE_WP_ASYNC: Linux 6.7
	registerModeWP     = 1 << 1
	writeProtectModeWP = 1 << 0
)

// userfault is a userfaultfd of another process, set up for asynchronous
// write-protection: a write to a protected page is let through by the kernel,
// which only takes the protection off. Nobody has to answer anything, so nothing
// happens to the process when the descriptor is closed, in whatever way.
type userfault struct{ fd int }

func (u *userfault) handshake() error {
	arg := struct{ api, features, ioctls uint64 }{api: uffdAPI, features: featureAsync | featureUnpopulated}
	if err := u.ioctl(ioctlUffdAPI, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("asynchronous write-protection: %w", err)
	}
	return nil
}

// register makes write-protection possible in all mappings of a range. It is
// idempotent.
func (u *userfault) register(start, end uint64) error {
	arg := struct{ start, length, mode, ioctls uint64 }{start: start, length: end - start, mode: registerModeWP}
	return u.ioctl(ioctlUffdRegister, unsafe.Pointer(&arg))
}

// protect arms, or disarms, all pages of a range.
func (u *userfault) protect(start, end uint64, on bool) error {
	arg := struct{ start, length, mode uint64 }{start: start, length: end - start}
	if on {
		arg.mode = writeProtectModeWP
	}
	return u.ioctl(ioctlUffdWriteProtect, unsafe.Pointer(&arg))
}

func (u *userfault) ioctl(request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(u.fd), request, uintptr(arg))
	runtime.KeepAlive(u)
	if errno != 0 {
		return procError(errno)
	}
	return nil
}

func (u *userfault) Close() error { return unix.Close(u.fd) }

// uffdMethod tracks by write-protection.
//
// It trusts a page's state only in a mapping that the kernel says is registered
// now, and it protects and reports whatever it registers. Mappings lose their
// registration when they move, when they are replaced and when they are copied
// by fork, and new ones have none; so all that needs no attention of its own.
// A moved page may keep a stale mark up to Linux 6.12, which is why protecting
// is explicit.
type uffdMethod struct{ log *slog.Logger }

func (*uffdMethod) kind() Kind { return UffdWP }

func (m *uffdMethod) prepare(c *collection) ([]region, error) {
	if c.frozen {
		return m.asFound(c)
	}
	fresh := c.p.uffd == nil
	if !fresh {
		// Memory that the process registers in the same way looks as if it were
		// ours. CRIU refuses such a process, whatever it uses the descriptor for.
		if c.files.userfaultfd {
			return nil, &ProcessError{Process: c.p.Process, Op: "look at its files", Err: ErrForeignUserfaultfd}
		}
		if err := m.sweep(c); err != nil {
			return nil, err
		}
		regions, known, err := m.inspect(c)
		if err != nil {
			return nil, err
		}
		if known {
			return m.register(c, regions, false)
		}
		// Nothing of what was registered is there: the process executed another
		// program.
		if err := errors.Join(m.release(c.p), c.pages.Close()); err != nil {
			return nil, err
		}
		c.pages = nil
	}
	if err := m.obtain(c); err != nil {
		if !errors.Is(err, errBusy) {
			return nil, err
		}
		m.log.Debug("the process could not be stopped and is sent in full", "pid", c.p.HostPID, "err", err)
		c.stats.Untracked++
		if err := c.open(); err != nil {
			return nil, err
		}
		return c.untracked()
	}
	if err := c.open(); err != nil {
		return nil, err
	}
	regions, err := c.untracked()
	if err != nil {
		return nil, err
	}
	return m.register(c, regions, true)
}

// asFound lists the regions of a frozen process with what is registered there.
func (m *uffdMethod) asFound(c *collection) ([]region, error) {
	if c.p.uffd == nil {
		if err := c.open(); err != nil {
			return nil, err
		}
		return c.untracked()
	}
	regions, _, err := m.inspect(c)
	return regions, err
}

// inspect lists the regions of a known process, full where nothing is
// registered, and says whether anything is.
func (m *uffdMethod) inspect(c *collection) (regions []region, known bool, err error) {
	if err := c.open(); err != nil {
		return nil, false, err
	}
	if regions, err = c.untracked(); err != nil {
		return nil, false, err
	}
	for i := range regions {
		tracked, err := c.pages.tracked(regions[i].start)
		if err != nil {
			return nil, false, err
		}
		regions[i].full = !tracked
		known = known || tracked
	}
	return regions, known, nil
}

// obtain gets a userfaultfd for a process that has none yet.
func (m *uffdMethod) obtain(c *collection) error {
	fault := func(op string, err error) error {
		if errors.Is(err, errGone) || errors.Is(err, errBusy) {
			return err
		}
		return &ProcessError{Process: c.p.Process, Op: op, Err: err}
	}
	var ours []int
	for _, p := range c.t.shards {
		if p.uffd != nil {
			ours = append(ours, p.uffd.fd)
		}
	}
	if c.files.userfaultfd {
		if _, err := closeInherited(c.p.HostPID, ours); err != nil {
			return fault("close an inherited descriptor", err)
		}
		if len(userfaultfds(c.p.HostPID)) > 0 {
			return fault("look at its files", ErrForeignUserfaultfd)
		}
	}
	began := bootTicks()
	fd, pause, err := injectUserfaultfd(c.p.HostPID)
	c.stats.Pause = max(c.stats.Pause, pause)
	if err != nil {
		return fault("create a userfaultfd", err)
	}
	u := &userfault{fd: fd}
	if err := u.handshake(); err != nil {
		return errors.Join(fault("set up the userfaultfd", err), u.Close())
	}
	c.p.uffd = u
	// A process with one thread could not fork while that was stopped.
	if st, err := readStat(fmt.Sprintf("/proc/%d/stat", c.p.HostPID)); err == nil && st.threads > 1 {
		c.p.forkedSince = began
	}
	return m.sweep(c)
}

// sweep looks for children that inherited the descriptor: as soon as it is
// obtained, and in later Collects for those that could not be seen yet, because
// fork copies the descriptors long before the child has a pid.
func (m *uffdMethod) sweep(c *collection) error {
	const forkTicks = 100 // 1 s, more than a fork takes on a busy host
	if c.p.forkedSince == 0 {
		return nil
	}
	last := bootTicks() > c.p.forkedSince+forkTicks
	if err := closeForked(c.p.uffd.fd, c.p.forkedSince); err != nil {
		return &ProcessError{Process: c.p.Process, Op: "close a descriptor that a child inherited", Err: err}
	}
	if last {
		c.p.forkedSince = 0
	}
	return nil
}

// register registers the regions that are not. It returns none for a process
// whose memory is registered as another one's.
func (m *uffdMethod) register(c *collection, regions []region, fresh bool) ([]region, error) {
	for i := range regions {
		r := &regions[i]
		// What is registered already must not be registered again as it is: a
		// mapping that came into the range since it was listed would count as
		// tracked without ever having been protected.
		if !r.full && !c.p.unfinished {
			continue
		}
		missing := r.full
		r.full = true
		switch err := c.p.uffd.register(r.start, r.end); {
		case err == nil:
		case errors.Is(err, errGone):
			// It executed another program since the descriptor was obtained: the
			// next Collect finds that nothing is registered.
			continue
		case errors.Is(err, unix.EBUSY):
			shares, err := m.sharesMemory(c)
			if err != nil {
				return nil, err
			}
			if shares && fresh {
				c.stats.Deferred++
				return nil, m.release(c.p)
			}
			return nil, errors.Join(&ProcessError{Process: c.p.Process, Op: "register its memory", Err: ErrForeignUserfaultfd}, m.release(c.p))
		default:
			// The mapping went away, or cannot be registered (droppable memory):
			// whatever is there is reported in full, each time.
			continue
		}
		// Registered in another memory than the one that c.pages shows, if the
		// process executed another program just now while a vfork child keeps the
		// old one.
		tracked, err := c.pages.tracked(r.start)
		if err != nil {
			return nil, err
		}
		r.protect = tracked
		if tracked && missing {
			c.stats.Registered++
		}
	}
	return regions, nil
}

// sharesMemory says whether another tracked process has the same memory, as
// between vfork and exec.
func (m *uffdMethod) sharesMemory(c *collection) (bool, error) {
	for _, p := range c.t.shards {
		if p == c.p || p.uffd == nil {
			continue
		}
		same, err := sameMemory(p.HostPID, c.p.HostPID)
		if err != nil && !errors.Is(err, errGone) {
			return false, err
		}
		if same {
			return true, nil
		}
	}
	return false, nil
}

func (m *uffdMethod) judge(c *collection, r region) (verdict, error) {
	w := c.window
	if r.full && !r.protect {
		return unknown, nil
	}
	if c.frozen {
		return m.verdict(w, c.pages.written(w, w.start, w.end, false))
	}
	// Only what is populated is armed. Arming an empty page leaves a marker in the
	// page tables, which grow by it, and which CRIU takes for a page in swap: it
	// would dump a sparse reservation in full. A page that comes to be populated
	// is not armed, and so counts as written.
	if err := c.pages.populated(w); err != nil {
		return unknown, err
	}
	for from, to := range runs(w.base, w.populated) {
		if r.full {
			err := c.p.uffd.protect(from, to, true)
			// Memory that was replaced since it was registered is not protected, and
			// is found unregistered the next time.
			if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, errGone) {
				return unknown, fmt.Errorf("write-protect %#x-%#x of process %d: %w", from, to, c.p.HostPID, err)
			}
			continue
		}
		if err := c.pages.written(w, from, to, true); err != nil {
			return m.verdict(w, err)
		}
	}
	if r.full {
		return unknown, nil
	}
	for range w.holes(c.p.sent) {
		return touched, nil // something went away
	}
	return m.verdict(w, nil)
}

// verdict is what the outcome of a look at written pages means.
func (*uffdMethod) verdict(w *window, err error) (verdict, error) {
	switch {
	case errors.Is(err, errNotTracked):
		return unknown, nil
	case err != nil:
		return unknown, err
	case anySet(w.written):
		return touched, nil
	}
	return untouched, nil
}

// release closes the descriptor; the kernel then unregisters what is left.
func (m *uffdMethod) release(p *process) error {
	if p.uffd == nil {
		return nil
	}
	err := p.uffd.Close()
	p.uffd, p.forkedSince = nil, 0
	return err
}

// disarm takes the protection off window by window before the descriptor is
// closed: the kernel does the same at its release, but all at once and with the
// process's memory locked, 20 ms for each GiB.
func (m *uffdMethod) disarm(p *process) error {
	if p.uffd == nil {
		return nil
	}
	return errors.Join(m.unprotect(p), m.release(p))
}

func (m *uffdMethod) unprotect(p *process) error {
	pages, err := openPagemap(p.HostPID, new(buffers), nil)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	mappings, err := readMaps(p.HostPID)
	for _, mapping := range mappings {
		tracked, trackedErr := pages.tracked(mapping.start)
		if trackedErr != nil || !tracked {
			continue // [vsyscall] lies outside of what can be looked at
		}
		chunkErr := pages.chunks(mapping.start, mapping.end, func(start, end uint64) error {
			unprotectErr := p.uffd.protect(start, end, false)
			if errors.Is(unprotectErr, unix.ENOENT) {
				return nil // replaced by a mapping that is not registered
			}
			return unprotectErr
		})
		err = errors.Join(err, chunkErr)
	}
	if err = errors.Join(err, pages.Close()); errors.Is(err, errGone) {
		return nil
	}
	return err
}
