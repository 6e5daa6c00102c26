package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	serviceContainerd = "containerd"
	serviceDaemon     = "transhipd"
	serviceEtcd       = "etcd"

	containerdSocket = "/run/containerd/containerd.sock"
	daemonSocket     = "/run/tranship/tranship.sock"
	etcdPort         = 2379
)

// servicesFor lists what runs on a node, in order of dependence, and writes
// the configurations.
func servicesFor(p plan, node nodePlan, opts Options) ([]service, error) {
	if node.Role == roleClient {
		if !opts.Etcd {
			return nil, nil
		}
		url := fmt.Sprintf("http://%v:%d", node.Host.Addr(), etcdPort)
		data := filepath.Join(nodeDir(node.Name), "etcd")
		return []service{{Name: serviceEtcd, Args: []string{
			"etcd", "--data-dir", data, "--listen-client-urls", url, "--advertise-client-urls", url,
			"--listen-peer-urls", "http://127.0.0.1:2380",
		}}}, nil
	}
	major, err := containerdMajor()
	if err != nil {
		return nil, err
	}
	config := containerdConfig(major)
	path := filepath.Join(nodeDir(node.Name), "containerd.toml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	services := []service{{Name: serviceContainerd, Args: []string{"containerd", "--config", path}, Config: config}}
	if opts.NoDaemon {
		return services, nil
	}
	binary := filepath.Join(opts.BinDir, "transhipd")
	info, err := os.Stat(binary)
	if err != nil {
		return nil, err
	}
	config = daemonConfig(p, node)
	path = filepath.Join(nodeDir(node.Name), "etc-tranship", "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, err
	}
	return append(services, service{
		Name: serviceDaemon,
		Args: []string{binary, "--config", "/etc/tranship/config.toml"},
		// A new build is started like a new configuration.
		Config: fmt.Sprintf("# build of %v, %d bytes\n%s", info.ModTime(), info.Size(), config),
	}), nil
}

var versionPattern = regexp.MustCompile(`\bv?(\d+)\.\d+\.\d+`)

// containerdMajor asks the installed containerd for its major version.
func containerdMajor() (int, error) {
	out, err := exec.Command("containerd", "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("containerd (`make setup` installs it): %w", err)
	}
	return parseContainerdMajor(string(out))
}

func parseContainerdMajor(out string) (int, error) {
	m := versionPattern.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("containerd says %q, in which no version is to be found", out)
	}
	return strconv.Atoi(m[1])
}

// containerdConfig is a stock containerd without what a lab host does not
// have: Kubernetes' interface, and file systems other than overlayfs.
func containerdConfig(major int) string {
	format, disabled := 2, []string{"io.containerd.grpc.v1.cri"}
	if major >= 2 {
		format = 3
		disabled = append(disabled, "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri")
	}
	for _, name := range []string{"aufs", "btrfs", "devmapper", "zfs", "blockfile", "erofs"} {
		disabled = append(disabled, "io.containerd.snapshotter.v1."+name)
	}
	// Writes to /opt, which is the machine's.
	disabled = append(disabled, "io.containerd.internal.v1.opt")
	var b strings.Builder
	fmt.Fprintf(&b, "version = %d\n", format)
	fmt.Fprintf(&b, "root = %q\nstate = %q\n", "/var/lib/containerd", "/run/containerd")
	b.WriteString("disabled_plugins = [\n")
	for _, id := range disabled {
		fmt.Fprintf(&b, "  %q,\n", id)
	}
	fmt.Fprintf(&b, "]\n\n[grpc]\naddress = %q\n", containerdSocket)
	return b.String()
}

// daemonConfig is transhipd's configuration on a host: all other hosts are its
// peers.
func daemonConfig(p plan, node nodePlan) string {
	var b strings.Builder
	fmt.Fprintf(&b, "node = %q\n\n", node.Name)
	fmt.Fprintf(&b, "[peer]\nlisten = %q\n\n", peerAddress(node))
	fmt.Fprintf(&b, "[network]\nbridge = %q\nsubnet = %q\npool = %q\n\n", hostBridge, node.Shard.Masked(), node.pool())
	fmt.Fprintf(&b, "[metrics]\nlisten = %q\n", "127.0.0.1:9464")
	for _, other := range p.nodes {
		if other.Role == roleHost && other.Name != node.Name {
			fmt.Fprintf(&b, "\n[[peers]]\nname = %q\naddress = %q\n", other.Name, peerAddress(other))
		}
	}
	return b.String()
}

