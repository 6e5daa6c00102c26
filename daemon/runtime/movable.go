package runtime

import (
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Finding is one reason why a shard could not move, or a warning about what
// would not move with it.
type Finding struct {
	Code    string // stable, for programs
	Message string // what is wrong, naming the thing
	Advice  string // what to do next
	Warning bool   // does not refuse
}

// Movable says what keeps a shard from moving, judged by its record alone. It
// is pure: the hosts' own reasons (versions, room, names taken) are found by
// those who know them.
func Movable(rec *Record) []Finding {
	var f findings
	if ForeignNamespace(rec.Namespace) {
		f.warn("foreign-namespace", "move it only if its orchestrator does not watch it",
			"namespace %s belongs to another orchestrator, which may start the container again", rec.Namespace)
	}
	f.ofState(rec)
	f.ofRootfs(rec)
	spec, err := rec.OCISpec()
	if err != nil {
		return append(f, Finding{Code: "spec", Message: err.Error(), Advice: "create the container anew"})
	}
	f.ofNamespaces(spec)
	f.ofNetwork(rec, spec)
	f.ofMounts(rec, spec)
	f.ofDevices(spec)
	if h := spec.Hooks; h != nil && hooks(h) > 0 {
		f.refuse("hooks", "create the container without OCI hooks",
			"the container has OCI hooks, which would run again on the destination")
	}
	return f
}

func hooks(h *specs.Hooks) int {
	//lint:ignore SA1019 Prestart is deprecated, and still used by those who make containers
	n := len(h.Prestart) //nolint:staticcheck // the same to golangci-lint
	return n + len(h.CreateRuntime) + len(h.CreateContainer) + len(h.StartContainer) + len(h.Poststart) + len(h.Poststop)
}

type findings []Finding

func (f *findings) refuse(code, advice, format string, args ...any) {
	*f = append(*f, Finding{Code: code, Message: fmt.Sprintf(format, args...), Advice: advice})
}

func (f *findings) warn(code, advice, format string, args ...any) {
	*f = append(*f, Finding{Code: code, Message: fmt.Sprintf(format, args...), Advice: advice, Warning: true})
}

func (f *findings) ofState(rec *Record) {
	if id := rec.Labels[LabelIncoming]; id != "" {
		f.refuse("incoming", "wait for it: tranship migrations "+id, "migration %s is still bringing the shard here", id)
	}
	switch rec.Status {
	case StatusRunning:
	case StatusPaused:
		f.refuse("paused", "resume it, or wait for who paused it", "the shard is paused")
	default:
		f.refuse("not-running", "start it, or run it on the destination", "the shard is %s: there is no process to move", rec.Status)
	}
	if rec.IO.Terminal {
		f.refuse("terminal", "run it without -t", "the shard has a terminal, which cannot leave the host")
	}
	if rec.IO.Stdin != "" {
		// Every detached container of ctr has one, and hardly any reads it.
		f.warn("stdin", "run it without standard input (ctr run --null-io) if it reads it",
			"the shard's standard input is a fifo of this host: on the destination it reads as empty")
	}
	if rec.Runtime.Name != "io.containerd.runc.v2" {
		f.refuse("runtime", "run it with io.containerd.runc.v2", "runtime %s cannot restore a checkpoint of runc's", rec.Runtime.Name)
	}
}

func (f *findings) ofRootfs(rec *Record) {
	switch {
	case rec.Snapshot.Key == "":
		f.refuse("rootfs", "run it from an image", "the root file system is a directory of this host, not a snapshot")
	case rec.Snapshot.Snapshotter != "overlayfs":
		f.refuse("snapshotter", "run it with the overlayfs snapshotter",
			"snapshotter %s does not tell what the shard wrote from its image", rec.Snapshot.Snapshotter)
	case rec.Image.Problem != "":
		f.refuse("image", "pull the image that the container was made from, or run it anew", "%s", rec.Image.Problem)
	}
}

// ofNamespaces: what a shard shares with the host's processes has no
// counterpart on another host.
func (f *findings) ofNamespaces(spec *specs.Spec) {
	have := map[specs.LinuxNamespaceType]string{}
	own := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range spec.Linux.Namespaces {
		have[ns.Type] = ns.Path
		own[ns.Type] = ns.Path == ""
	}
	for _, kind := range []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.MountNamespace} {
		switch {
		case own[kind]:
		case have[kind] != "":
			f.refuse(string(kind)+"-namespace", "run it in namespaces of its own", "it shares the %s namespace %s", kind, have[kind])
		default:
			f.refuse(string(kind)+"-namespace", "run it in namespaces of its own", "it shares the host's %s namespace", kind)
		}
	}
	if _, ok := have[specs.UserNamespace]; ok || len(spec.Linux.UIDMappings) > 0 {
		f.refuse("user-namespace", "run it without a user namespace", "it has a user namespace, whose mappings cannot be moved yet")
	}
	if path := have[specs.UTSNamespace]; path != "" {
		f.refuse("uts-namespace", "run it in namespaces of its own", "it shares the uts namespace %s", path)
	}
}

