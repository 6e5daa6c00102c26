package leak

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// ---- mounts ------------------------------------------------------------------

// mount is a line of mountinfo (proc_pid_mountinfo(5)).
type mount struct{ root, at, fstype, source string }

func parseMountinfo(raw []byte) ([]mount, error) {
	var all []mount
	for line := range strings.Lines(string(raw)) {
		// Optional fields end with " - ".
		left, right, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 2 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		all = append(all, mount{root: unescape(l[3]), at: unescape(l[4]), fstype: r[0], source: unescape(r[1])})
	}
	return all, nil
}

// unescape undoes mountinfo's octal escapes of blanks and backslashes.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

func (s *Snapshot) mounts(spaces netspaces) error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	all, err := parseMountinfo(raw)
	if err != nil {
		return err
	}
	for _, m := range all {
		if !oursBelowTmp(m.at) {
			continue
		}
		if m.fstype == "nsfs" {
			spaces.hold(m.root, "mount at "+m.at, m.at)
			s.add(Mount, "namespace at "+m.at, m.root)
			continue
		}
		s.add(Mount, fmt.Sprintf("%s at %s", m.fstype, m.at), "of "+m.source)
		if m.fstype == "tmpfs" {
			var st unix.Statfs_t
			if err := unix.Statfs(m.at, &st); err != nil {
				continue // hidden below another mount
			}
			s.TmpfsBytes[m.at] = int64(st.Blocks-st.Bfree) * st.Bsize
		}
	}
	return nil
}

// ---- cgroups -----------------------------------------------------------------

// cgroups lists every cgroup once, however many hierarchies have it. A frozen
// one has another key: that is how a frozen shard is told from a running one.
func (s *Snapshot) cgroups(root string) error {
	found := map[string][]string{} // path -> hierarchies
	frozen := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		hierarchy, group := "unified", "/"+rel
		if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
			// v1 and hybrid: the first level are the hierarchies
			first, rest, _ := strings.Cut(rel, "/")
			if rest == "" {
				return nil
			}
			hierarchy, group = first, "/"+rest
		}
		if group == "/" {
			return nil
		}
		found[group] = append(found[group], hierarchy)
		for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
			raw, err := os.ReadFile(filepath.Join(path, file))
			if err == nil && strings.TrimSpace(string(raw)) != value {
				frozen[group] = true
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for group, hierarchies := range found {
		key := group
		if frozen[group] {
			key += " (frozen)"
		}
		slices.Sort(hierarchies)
		s.add(Cgroup, key, "in "+strings.Join(hierarchies, ", "))
	}
	return nil
}

// ---- networks ----------------------------------------------------------------

// networks looks into every network namespace that anybody holds.
func (s *Snapshot) networks(ctx context.Context, spaces netspaces) error {
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	spaces.hold(here, "this host", "/proc/self/ns/net")
	for _, inode := range slices.Sorted(maps.Keys(spaces)) {
		ns := spaces[inode]
		slices.Sort(ns.holders)
		name := strings.Join(ns.holders, ", ")
		if here == fmt.Sprintf("net:[%d]", inode) {
			name = "the host's own" // its holders are all processes of the host
		} else {
			s.add(Netns, "held by "+name, fmt.Sprintf("net:[%d]", inode))
		}
		if err := s.network(ctx, ns.enter, name); err != nil {
			if _, statErr := os.Stat(ns.enter); statErr != nil {
				continue // it went away with its holder
			}
			return fmt.Errorf("namespace held by %s: %w", name, err)
		}
	}
	return nil
}

// network lists links and nft objects in the namespace at enter.
func (s *Snapshot) network(ctx context.Context, enter, name string) error {
	out, err := inNamespace(ctx, enter, "ip", "-json", "-details", "link", "show")
	if err != nil {
		return err
	}
	var links []struct {
		Name     string   `json:"ifname"`
		Master   string   `json:"master"`
		State    string   `json:"operstate"`
		Flags    []string `json:"flags"`
		LinkInfo struct {
			Kind string `json:"info_kind"`
		} `json:"linkinfo"`
	}
	if err := json.Unmarshal(out, &links); err != nil {
		return fmt.Errorf("ip link: %w", err)
	}
	for _, l := range links {
		// A veth's name on the host is random; whose port it is, is not.
		key, kind := l.Name, l.LinkInfo.Kind
		if kind == "" {
			kind = "device"
		}
		if kind == "veth" && strings.HasPrefix(l.Name, "veth") {
			key = "veth…"
		}
		key = kind + " " + key
		if l.Master != "" {
			key += ", port of " + l.Master
		}
		if !slices.Contains(l.Flags, "UP") {
			key += ", down"
		}
		s.add(Link, key+" in the namespace of "+name, l.Name)
	}
	out, err = inNamespace(ctx, enter, "nft", "--json", "list", "ruleset")
	if err != nil {
		return err
	}
	objects, err := parseNft(out)
	if err != nil {
		return err
	}
	for _, o := range objects {
		s.add(Nft, o+" in the namespace of "+name, "")
	}
	return nil
}

// parseNft renders each object of a ruleset (libnftables-json(5)) as a key,
// without handles, which only count up.
func parseNft(raw []byte) ([]string, error) {
	var doc struct {
		Objects []map[string]map[string]any `json:"nftables"`
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("nft: %w", err)
	}
	var keys []string
	for _, o := range doc.Objects {
		for kind, fields := range o {
			if kind == "metainfo" {
				continue
			}
			delete(fields, "handle")
			body, err := json.Marshal(fields) // sorted by key
			if err != nil {
				return nil, err
			}
			keys = append(keys, kind+" "+string(body))
		}
	}
	return keys, nil
}

// inNamespace runs a program in a network namespace. Entering by a program of
// its own keeps this process's threads where they are.
func inNamespace(ctx context.Context, enter string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + enter, "--"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}
