package lazypages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killInterval is how often the tasks' memory is asked whether it is gone, and
// stragglers are looked for. Their number is small and nothing else waits.
const killInterval = 5 * time.Millisecond

// stopTasks kills every task and what it forked, and returns when no address
// space with missing pages is left. Only then may their userfaultfds be closed:
// a process that is alive would read zeros from then on. There is no way out of
// it but that the processes die, or that ctx ends.
//
// A child's pid is not in its fork event, and a child whose event was read may
// come to life after its parent has died. Children are found as members of the
// shard's pid namespace, and for a shard without one as descendants, and as
// processes of a task's session and cgroup that have mappings registered for
// missing pages.
func (s *server) stopTasks(ctx context.Context) error {
	s.mu.Lock()
	families := s.families
	s.mu.Unlock()
	tasks := make([]Task, 0, len(families))
	for _, f := range families {
		tasks = append(tasks, f.task)
	}
	hunt, err := newHunt(tasks)
	if err != nil {
		s.cfg.Log.Warn("children of the tasks may not be found", "err", err)
	}
	tick := time.NewTicker(killInterval)
	defer tick.Stop()
	for {
		if err := hunt.kill(); err != nil {
			s.cfg.Log.Warn("kill the tasks", "err", err)
		}
		alive := 0
		for _, f := range families {
			for _, sp := range f.spaces {
				if sp.fd < 0 {
					continue
				}
				if out, err := s.probe.ask(sp.fd, neighbourhood); err != nil || out != gone {
					alive++
				}
			}
		}
		if alive == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d address spaces with missing pages are left: %w", alive, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// hunt kills processes and their relatives.
type hunt struct {
	pidfds     []int
	namespaces map[string]bool // pid namespaces that are the shard's own
	kin        map[kinship]bool
	victims    map[int]bool // host pids, as of the last look
}

// kinship is what a child keeps of its parent when it is an orphan.
type kinship struct {
	session string
	cgroup  string
}

func kinshipOf(pid int, stat []string) (kinship, bool) {
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return kinship{stat[3], string(cgroup)}, err == nil
}

func newHunt(tasks []Task) (*hunt, error) {
	h := &hunt{namespaces: map[string]bool{}, kin: map[kinship]bool{}, victims: map[int]bool{}}
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		err = fmt.Errorf("own pid namespace: %w", err)
	}
	for _, t := range tasks {
		if t.PIDFD < 0 {
			continue
		}
		h.pidfds = append(h.pidfds, t.PIDFD)
		// A number from a task that still lives is not anybody else's.
		if unix.PidfdSendSignal(t.PIDFD, 0, nil, 0) != nil {
			continue
		}
		h.victims[t.HostPID] = true
		ns, nsErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", t.HostPID))
		if nsErr == nil && err == nil && ns != own {
			h.namespaces[ns] = true
			continue
		}
		if stat, alive := statOf(t.HostPID); alive {
			if kin, ok := kinshipOf(t.HostPID, stat); ok {
				h.kin[kin] = true
			}
		}
	}
	return h, err
}

// kill looks for relatives first: the death of a parent hides its children.
func (h *hunt) kill() error {
	var errs []error
	if err := h.look(); err != nil {
		errs = append(errs, err)
	}
	for pid := range h.victims {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	for _, fd := range h.pidfds {
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill by pidfd: %w", err))
		}
	}
	return errors.Join(errs...)
}

// look replaces victims by those of them that are alive and their relatives.
func (h *hunt) look() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("look for children: %w", err)
	}
	children := map[int][]int{}
	found := map[int]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, alive := statOf(pid)
		if !alive {
			continue
		}
		if parent, err := strconv.Atoi(stat[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
		if h.victims[pid] || h.isRelative(pid, stat) {
			found[pid] = true
		}
	}
	var add func(int)
	add = func(pid int) {
		for _, c := range children[pid] {
			if !found[c] {
				found[c] = true
				add(c)
			}
		}
	}
	for pid := range maps.Clone(found) {
		add(pid)
	}
	h.victims = found
	return nil
}

func (h *hunt) isRelative(pid int, stat []string) bool {
	if len(h.namespaces) > 0 {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil && h.namespaces[ns] {
			return true
		}
	}
	if len(h.kin) == 0 {
		return false
	}
	kin, ok := kinshipOf(pid, stat)
	return ok && h.kin[kin] && lacksPages(pid)
}

// lacksPages reports whether the process has a mapping that is registered for
// missing pages, "um" in smaps.
func lacksPages(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return false
	}
	for line := range bytes.Lines(raw) {
		if flags, ok := bytes.CutPrefix(line, []byte("VmFlags:")); ok && slices.Contains(strings.Fields(string(flags)), "um") {
			return true
		}
	}
	return false
}

// statOf returns the fields of /proc/PID/stat from the third on: state, parent,
// process group, session. Zombies are dead.
func statOf(pid int) (fields []string, alive bool) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, false
	}
	fields = strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	return fields, len(fields) > 3 && fields[0] != "Z" && fields[0] != "X"
}

// isMapped reports whether the process has a mapping at addr.
func isMapped(hostPID int, addr uint64) (bool, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", hostPID))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("mappings of process %d: %w", hostPID, err)
	}
	for line := range bytes.Lines(raw) {
		var s span
		if _, err := fmt.Sscanf(string(line), "%x-%x", &s.start, &s.end); err != nil {
			return false, fmt.Errorf("mappings of process %d: %q: %w", hostPID, line, err)
		}
		if addr >= s.start && addr < s.end {
			return true, nil
		}
	}
	return false, nil
}
