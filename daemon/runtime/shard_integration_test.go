//go:build integration

package runtime_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/vishvananda/netlink"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/testenv"
)

// ask connects to the shard and returns its count.
func ask(ip netip.Prefix, within time.Duration) (string, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(ip.Addr().String(), "7000"), within)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return "", err
	}
	return bufio.NewReader(c).ReadString('\n')
}

func netOf(s *runtime.Shard) runtime.ShardNet {
	return runtime.ShardNet{Namespace: s.Namespace, Name: s.Name, IP: s.Network.IP, MAC: s.Network.MAC}
}

func TestAShardRunsAnswersAndGoes(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	ctx := t.Context()
	s := h.run(t, runtime.RunSpec{
		Name: "web", IP: netip.MustParseAddr("10.89.1.7"), Memory: 64 << 20, CPUs: 0.5,
		Env: []string{"GREETING=hi"}, Labels: map[string]string{"tier": "front"},
	})
	if s.Status != runtime.StatusRunning || s.PID == 0 || s.Network.Kind != runtime.NetworkShard ||
		s.Network.IP.String() != "10.89.1.7/16" || s.Network.MAC != "02:74:0a:59:01:07" ||
		s.MemoryLimit != 64<<20 || s.CPUs != 0.5 || s.Labels["tier"] != "front" {
		t.Fatalf("%+v", s)
	}
	h.listen(t)
	await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })

	var log []byte
	must(t, h.Logs(ctx, namespace, "web", -1, false, func(b []byte) error { log = append(log, b...); return nil }))
	if got := string(log); got != "up web [default] hi\n" {
		t.Errorf("log %q", got)
	}
	if _, err := h.Run(ctx, runtime.RunSpec{Namespace: namespace, Name: "web", Image: testImage}); !errors.Is(err, runtime.ErrExists) {
		t.Errorf("a second shard of the same name: %v", err)
	}
	if _, err := h.Run(ctx, runtime.RunSpec{Namespace: namespace, Name: "other", Image: testImage, IP: s.Network.IP.Addr()}); !errors.Is(err, runtime.ErrExists) {
		t.Errorf("a second shard with the same address: %v", err)
	}
	if _, err := h.Run(ctx, runtime.RunSpec{Namespace: namespace, Name: "other", Image: testImage, IP: netip.MustParseAddr("10.89.255.1")}); !errors.Is(err, runtime.ErrExists) {
		t.Errorf("a shard with the host's own address: %v", err)
	}
	next := h.run(t, runtime.RunSpec{})
	if next.Network.IP.String() != "10.89.1.1/16" {
		t.Errorf("the first free address is %v", next.Network.IP)
	}
	if err := h.Remove(ctx, namespace, "web", false); !errors.Is(err, runtime.ErrRunning) {
		t.Errorf("removing a running shard: %v", err)
	}
	must(t, h.Stop(ctx, namespace, "web", 5*time.Second))
	if got, err := h.Shard(ctx, namespace, "web"); err != nil || got.Status != runtime.StatusStopped || got.ExitCode != 0 {
		t.Errorf("after stop: %+v %v", got, err)
	}
	if all, err := h.Settings(ctx, namespace, nil); err != nil || all["web"].Running || !all[next.Name].Running || all["web"].CPUs != 0.5 {
		t.Errorf("settings after stop: %+v %v", all, err)
	}
	if err := h.Stop(ctx, namespace, "web", time.Second); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("stopping it again: %v", err)
	}
	must(t, h.Remove(ctx, namespace, "web", false))
	must(t, h.Remove(ctx, namespace, next.Name, true))
	h.empty(t)
}

