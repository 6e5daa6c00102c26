package leak

import "regexp"

// Ignore is something that may come or go without being a leak.
type Ignore struct {
	Category Category
	Key      *regexp.Regexp // of the whole key
	Why      string
}

func ignored(ignores []Ignore, cat Category, key string) bool {
	for _, i := range ignores {
		if i.Category == cat && i.Key.MatchString(key) {
			return true
		}
	}
	return false
}

// ignore makes an Ignore whose pattern matches the whole key.
func ignore(cat Category, pattern, why string) Ignore {
	return Ignore{Category: cat, Key: regexp.MustCompile("^(?:" + pattern + ")$"), Why: why}
}

// Standing are the ignores for a host that has the same shards before and after,
// and may have met its first shard in between. Each is a thing that was looked
// into; nothing is here only to be quiet. Directories end with a slash, so a
// file in their place, or anything deeper, still counts.
var Standing = []Ignore{
	ignore(Cgroup, `/tranship(/[^/ ]+)?`, "parents of the shards' cgroups /tranship/NAMESPACE/NAME: made with the first shard, empty, kept; a frozen one has another key"),
	ignore(Link, `bridge tranship(0|-stage0)(, down)? in the namespace of the host's own`, "bridges: made with the first shard, and kept for the next one"),
	ignore(File, `/run/tranship/(netns|cni|cni/results|criu|criu/[^/]+)/`, "directories by namespace: made with the first shard, and kept"),
	ignore(File, `/var/lib/tranship/logs/([^/]+/)?`, "directories of logs by namespace: made with the first shard, and kept"),
	ignore(File, `/(run|var/lib)/containerd/io\.containerd\.runtime\.v2\.task/[^/]+/`, "containerd's directories by namespace, which it keeps"),
	ignore(File, `/run/containerd/runc/([^/]+/)?`, "runc's directories by namespace, which it keeps"),
	ignore(File, `/(run/netns|run/cni|var/lib/cni|run/containerd/fifo)/`, "directories that programs make at their first use, and keep"),
	ignore(Descriptor, `containerd: /var/lib/containerd/.*/metadata\.db`, "the snapshotter's database: opened at its first use, and kept open"),
	ignore(Descriptor, `containerd: /run/containerd/io\.containerd\.runtime\.vN\.task/.*/log`, "containerd reads each shim's log; it follows the shim, which counts as a process"),
}
