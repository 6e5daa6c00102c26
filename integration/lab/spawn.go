package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/tranship/tranship/internal/failpoint"

	"golang.org/x/sys/unix"
)

// InitVerb is the hidden argument with which the lab starts tranship as the
// first process of a host: `tranship lab init SPEC`.
const InitVerb = "init"

// initSpec is all that a node's init needs to know.
type initSpec struct {
	Node    nodePlan          `json:"node"`
	Dir     string            `json:"dir"`
	BinDir  string            `json:"bin_dir"`
	Cgroups []cgroupMount     `json:"cgroups"`
	Links   map[string]string `json:"cgroup_links"`
}

// spawn makes a node's namespaces and cgroups and starts its init in them. It
// returns when the init has mounted everything and listens for commands.
func spawn(ctx context.Context, node nodePlan, binDir string) (nodeRecord, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nodeRecord{}, err
	}
	if err := makeCgroups(mounts, node.Name); err != nil {
		return nodeRecord{}, err
	}
	dir := nodeDir(node.Name)
	spec := initSpec{Node: node, Dir: dir, BinDir: binDir, Cgroups: mounts, Links: cgroupLinks()}
	raw, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return nodeRecord{}, err
	}
	specPath := filepath.Join(dir, "spec.json")
	if err := os.WriteFile(specPath, raw, 0o600); err != nil {
		return nodeRecord{}, err
	}
	logFile, err := os.Create(filepath.Join(dir, "init.log"))
	if err != nil {
		return nodeRecord{}, err
	}
	defer logFile.Close()
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return nodeRecord{}, err
	}
	defer gateW.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		gateR.Close()
		return nodeRecord{}, err
	}
	defer readyR.Close()

	cmd := exec.Command(filepath.Join(binDir, "tranship"), "lab", InitVerb, specPath)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", logFile, logFile
	cmd.Env = baseEnv(binDir)
	cmd.ExtraFiles = []*os.File{gateR, readyW} // descriptors 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		// The cgroup namespace comes later, from inside: its root is where the
		// process is when it is made.
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	err = cmd.Start()
	gateR.Close()
	readyW.Close()
	if err != nil {
		return nodeRecord{}, fmt.Errorf("starting its init: %w", err)
	}
	ok := false
	defer func() {
		if !ok {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	if err := joinCgroups(mounts, node.Name, cmd.Process.Pid); err != nil {
		return nodeRecord{}, err
	}
	if _, err := gateW.WriteString("go"); err != nil {
		return nodeRecord{}, err
	}
	if err := awaitReady(ctx, readyR, logFile.Name()); err != nil {
		return nodeRecord{}, err
	}
	start, running := startTime(cmd.Process.Pid)
	if !running {
		return nodeRecord{}, withLog(errors.New("its init ended"), logFile.Name())
	}
	ok = true
	pid := cmd.Process.Pid
	// The init outlives this process on purpose.
	_ = cmd.Process.Release()
	return nodeRecord{Name: node.Name, Role: node.Role, PID: pid, Start: start}, nil
}

// awaitReady reads init's one word; the end of the pipe is the end of init.
func awaitReady(ctx context.Context, ready *os.File, logPath string) error {
	stop := context.AfterFunc(ctx, func() { ready.Close() })
	defer stop()
	word, err := io.ReadAll(ready)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("waiting for its init: %w", err)
	case string(word) != "ready":
		return withLog(errors.New("its init ended early"), logPath)
	}
	return nil
}

// withLog adds the end of a log to an error; that is where the reason is.
func withLog(err error, path string) error {
	raw, readErr := os.ReadFile(path)
	if readErr != nil || len(raw) == 0 {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	if keep := 12; len(lines) > keep {
		lines = lines[len(lines)-keep:]
	}
	return fmt.Errorf("%w; the end of %s:\n  %s", err, path, strings.Join(lines, "\n  "))
}

// systemPath are the machine's programs.
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// hostPath is PATH inside a host: the build, the private CRIU, which runc
// looks for by name, and the machine's programs.
func hostPath(binDir string) string {
	return strings.Join([]string{binDir, PrivateCRIU, systemPath}, ":")
}

// baseEnv is the environment of a host's services: nothing of the caller's,
// so that a lab behaves the same whoever brought it up.
func baseEnv(binDir string) []string {
	return []string{
		"PATH=" + hostPath(binDir), "HOME=/root", "LANG=C.UTF-8",
		// Tests stop and kill the daemon at named points; the directory is theirs
		// to make, in the host's own /run.
		failpoint.EnvDir + "=" + FailpointDir,
	}
}

// FailpointDir is where a host's transhipd looks for failpoints.
const FailpointDir = "/run/tranship-failpoints"