// veths lists the host ends of shards' interfaces.
func veths(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	must(t, err)
	var names []string
	for _, l := range links {
		if l.Type() == "veth" {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// empty fails when the host still holds anything of a shard's.
func (h *host) empty(t *testing.T) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), namespace)
	containers, err := h.client.Containers(ctx)
	must(t, err)
	if len(containers) != 0 {
		t.Errorf("%d containers are left", len(containers))
	}
	held, err := h.Network().Held()
	must(t, err)
	if len(held) != 0 {
		t.Errorf("network namespaces are left: %v", held)
	}
	// The kernel takes a namespace apart in the background.
	patience, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	await(t, patience, "the end of the shard's interfaces", func() bool {
		return !slices.ContainsFunc(veths(t), func(name string) bool { return !slices.Contains(h.before, name) })
	})
	active := 0
	must(t, h.client.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind != snapshots.KindCommitted {
			active++
		}
		return nil
	}))
	if active != 0 {
		t.Errorf("%d active snapshots are left", active)
	}
	all, err := h.client.LeasesService().List(ctx)
	must(t, err)
	for _, l := range all {
		if strings.HasPrefix(l.ID, "tranship-") {
			t.Errorf("lease %s is left", l.ID)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(mounts), h.dir) {
		t.Errorf("mounts are left:\n%s", mounts)
	}
	logs, _ := filepath.Glob(filepath.Join(h.dir, "var/logs/*/*"))
	if len(logs) != 0 {
		t.Errorf("logs are left: %v", logs)
	}
}

// neighbour puts a stranger with an address on the host's bridge.
func (h *host) neighbour(t *testing.T, cidr string) {
	t.Helper()
	commands := []string{
		"ip netns add stranger", "ip link add st0 type veth peer name st1 netns stranger", "ip link set st0 master " + h.bridge + " up",
		"ip -n stranger link set st1 up", "ip -n stranger addr add " + cidr + " dev st1 nodad",
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", "stranger").Run() })
	for _, c := range commands {
		if raw, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", c, err, raw)
		}
	}
}

func TestAnAddressThatAStrangerAnswersForIsNotHandedOut(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	first := h.run(t, runtime.RunSpec{Name: "first"}) // makes the bridge
	h.neighbour(t, "10.89.1.2/16")
	_, err := h.Run(t.Context(), runtime.RunSpec{Namespace: namespace, Name: "second", Image: testImage, IP: netip.MustParseAddr("10.89.1.2")})
	if !errors.Is(err, runtime.ErrExists) || !strings.Contains(err.Error(), "answered by") {
		t.Errorf("the stranger's address: %v", err)
	}
	second := h.run(t, runtime.RunSpec{Name: "second"})
	if first.Network.IP.Addr().String() != "10.89.1.1" || second.Network.IP.Addr().String() != "10.89.1.3" {
		t.Errorf("addresses %v and %v", first.Network.IP, second.Network.IP)
	}
}

func TestARunAfterAnInterruptedOneStartsAnew(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	ctx := t.Context()
	// All that a daemon killed before the container was made can have left: the
	// network with another address.
	left := runtime.ShardNet{Namespace: namespace, Name: "web", IP: netip.MustParsePrefix("10.89.7.7/16"), MAC: runtime.MACFor(netip.MustParseAddr("10.89.7.7"))}
	must(t, h.Network().Create(ctx, left))
	other := left
	other.IP, other.MAC = netip.MustParsePrefix("10.89.7.8/16"), runtime.MACFor(netip.MustParseAddr("10.89.7.8"))
	if err := h.Network().Create(ctx, other); !errors.Is(err, runtime.ErrExists) {
		t.Errorf("a network with another address was taken for its own: %v", err)
	}
	s := h.run(t, runtime.RunSpec{Name: "web"})
	h.listen(t)
	await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })
	must(t, h.Remove(ctx, namespace, "web", true))
	h.empty(t)
}

func TestAnExitIsSeenWithItsCode(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	h.run(t, runtime.RunSpec{Name: "short", Network: runtime.NetworkNone, Command: []string{"exit"}})
	exit, err := h.Wait(t.Context(), namespace, "short")
	if err != nil || exit.Code != 3 {
		t.Errorf("%+v %v", exit, err)
	}
	h.run(t, runtime.RunSpec{Name: "long", Network: runtime.NetworkHost})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Wait(ctx, namespace, "long"); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled wait: %v", err)
	}
}

