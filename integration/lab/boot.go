package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

const (
	gateFD  = 3 // readable once the machine has moved init into its cgroups
	readyFD = 4 // init writes "ready" when the host can be used
	// stageEnv tells the second life of init from the first.
	stageEnv = "TRANSHIP_LAB_STAGE=2"
)

// Init is the first process of a host, in two lives. The first sets up what
// the machine sees of the host and then replaces itself: a namespace entered
// by one thread of a Go program is not entered by the others, but execve makes
// that thread the whole process. The second life supervises the services.
// It returns only with an error.
func Init(specPath string) error {
	raw, err := os.ReadFile(specPath)
	if err != nil {
		return err
	}
	var spec initSpec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return fmt.Errorf("%s: %w", specPath, err)
	}
	if os.Getenv("TRANSHIP_LAB_STAGE") == "2" {
		return supervise(spec)
	}
	runtime.LockOSThread()
	if err := boot(spec); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, append(baseEnv(spec.BinDir), stageEnv))
}

// boot turns fresh namespaces into a host.
func boot(spec initSpec) error {
	var word [2]byte
	if _, err := unix.Read(gateFD, word[:]); err != nil || string(word[:]) != "go" {
		return errors.New("the lab went away before this host was set up")
	}
	unix.Close(gateFD)
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(spec.Node.Name)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	// Slave, not private: an unmount on the machine must get through, or this
	// host keeps a disk busy. Nothing travels back.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("detaching mounts from the machine: %w", err)
	}
	if err := mountOver("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := bridgeNetfilterOff(); err != nil {
		return fmt.Errorf("bridge netfilter: %w", err)
	}
	if spec.Node.Role == roleSwitch {
		return nil
	}
	if err := mountSys(spec); err != nil {
		return err
	}
	return mountFiles(spec)
}

// mountSys gives the host a /sys of its own network namespace and cgroups.
func mountSys(spec initSpec) error {
	if err := unix.Unmount("/sys", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmounting /sys: %w", err)
	}
	if err := mountOver("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := mountCgroups(spec.Cgroups, spec.Links); err != nil {
		return err
	}
	// For eBPF. A kernel may lack them, and then their users say so themselves.
	for _, extra := range []struct{ fstype, at string }{{"bpf", "/sys/fs/bpf"}, {"tracefs", "/sys/kernel/tracing"}} {
		if !exists(extra.at) {
			continue
		}
		err := unix.Mount(extra.fstype, extra.at, extra.fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700")
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("mounting %s: %w", extra.at, err)
		}
	}
	return nil
}

// mountFiles puts the host's own directories over the machine's.
func mountFiles(spec initSpec) error {
	if err := mountOver("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	if err := os.Mkdir("/run/lock", 0o777|fs.ModeSticky); err != nil {
		return err
	}
	// Shards' shared memory and the host's own, not the machine's.
	if exists("/dev/shm") {
		if err := mountOver("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
			return err
		}
	}
	for from, to := range map[string]string{
		"etc-tranship":       "/etc/tranship",
		"var-lib-tranship":   "/var/lib/tranship",
		"var-lib-containerd": "/var/lib/containerd",
		"hosts":              "/etc/hosts",
		"hostname":           "/etc/hostname",
	} {
		if err := mountOver(filepath.Join(spec.Dir, from), to, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

func mountOver(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mounting %s: %w", target, err)
	}
	return nil
}