func (f *findings) ofNetwork(rec *Record, spec *specs.Spec) {
	switch rec.Network.Kind {
	case NetworkHost:
		f.warn("host-network", "run it with --net shard to take address and connections along",
			"it uses the host's network: its address and TCP connections stay behind")
	case NetworkNetns:
		f.warn("external-netns", "make the same namespace on the destination, or run it with --net shard",
			"network namespace %s is somebody else's: it must exist on the destination too", rec.Network.Path)
	}
	if rec.Network.Kind == NetworkHost || rec.Network.Kind == NetworkNetns {
		return
	}
	for key := range spec.Linux.Sysctl {
		if strings.HasPrefix(key, "net.") {
			f.refuse("sysctl", "run it without sysctls of the network", "sysctl %s belongs to the network namespace, which is made anew", key)
		}
	}
	if c := spec.Process.Capabilities; c != nil && slices.Contains(c.Effective, "CAP_NET_ADMIN") {
		f.warn("net-admin", "drop CAP_NET_ADMIN if it is not needed",
			"it may change its network; routes and firewall rules that it made do not move")
	}
}

// movableMounts are file systems that CRIU makes anew, with their content where
// they have one of their own.
var movableMounts = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}

func (f *findings) ofMounts(rec *Record, spec *specs.Spec) {
	policy := map[string]MountPolicy{}
	for _, m := range rec.Mounts {
		policy[m.Destination] = m.Policy
	}
	for _, m := range spec.Mounts {
		switch {
		case isBind(m) && policy[m.Destination] == "" && slices.Contains(hostFiles, m.Source):
			f.warn("host-file", "nothing, if the shard does not depend on the source's", "bind mount %s is the destination's own %s after the move", m.Destination, m.Source)
		case isBind(m):
			if policy[m.Destination] == "" {
				f.refuse("mount-policy", "run it with --mount …,policy=shared if every host has the same content there, or policy=copy",
					"bind mount %s of the host's %s has no policy: nobody said what is there on the destination", m.Destination, m.Source)
			}
		case !slices.Contains(movableMounts, m.Type):
			f.refuse("mount-type", "run it without this mount", "file system %s at %s cannot be moved", m.Type, m.Destination)
		}
	}
}

// hostFiles are on every host, and meant to be each host's own: `ctr run
// --net-host` mounts the first two.
var hostFiles = []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/localtime"}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// defaultDevices are those that every container has (OCI runtime-spec,
// config-linux.md), so that listing them changes nothing.
var defaultDevices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/console"}

func (f *findings) ofDevices(spec *specs.Spec) {
	for _, d := range spec.Linux.Devices {
		if !slices.Contains(defaultDevices, d.Path) {
			f.refuse("device", "run it without the device", "device %s belongs to this host", d.Path)
		}
	}
}