func TestAFrozenShardIsSilentUntilItIsThawed(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	ctx := t.Context()
	s := h.run(t, runtime.RunSpec{Name: "web"})
	h.listen(t)
	await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })
	cg, err := h.Cgroup(ctx, namespace, "web")
	must(t, err)
	f := cg.Freezer()
	start := time.Now()
	must(t, f.Freeze(ctx))
	t.Logf("freeze: %v", time.Since(start))
	must(t, f.Freeze(ctx))
	if state, err := f.State(); err != nil || state != runtime.Frozen {
		t.Errorf("state %v %v", state, err)
	}
	if answer, err := ask(s.Network.IP, 100*time.Millisecond); err == nil {
		t.Errorf("the frozen shard answered %q", answer)
	}
	if got, err := h.Shard(ctx, namespace, "web"); err != nil || got.Status != runtime.StatusPaused {
		t.Errorf("%+v %v", got, err)
	}
	pids, err := cg.Processes()
	if err != nil || len(pids) != 1 || pids[0] != int(s.PID) {
		t.Errorf("processes %v %v, want %d", pids, err, s.PID)
	}
	start = time.Now()
	must(t, f.Thaw(ctx))
	t.Logf("thaw: %v", time.Since(start))
	must(t, f.Thaw(ctx))
	if _, err := ask(s.Network.IP, time.Second); err != nil {
		t.Errorf("after thaw: %v", err)
	}
	if n, err := cg.MemoryCurrent(); err != nil || n <= 0 {
		t.Errorf("memory in use %d %v", n, err)
	}
	// A frozen shard dies without a person.
	must(t, f.Freeze(ctx))
	must(t, h.Remove(ctx, namespace, "web", true))
	h.empty(t)
}

func TestAnIsolatedNetworkIsSilentUntilItIsRestored(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	ctx := t.Context()
	s := h.run(t, runtime.RunSpec{Name: "web"})
	h.listen(t)
	await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })
	for range 2 {
		for range 2 {
			start := time.Now()
			must(t, h.Network().Isolate(ctx, netOf(s)))
			t.Logf("isolate: %v", time.Since(start))
		}
		if answer, err := ask(s.Network.IP, 100*time.Millisecond); err == nil {
			t.Errorf("the isolated shard answered %q", answer)
		}
		for range 2 {
			start := time.Now()
			must(t, h.Network().Restore(ctx, netOf(s)))
			t.Logf("restore: %v", time.Since(start))
		}
		await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })
	}
}

// What a restored socket sends while the interface leads nowhere must not wait
// for the kernel's next try, a second after its first.
func TestAnActivatedNetworkFindsItsNeighboursAtOnce(t *testing.T) {
	for _, c := range []struct{ name, own, stranger string }{
		{"IPv4", "10.89.1.9/16", "10.89.7.7"},
		{"IPv6", "fd00:89::9/64", "fd00:89::7:7"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, "a")
			h.addImage(t)
			h.run(t, runtime.RunSpec{Name: "first"}) // makes the bridge
			own := netip.MustParsePrefix(c.own)
			stranger := netip.MustParseAddr(c.stranger)
			h.neighbour(t, netip.PrefixFrom(stranger, own.Bits()).String())
			sn := runtime.ShardNet{Namespace: namespace, Name: "web", IP: own, MAC: runtime.MACFor(own.Addr()), Staged: true}
			must(t, h.Network().Create(t.Context(), sn))
			t.Cleanup(func() { must(t, h.Network().Delete(context.Background(), sn)) })
			state := func() string {
				out, err := exec.Command("nsenter", "--net="+h.Network().Path(namespace, "web"), "ip", "neigh", "show", stranger.String()).CombinedOutput()
				if err != nil {
					t.Fatalf("ip neigh: %v %s", err, out)
				}
				return strings.TrimSpace(string(out))
			}
			// A datagram that goes nowhere; an IPv6 address is tentative at first.
			await(t, t.Context(), "the shard's kernel asks for its neighbour", func() bool {
				send := exec.Command("nsenter", "--net="+h.Network().Path(namespace, "web"), "bash", "-c", "echo x > /dev/udp/"+stranger.String()+"/9")
				send.Run()
				return strings.Contains(state(), "INCOMPLETE")
			})
			start := time.Now()
			must(t, h.Network().Activate(t.Context(), sn))
			await(t, t.Context(), "the neighbour answers", func() bool { return strings.Contains(state(), "lladdr") })
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("the neighbour was found after %v", took)
			}
		})
	}
}