// peerPort is UDP's, for QUIC: the HTTPS alternative's number.
const peerPort = 7443

func peerAddress(n nodePlan) string {
	return net.JoinHostPort(n.Host.Addr().String(), strconv.Itoa(peerPort))
}

// writeNodeFiles makes a node's directory with what its mounts come from.
func writeNodeFiles(p plan, node nodePlan) error {
	dir := nodeDir(node.Name)
	for _, sub := range []string{"etc-tranship", "var-lib-tranship", "var-lib-containerd"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return fmt.Errorf("the host's files: %w", err)
		}
	}
	if err := makeMountPoints(); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "hostname"), []byte(node.Name+"\n"), 0o644); err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	for _, n := range p.nodes {
		if n.Host.IsValid() {
			hosts += n.Host.Addr().String() + " " + n.Name + "\n"
		}
	}
	// Written in place: the running host has this very file mounted.
	return os.WriteFile(filepath.Join(dir, "hosts"), []byte(hosts), 0o644)
}

// crashLoop is how many ends without an answer are enough to give up before the
// deadline: the first start may meet a leftover that the second does not.
const crashLoop = 3

// crashes counts how often a service ended since it is waited for. What it was
// killed before is not its fault.
type crashes struct {
	seen  bool
	first int // start that was under way when it was looked at first
}

// loop takes a service's count of starts and says how often it ended, and whether
// that is often enough.
func (c *crashes) loop(starts int) (ended int, enough bool) {
	if !c.seen {
		c.seen, c.first = true, starts
	}
	ended = starts - c.first
	return ended, ended >= crashLoop
}

// awaitService waits until a service answers on its socket.
func awaitService(ctx context.Context, rec nodeRecord, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyDeadline, fmt.Errorf("%s does not answer within %v", name, readyDeadline))
	defer cancel()
	logPath := filepath.Join(nodeDir(rec.Name), name+".log")
	var fatal error
	var count crashes
	err := poll(ctx, func() (bool, error) {
		reason := probe(ctx, rec, name)
		if reason == nil {
			return true, nil
		}
		if !rec.alive() {
			fatal = errors.New("the host's init ended")
			return true, nil
		}
		if st, err := serviceOf(ctx, rec.Name, name); err == nil {
			if ended, enough := count.loop(st.Starts); enough {
				fatal = fmt.Errorf("%s ended %d times", name, ended)
				return true, nil
			}
		}
		return false, reason
	})
	if err == nil {
		err = fatal
	}
	if err != nil {
		return withLog(err, logPath)
	}
	return nil
}

func serviceOf(ctx context.Context, node, name string) (serviceState, error) {
	ans, err := call(ctx, node, request{Op: opStatus})
	if err != nil {
		return serviceState{}, err
	}
	for _, st := range ans.Services {
		if st.Name == name {
			return st, nil
		}
	}
	return serviceState{}, fmt.Errorf("no %s on %s", name, node)
}

// probe asks a service for any answer at all. Sockets in a host's own /run are
// reached through its init's root directory.
func probe(ctx context.Context, rec nodeRecord, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	root := fmt.Sprintf("/proc/%d/root", rec.PID)
	switch name {
	case serviceContainerd:
		return probeContainerd(ctx, root+containerdSocket)
	case serviceDaemon:
		return probeHTTP(ctx, root+daemonSocket)
	case serviceEtcd:
		return probeListener(rec.PID, etcdPort)
	}
	return fmt.Errorf("no way to ask %s is known", name)
}

// probeListener wants a TCP listener in the host's network namespace, where
// this process is not; proc_net_tcp(5) shows it: local address in hexadecimal,
// state 0A.
func probeListener(pid, port int) error {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		return err
	}
	suffix := fmt.Sprintf(":%04X", port)
	for _, line := range strings.Split(string(raw), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 3 && strings.HasSuffix(fields[1], suffix) && fields[3] == "0A" {
			return nil
		}
	}
	return fmt.Errorf("nothing listens on port %d", port)
}

// probeHTTP wants one HTTP response, whatever its status.
func probeHTTP(ctx context.Context, socket string) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://transhipd/", nil)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}
