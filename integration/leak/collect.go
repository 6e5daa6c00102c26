package leak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const helperVerb = "leak-inventory"

// ServeHelper prints the inventory and exits if this process was started by
// Take. A test binary calls it first thing in TestMain.
func ServeHelper() {
	if len(os.Args) < 2 || os.Args[1] != helperVerb {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := Collect(ctx)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "inventory:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Collect takes the inventory of the host that this process is in. It needs root.
func Collect(ctx context.Context) (Snapshot, error) {
	s := Snapshot{SchemaVersion: SchemaVersion, Items: map[Category][]Item{}, TmpfsBytes: map[string]int64{}}
	var err error
	if s.Host, err = os.Hostname(); err != nil {
		return s, err
	}
	objects := bpfObjects{}
	spaces, err := s.processes(objects)
	if err != nil {
		return s, fmt.Errorf("processes: %w", err)
	}
	if err := s.bpf(objects); err != nil {
		return s, fmt.Errorf("BPF objects: %w", err)
	}
	if err := s.mounts(spaces); err != nil {
		return s, fmt.Errorf("mounts: %w", err)
	}
	if err := s.cgroups(cgroupRoot); err != nil {
		return s, fmt.Errorf("cgroups: %w", err)
	}
	if err := s.networks(ctx, spaces); err != nil {
		return s, fmt.Errorf("networks: %w", err)
	}
	if err := s.containerd(ctx); err != nil {
		return s, fmt.Errorf("containerd: %w", err)
	}
	if err := s.files("/"); err != nil {
		return s, fmt.Errorf("files: %w", err)
	}
	return s, nil
}

func (s *Snapshot) add(cat Category, key, detail string) {
	s.Items[cat] = append(s.Items[cat], Item{Key: key, Detail: detail})
}

// netspaces collects who holds which network namespace, by inode.
type netspaces map[uint64]*netspace

type netspace struct {
	holders []string // keys: what holds it
	enter   string   // a path by which it can be entered
}

func (n netspaces) hold(link, holder, enter string) {
	var inode uint64
	if _, err := fmt.Sscanf(link, "net:[%d]", &inode); err != nil {
		return
	}
	ns := n[inode]
	if ns == nil {
		ns = &netspace{enter: enter}
		n[inode] = ns
	}
	if !slices.Contains(ns.holders, holder) {
		ns.holders = append(ns.holders, holder)
	}
}

// processes lists processes, their descriptors, and the network namespaces that
// they are in or hold. What ends while it is looked at is skipped.
func (s *Snapshot) processes(objects bpfObjects) (netspaces, error) {
	spaces := netspaces{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	own, err := ancestry()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || own[pid] {
			continue
		}
		st, err := readStat(pid)
		if gone(err) || err == nil && st.kernel {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.add(Process, st.key(), fmt.Sprintf("pid %d", pid))
		dir := filepath.Join("/proc", e.Name())
		if link, err := os.Readlink(dir + "/ns/net"); err == nil {
			spaces.hold(link, "process "+st.name, dir+"/ns/net")
		}
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			if gone(err) {
				continue
			}
			return nil, err
		}
		for _, fd := range fds {
			path := dir + "/fd/" + fd.Name()
			link, err := os.Readlink(path)
			if err != nil {
				continue // closed meanwhile
			}
			if strings.HasPrefix(link, "anon_inode:bpf") {
				if err := objects.note(e.Name(), fd.Name(), st.name, ""); err != nil {
					return nil, err
				}
			}
			s.descriptor(st, pid, link)
			spaces.hold(link, "descriptor of "+st.name, path)
		}
	}
	return spaces, nil
}

// descriptor notes a userfaultfd of anybody, and what the daemons hold. Of the
// latter sockets, pipes and the event loop's own are left out: they follow
// connections to peers, which live on between migrations. BPF objects are counted
// by what they are (bpf.go), not by who holds them how often.
func (s *Snapshot) descriptor(st stat, pid int, link string) {
	at := fmt.Sprintf("pid %d", pid)
	if link == "anon_inode:[userfaultfd]" {
		s.add(Uffd, "held by "+st.name, at)
		return
	}
	if st.name != "transhipd" && st.name != "containerd" {
		return
	}
	for _, prefix := range []string{"socket:", "pipe:", "anon_inode:[event", "anon_inode:[timerfd]", "anon_inode:bpf", "anon_inode:btf", "/dev/"} {
		if strings.HasPrefix(link, prefix) {
			return
		}
	}
	s.add(Descriptor, st.name+": "+withoutNumbers(link), at)
}

var (
	longNumber = regexp.MustCompile(`[0-9]+`)
	hexName    = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{12,64}`)
)

// withoutNumbers makes names equal that differ in an id only.
func withoutNumbers(s string) string {
	return longNumber.ReplaceAllString(hexName.ReplaceAllString(s, "ID"), "N")
}

// stat is what matters of /proc/PID.
type stat struct {
	name   string // comm
	args   string
	state  string // as in /proc/PID/status: R, S, D, T, t, Z …
	parent int
	kernel bool
	tracer int
}

// key of a process is what it is, and what is odd about it: a traced, stopped or
// dead process is another thing than a running one.
func (st stat) key() string {
	key := st.args
	if key == "" {
		key = "[" + st.name + "]"
	}
	switch st.state {
	case "T":
		key += " (stopped)"
	case "t":
		key += " (stopped by a tracer)"
	case "Z", "X":
		key += " (dead, not waited for)"
	}
	if st.tracer != 0 {
		key += " (traced)"
	}
	return key
}

func readStat(pid int) (stat, error) {
	var st stat
	dir := fmt.Sprintf("/proc/%d", pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return st, err
	}
	kthread := false
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch name {
		case "Name":
			st.name = value
		case "State":
			st.state, _, _ = strings.Cut(value, " ")
		case "PPid":
			st.parent, err = strconv.Atoi(value)
		case "TracerPid":
			st.tracer, err = strconv.Atoi(value)
		case "Kthread": // since Linux 6.8
			kthread = value == "1"
		}
		if err != nil {
			return st, fmt.Errorf("%s/status: %s: %w", dir, name, err)
		}
	}
	raw, err := os.ReadFile(dir + "/cmdline")
	if err != nil {
		return st, err
	}
	st.args = strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " "))
	st.kernel = kthread || st.args == "" && st.state != "Z" && (pid == 2 || st.parent == 2)
	return st, nil
}

// ancestry is this process and what started it: they are the observer.
func ancestry() (map[int]bool, error) {
	own := map[int]bool{}
	for pid := os.Getpid(); pid > 1; {
		own[pid] = true
		st, err := readStat(pid)
		if gone(err) {
			break
		}
		if err != nil {
			return nil, err
		}
		pid = st.parent
	}
	return own, nil
}

// gone is the error of something that ended while it was read.
func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || err != nil && strings.Contains(err.Error(), "no such process")
}