// incoming prepares a copy of the source's shard on dst, as a migration would.
func incoming(t *testing.T, src, dst *host, name, migration string) (*runtime.Record, runtime.ShardNet) {
	t.Helper()
	ctx := t.Context()
	rec, err := src.Describe(ctx, namespace, name)
	must(t, err)
	if f := runtime.Movable(rec); len(f) != 0 {
		t.Fatalf("findings: %+v", f)
	}
	raw, err := json.Marshal(rec)
	must(t, err)
	rec, err = runtime.DecodeRecord(raw)
	must(t, err)
	// Both hosts share /run here, where runc keeps its state by container name.
	options, err := typeurl.MarshalAnyToProto(&options.Options{Root: "/run/containerd/runc-" + filepath.Base(dst.bridge)})
	must(t, err)
	rec.Runtime.Options = runtime.OpaqueRecord{TypeURL: options.TypeUrl, Value: options.Value}
	missing, err := dst.EnsureContent(ctx, rec, migration)
	must(t, err)
	if len(missing) != 5 { // index, manifest, config, two layers
		t.Fatalf("missing %v", missing)
	}
	for _, d := range missing {
		b, err := src.OpenBlob(ctx, namespace, d.Digest)
		must(t, err)
		must(t, dst.WriteBlob(ctx, namespace, migration, d, b.Reader()))
		must(t, b.Close())
	}
	missing, err = dst.EnsureContent(ctx, rec, migration)
	if err != nil || len(missing) != 0 {
		t.Fatalf("still missing %v %v", missing, err)
	}
	sn := runtime.ShardNet{Namespace: namespace, Name: name, IP: rec.Network.IP, MAC: rec.Network.MAC, Staged: true}
	for range 2 { // everything may run twice
		image, err := dst.PrepareImage(ctx, rec, migration)
		must(t, err)
		must(t, dst.Network().Create(ctx, sn))
		must(t, dst.CreateForRestore(ctx, rec, image, migration))
	}
	return rec, sn
}

func TestAnAbortedArrivalLeavesNothing(t *testing.T) {
	src, dst := newHost(t, "a"), newHost(t, "b")
	src.addImage(t)
	ctx := t.Context()
	src.run(t, runtime.RunSpec{Name: "web"})
	rec, sn := incoming(t, src, dst, "web", "m1")
	for _, h := range []*host{src, dst} {
		known := map[string][]runtime.Layer{}
		for range 2 { // what was read is remembered
			layers, err := h.Layers(ctx, namespace, known)
			must(t, err)
			var want []runtime.Layer
			for _, l := range rec.Image.Layers {
				want = append(want, runtime.Layer{Key: namespace + "/" + l.Digest.String(), Bytes: l.Size})
			}
			if len(layers) != 1 || !slices.Equal(layers[rec.Image.Name], want) || len(known) != 1 {
				t.Errorf("layers: %v, and not %v", layers, want)
			}
		}
	}
	t.Cleanup(func() { dst.Network().Delete(context.Background(), sn) })
	images := t.TempDir()
	task, err := dst.NewRestoreTask(ctx, rec, images, t.TempDir())
	must(t, err)
	if _, err := dst.Rootfs(ctx, namespace, "web"); err != nil {
		t.Error(err)
	}
	// An empty image directory: CRIU refuses, containerd must still let go.
	if pid, err := task.Start(ctx); err == nil || !strings.Contains(err.Error(), "descriptors.json") {
		t.Errorf("restored pid %d from nothing: %v", pid, err)
	}
	if err := dst.Remove(ctx, namespace, "web", true); !errors.Is(err, runtime.ErrIncoming) {
		t.Errorf("removing an incoming shard: %v", err)
	}
	must(t, dst.DestroyIncoming(ctx, namespace, "web", "another"))
	if _, err := dst.Shard(ctx, namespace, "web"); err != nil {
		t.Errorf("another migration's undo took the shard: %v", err)
	}
	for range 2 {
		must(t, dst.DestroyIncoming(ctx, namespace, "web", "m1"))
		must(t, dst.Network().Delete(ctx, sn))
	}
	nsctx := namespaces.WithNamespace(ctx, namespace)
	all, err := dst.client.ImageService().List(nsctx)
	if err != nil || len(all) != 0 {
		t.Errorf("images are left: %v %v", all, err)
	}
	blobs := 0
	must(t, dst.client.ContentStore().Walk(nsctx, func(content.Info) error { blobs++; return nil }))
	if blobs != 0 {
		t.Errorf("%d blobs are left", blobs)
	}
	must(t, src.Remove(ctx, namespace, "web", true))
	dst.empty(t)
	src.empty(t)
}

func TestAShardMovesByCheckpointAndRestore(t *testing.T) {
	if _, err := os.Stat(filepath.Join(criuDir, "criu")); err != nil {
		testenv.Missing(t, criuDir)
	}
	src, dst := newHost(t, "a"), newHost(t, "b")
	src.addImage(t)
	ctx := t.Context()
	s := src.run(t, runtime.RunSpec{Name: "web"})
	src.listen(t)
	await(t, ctx, "an answer", func() bool { _, err := ask(s.Network.IP, time.Second); return err == nil })
	rec, sn := incoming(t, src, dst, "web", "m1")
	t.Cleanup(func() { dst.Network().Delete(context.Background(), sn) })
	images, work := t.TempDir(), t.TempDir()
	task, err := dst.NewRestoreTask(ctx, rec, images, work)
	must(t, err)
	must(t, src.MarkStopped(ctx, namespace, "web"))

	cmd := exec.Command("runc", "--root", "/run/containerd/runc/default", "checkpoint",
		"--image-path", images, "--work-path", work, "web")
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(src.dir, "bin")+":"+os.Getenv("PATH"))
	if raw, err := cmd.CombinedOutput(); err != nil {
		dump, _ := os.ReadFile(filepath.Join(work, "dump.log"))
		t.Fatalf("checkpoint: %v %s\n%s", err, raw, tail(dump, 3000))
	}
	must(t, src.Network().Isolate(ctx, netOf(s)))
	from, err := src.UpperDir(ctx, namespace, "web")
	must(t, err)
	root, err := dst.Rootfs(ctx, namespace, "web")
	must(t, err)
	must(t, root.Unmount())
	must(t, root.Unmount())
	to, err := dst.UpperDir(ctx, namespace, "web")
	must(t, err)
	if raw, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, raw)
	}
	must(t, root.Mount())
	pid, err := task.Start(ctx)
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(work, "restore.log"))
		t.Fatalf("%v\n%s", err, tail(log, 5000))
	}
	start := time.Now()
	must(t, dst.Network().Activate(ctx, sn))
	t.Logf("activate: %v", time.Since(start))
	must(t, dst.Adopt(ctx, namespace, "web", "m1"))
	must(t, dst.Adopt(ctx, namespace, "web", "m1"))
	must(t, dst.LeaseHere(namespace, "web", rec.Network))
	for range 2 {
		must(t, src.RemoveMoved(ctx, namespace, "web"))
	}
	src.noContainer(t)
	got, err := dst.Shard(ctx, namespace, "web")
	if err != nil || got.Status != runtime.StatusRunning || int(got.PID) != pid || got.Incoming != "" || got.Network.IP != s.Network.IP {
		t.Errorf("%+v %v", got, err)
	}
	// The destination's bridge is another one; give it this side's address.
	link, err := netlink.LinkByName(src.bridge)
	must(t, err)
	addr, err := netlink.ParseAddr("10.89.255.1/16")
	must(t, err)
	must(t, netlink.AddrDel(link, addr))
	dst.listen(t)
	var answer string
	await(t, ctx, "an answer at the destination", func() bool { answer, err = ask(s.Network.IP, time.Second); return err == nil })
	var count int
	if _, err := fmt.Sscan(answer, &count); err != nil || count < 2 {
		t.Errorf("the shard began anew: %q", answer)
	}
	must(t, dst.Stop(ctx, namespace, "web", 5*time.Second))
	var log []byte
	must(t, dst.Logs(ctx, namespace, "web", 1, false, func(b []byte) error { log = append(log, b...); return nil }))
	if string(log) != "term\n" {
		t.Errorf("log at the destination %q", log)
	}
	must(t, dst.Remove(ctx, namespace, "web", false))
	dst.empty(t)
}

func (h *host) noContainer(t *testing.T) {
	t.Helper()
	shards, err := h.List(t.Context(), namespace)
	if err != nil || len(shards) != 0 {
		t.Errorf("left at the source: %v %v", shards, err)
	}
	if held, err := h.Network().Held(); err != nil || len(held) != 0 {
		t.Errorf("left at the source: %v %v", held, err)
	}
}
